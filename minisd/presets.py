"""The presets: the sizes of a model's three networks, by name. `training/recipes.toml` says how they are trained."""

from dataclasses import asdict, replace

from .clip import CLIPTextConfig, CLIPVisionConfig
from .latent_diffusion import LatentDiffusionConfig
from .unet import UNetConfig
from .vae import AutoencoderConfig
from .vq import VQConfig

# 32x32 emoji in seven styles, small enough to be trained from scratch on a laptop
EMOJI = LatentDiffusionConfig(
    unet=UNetConfig(
        model_channels=96,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(2,),
        num_heads=None,
        num_head_channels=64,
        context_dim=192,
    ),
    first_stage=AutoencoderConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=1),
    cond_stage=CLIPTextConfig(vocab_size=3072, max_length=24, width=192, layers=3, heads=3, projection_dim=192),
    image_size=32,
    scale_factor=1.0,  # measured when the autoencoder is trained
)
# The models that ship, some larger ones to train, and Stable Diffusion v1.
PRESETS = {
    # 32x32 pictures of coloured shapes: for notebooks, tests, the first lesson
    "tiny": LatentDiffusionConfig(
        unet=UNetConfig(
            model_channels=64,  # with 32, GroupNorm's groups have one channel each, and it removes the time embedding
            num_res_blocks=0,  # a ResBlock, a transformer and a ResBlock in the middle, and one ResBlock on the way up
            channel_mult=(1,),
            attention_resolutions=(),
            num_heads=None,
            num_head_channels=32,
            context_dim=32,
        ),
        first_stage=AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
        cond_stage=CLIPTextConfig(vocab_size=640, max_length=16, width=32, layers=2, heads=2, projection_dim=32),
        image_size=32,
        scale_factor=1.0,
    ),
    "emoji": EMOJI,
    # the same emoji and scenes of them at 64x64: latents of 16x16
    "emoji-64": replace(
        EMOJI,
        unet=replace(EMOJI.unet, model_channels=64, channel_mult=(1, 2, 3), attention_resolutions=(1, 2)),
        cond_stage=replace(EMOJI.cond_stage, max_length=32),
        image_size=64,
    ),
    "sd-v1": LatentDiffusionConfig(),
    # the same with five more input channels: the mask, and the latent of the picture without the masked part
    "sd-v1-inpainting": LatentDiffusionConfig(unet=UNetConfig(in_channels=9)),
}

# The image towers that the text towers of the presets are trained with.
VISION = {
    "tiny": CLIPVisionConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2, projection_dim=32),
    "emoji": CLIPVisionConfig(image_size=32, patch_size=8, width=192, layers=4, heads=3, projection_dim=192),
    "emoji-64": CLIPVisionConfig(image_size=64, patch_size=8, width=192, layers=4, heads=3, projection_dim=192),
    "sd-v1": CLIPVisionConfig(),
}

# The first stages with a codebook, `--first-stage vq`: the preset's autoencoder, with n_embed codes instead of a
# variance. (For the 512x512 pixels of Stable Diffusion, as many codes as in CompVis's VQ-f8.)
VQ = {
    name: VQConfig(**asdict(PRESETS[name].first_stage) | {"double_z": False}, n_embed=n_embed)
    for name, n_embed in {"tiny": 256, "emoji": 1024, "emoji-64": 1024, "sd-v1": 16_384}.items()
}
