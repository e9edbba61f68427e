"""The two peers: a network of ours and diffusers' network of the same shape, with the same weights.

Neither is copied from the other in memory: both are filled from one seed, and diffusers' own reader of CompVis
checkpoints translates the names.
"""

import torch
from diffusers import AutoencoderKL as DiffusersVAE
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn

from minisd import AutoencoderConfig, AutoencoderKL, UNetConfig, UNetModel
from minisd.checkpoint.diffusers import unet_config_json, vae_config_json


def weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a network of the "meta" device: matrices that keep the variance, and no zeros anywhere.

    (Half of a new network is switched off by zeros. In a bfloat16 or float32 multiplication they cost as much as other
    numbers, but no comparison of outputs would see a mistake behind them.)
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.state_dict().items():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if noise.ndim > 1:
            state[name] = noise.mul_((noise.numel() / len(noise)) ** -0.5)
        else:
            state[name] = noise.mul_(0.2).add_(1.0 if name.endswith("weight") else 0.0)
    return state


def our_unet(config: UNetConfig) -> UNetModel:
    with torch.device("meta"):
        model = UNetModel(config)
    model.load_state_dict(weights(model), assign=True)
    return model.eval()


def their_unet(config: UNetConfig) -> UNet2DConditionModel:
    with torch.device("meta"):
        ours, model = UNetModel(config), UNet2DConditionModel.from_config(unet_config_json(config))
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in weights(ours).items()}
    model.load_state_dict(convert_ldm_unet_checkpoint(state, model.config), assign=True)
    return model.eval()


def our_vae(config: AutoencoderConfig) -> AutoencoderKL:
    with torch.device("meta"):
        model = AutoencoderKL(config)
    model.load_state_dict(weights(model), assign=True)
    return model.eval()


def their_vae(config: AutoencoderConfig) -> DiffusersVAE:
    with torch.device("meta"):
        ours, model = AutoencoderKL(config), DiffusersVAE.from_config(vae_config_json(config))
    state = {f"first_stage_model.{name}": tensor for name, tensor in weights(ours).items()}
    model.load_state_dict(convert_ldm_vae_checkpoint(state, model.config), assign=True)
    return model.eval()
