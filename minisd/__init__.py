"""minisd: Stable Diffusion v1 that one person can read, run and train.

    import minisd
    sd = minisd.load()                                     # the model that ships
    sd.txt2img("a red fox, noto style").images[0].show()

Each stage is a module of its own, in this order: noising, loss, unet (with attention), vae (and vq), clip (with
tokenizer), sampling, latent_diffusion; and what came after: editing, lora, flow. Beside them: data (captioned
pictures), training, evaluation, checkpoint, instruments (trace, record_attention, compare), viz, cli.
"""

import sys

from . import data, editing, flow, lora, sampling, viz
from .attention import AttentionBlock, CrossAttention, SpatialTransformer
from .checkpoint import CheckpointError, load, load_clip, save
from .clip import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, FrozenCLIPEmbedder
from .conditions import ClassConfig, ClassEmbedder
from .instruments.attention_maps import AttentionMaps, record_attention
from .instruments.comparison import Comparison, compare
from .instruments.tracing import Trace, trace
from .latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from .loss import epsilon_loss, text_dropout, v_loss, x0_loss
from .noising import ExactDenoiser, NoiseSchedule
from .pictures import Drawing, Trajectory
from .presets import PRESETS
from .sampling import Guided, Step, classifier_free_guidance
from .tokenizer import BPETokenizer
from .unet import UNetConfig, UNetModel
from .vae import AutoencoderConfig, AutoencoderKL, DiagonalGaussianDistribution, IdentityConfig, IdentityFirstStage
from .vq import VQConfig, VQModel, VQModelInterface

__version__ = "0.2.0"

# Pipes on Windows and some terminals cannot encode "ᾱ" or "∅". They get "\u1fb1" instead of an error.
for _stream in (sys.stdout, sys.stderr):
    if getattr(_stream, "errors", None) == "strict" and hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="backslashreplace")

__all__ = [
    "AttentionBlock", "AttentionMaps", "AutoencoderConfig", "AutoencoderKL", "BPETokenizer", "CLIPModel",
    "CLIPTextConfig", "CLIPTextModel", "CLIPVisionConfig", "CheckpointError", "ClassConfig", "ClassEmbedder",
    "Comparison", "CrossAttention", "DiagonalGaussianDistribution", "Drawing", "ExactDenoiser",
    "FrozenCLIPEmbedder", "Guided", "IdentityConfig", "IdentityFirstStage", "LatentDiffusion",
    "LatentDiffusionConfig", "NoiseSchedule", "PRESETS", "SpatialTransformer", "Step", "Trace", "Trajectory",
    "UNetConfig", "UNetModel", "VQConfig", "VQModel", "VQModelInterface", "classifier_free_guidance", "compare",
    "data", "editing", "epsilon_loss", "flow", "load", "load_clip", "lora", "record_attention", "sampling", "save",
    "text_dropout", "trace", "v_loss", "viz", "x0_loss",
]  # fmt: skip
