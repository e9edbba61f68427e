"""The other first stage: a latent that is made of words of a codebook.

Where AutoencoderKL keeps its latents near N(0, I), VQModel lets each pixel of the latent be one of 8,192 vectors only.
Nothing is sampled, and there is no variance to keep small; a picture is a table of 64x64 whole numbers.

    picture [b 3 H W] ─► Encoder ─► quant_conv ─► h ─► nearest codes z [b 3 h w] ─► post_quant_conv ─► Decoder

Source: van den Oord et al. 2017 (arXiv:1711.00937); Esser et al. 2021 (arXiv:2012.09841); Rombach et al. 2022
(arXiv:2112.10752), section 3.1; CompVis `ldm/models/autoencoder.py`, and `quantize.py: VectorQuantizer2` in their
taming-transformers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .vae import AutoencoderConfig, Decoder, Encoder, FirstStage


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """What a VQModel is. The defaults are the official VQ-f4 (55 million parameters): 256x256 pixels, 64x64 codes."""

    ch_mult: tuple[int, ...] = (1, 2, 4)  # f = 4
    z_channels: int = 3  # channels between the convolutions
    embed_dim: int = 3  # channels of the latent: numbers of a code
    double_z: bool = False  # a code has no variance
    n_embed: int = 8192  # codes in the codebook
    beta: float = 0.25  # weight of one term of the quantiser's loss …
    legacy: bool = True  # … which: see VectorQuantizer. True is how the official models were trained


class Quantized(NamedTuple):
    """What the quantiser makes of a map of vectors."""

    z: Float[Tensor, "b d h w"]  # the nearest codes; gradients pass through as if nothing had happened
    loss: Float[Tensor, ""]  # draws codes and vectors together
    indices: Int[Tensor, "b h w"]  # which codes, 0..n_embed-1


def straight_through(z: Float[Tensor, "*d"], codes: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Forwards the codes; backwards the identity, from what is returned to z (van den Oord et al., section 3.2).

    argmin has no gradient, so the decoder's gradient at the code is taken for that at the vector.
    """
    return codes.detach() + (z - z.detach())  # z - sg[z] is exactly zero, and its gradient is that of z


class VectorQuantizer(nn.Module):
    """Each vector becomes its nearest code. CompVis (taming-transformers) `quantize.py: VectorQuantizer2`.

    Args:
        n_embed: codes in the codebook.
        embed_dim: numbers of a code.
        beta: weight of one of the two terms of the loss.
        legacy: which. With sg for "no gradient through here", and squares averaged over all numbers, the paper has

                ‖sg[z] - e‖² + β ‖z - sg[e]‖²        (van den Oord et al., eq. 3)

            The first term moves the codes to the vectors; the second, the commitment, keeps the encoder near the code
            that it chose, and β < 1 lets the codes follow faster than the encoder gives way. That is legacy=False.
            CompVis multiplied the first by β instead, noticed, and kept it, as models were trained so: legacy=True.
            The value of the loss is the same, (1 + β) ‖z - e‖²; its gradients are not.
    """

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta = beta
        self.legacy = legacy
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        indices = self.nearest(z)
        codes = self.embedding(indices).movedim(-1, 1)  # [b h w d] → [b d h w]
        return Quantized(straight_through(z, codes), self.loss(z, codes), indices)

    def loss(self, z: Float[Tensor, "b d h w"], codes: Float[Tensor, "b d h w"]) -> Float[Tensor, ""]:
        """What draws codes and vectors together: see above."""
        to_vectors = (codes - z.detach()).square().mean()
        commitment = (z - codes.detach()).square().mean()
        return self.beta * to_vectors + commitment if self.legacy else to_vectors + self.beta * commitment

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """The index of the code that is nearest to each vector, by squared distance; the first of equals."""
        vectors = z.movedim(1, -1)  # [b h w d]
        # ‖z - e‖² = ‖z‖² - 2 z·e + ‖e‖²: a matrix product, not a table of all differences; ‖z‖² is the same for all
        # codes, and leaving it out also saves the digits that it would swallow. As few digits are left in half
        # precision, autocast is kept out; and 4,096 vectors at a time, as the table of distances to 8,192 codes has
        # half a gigabyte at 512x512 pixels.
        with torch.autocast(z.device.type, enabled=False):
            codes = self.embedding.weight.float()
            squares = codes.square().sum(dim=1)
            nearest = [
                torch.addmm(squares, part, codes.T, alpha=-2).argmin(dim=1)
                for part in vectors.flatten(0, -2).float().split(4096)
            ]
        return torch.cat(nearest).view(vectors.shape[:-1])

    def lookup(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """The codes of that number.

        Raises:
            ValueError: a number that no code has.
        """
        n_embed = self.embedding.num_embeddings
        if indices.numel() and not 0 <= indices.min() <= indices.max() < n_embed:
            reach = f"from {indices.min()} to {indices.max()}"
            raise ValueError(f"codes are numbered from 0 to {n_embed - 1}, but the indices reach {reach}")
        return self.embedding(indices).movedim(-1, 1)

    def usage(self, indices: Int[Tensor, "*shape"]) -> Int[Tensor, "n_embed"]:
        """How often each code was chosen. Many zeros mean a collapsed codebook: most codes are never the nearest."""
        return torch.bincount(indices.flatten(), minlength=self.embedding.num_embeddings)

    def perplexity(self, indices: Int[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """exp(-Σ p log p), p how often each code was chosen: as good as so many codes, all chosen equally often.

        Between 1 (always the same code) and n_embed.
        """
        counts = self.usage(indices).float()
        return torch.special.entr(counts / counts.sum()).sum().exp()


class VQModel(FirstStage):
    """The VQ-VAE: `encode` gives codes, `decode` a picture. CompVis `autoencoder.py: VQModel`.

    Pictures have values in [-1, 1].

    Raises:
        ValueError: a config with `double_z`.
    """

    def __init__(self, config: VQConfig = VQConfig()):
        super().__init__()
        if config.double_z:
            raise ValueError("VQModel needs double_z=False, as a code has no variance; AutoencoderKL needs True")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, config.beta, config.legacy)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Float[Tensor, "b c H W"]) -> Quantized:
        """Picture in [-1, 1] → its codes.

        Raises:
            ValueError: a height or width that is not divisible by the downsampling factor (4 in VQ-f4).
        """
        return self.quantize(self._encode(x))

    def decode(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Codes → picture, in about [-1, 1] (clamp before showing it)."""
        return self._decode(z)

    def decode_code(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        """Numbers of codes → picture."""
        return self._decode(self.quantize.lookup(indices))

    def forward(self, x: Float[Tensor, "b c H W"], return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction [b c H W] and the quantiser's loss: what the training loss needs.

        return_pred_indices: and which codes were chosen [b h w], to see how many of them are in use.
        """
        quantized = self.quantize(self._encode(x))
        result = self._decode(quantized.z), quantized.loss
        return (*result, quantized.indices) if return_pred_indices else result


class VQModelInterface(VQModel):
    """A VQModel as diffusion uses it: the quantiser belongs to the decoder. CompVis `autoencoder.py: VQModelInterface`.

    Noise is added to numbers, not to choices: diffusion works on the continuous h from before the quantiser. What it
    ends with lies on no code exactly, and is moved to the nearest before it is decoded: small errors vanish there.
    """

    def encode(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """Picture in [-1, 1] → h, not quantised yet.

        Raises:
            ValueError: a height or width that is not divisible by the downsampling factor.
        """
        return self._encode(x)

    def decode(self, h: Float[Tensor, "b d h w"], force_not_quantize: bool = False) -> Float[Tensor, "b c H W"]:
        """h → its codes → picture; without the codes if force_not_quantize."""
        return self._decode(h if force_not_quantize else self.quantize(h).z)
