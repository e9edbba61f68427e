"""The other first stage: a latent that is made of entries of a codebook.

AutoencoderKL keeps its latents near N(0, I) with a KL term. VQModel restricts them in another way: each pixel of the
latent has to be one of 8,192 learned vectors, the codes. There is no variance and no sampling, and a picture becomes a
table of 64x64 whole numbers.

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
    """The architecture of a VQModel. The defaults are the official VQ-f4: 256x256 pixels, 64x64 codes, 55 million."""

    ch_mult: tuple[int, ...] = (1, 2, 4)  # f = 4
    z_channels: int = 3  # channels between encoder or decoder and their 1x1 convolution
    embed_dim: int = 3  # channels of the latent, which are the numbers of a code
    double_z: bool = False  # a code has no variance
    n_embed: int = 8192  # codes in the codebook
    beta: float = 0.25  # weight of one of the two terms of the quantiser's loss
    legacy: bool = True  # which of them (VectorQuantizer.loss); the official models were trained with True


class Quantized(NamedTuple):
    """What the quantiser makes of a map of vectors."""

    z: Float[Tensor, "b d h w"]  # the nearest codes, with the gradient of the straight-through estimator
    loss: Float[Tensor, ""]  # pulls codes and vectors together
    indices: Int[Tensor, "b h w"]  # which codes those are, 0..n_embed-1


def straight_through(z: Float[Tensor, "*d"], codes: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """The codes in the forward pass, and the identity in the backward pass (van den Oord et al., section 3.2).

    Choosing the nearest code has no useful gradient: it is zero almost everywhere. Because a vector is close to its
    code, the gradient that the decoder sends to the code also tells the encoder where to move the vector.
    """
    # z - sg[z] is exactly zero, so the value is that of the codes; its gradient is that of z.
    return codes.detach() + (z - z.detach())


class VectorQuantizer(nn.Module):
    """Replace each vector by the nearest entry of a learned codebook.

    CompVis (taming-transformers) `quantize.py: VectorQuantizer2`.

    Args:
        n_embed: codes in the codebook.
        embed_dim: numbers of a code.
        beta: weight of one of the two terms of the loss.
        legacy: True weighs the term that moves the codes, False the one that moves the encoder: see `loss`.
    """

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta = beta
        self.legacy = legacy
        self.embedding = nn.Embedding(n_embed, embed_dim)
        # All codes start close to zero, because a code that starts far from every vector would never be chosen, and
        # so never be trained.
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        indices = self.nearest(z)  # k = argmin_j ‖z - e_j‖, one for each pixel: [b d h w] -> [b h w] (eq. 1)
        codes = self.embedding(indices).movedim(-1, 1)  # e_k: [b h w] -> [b h w d] -> [b d h w] (eq. 2)
        # The argmin has no gradient, so two others replace it. The decoder's error reaches the encoder straight
        # through the codes, and the loss below trains the codebook, which that error does not reach.
        return Quantized(straight_through(z, codes), self.loss(z, codes), indices)

    def loss(self, z: Float[Tensor, "b d h w"], codes: Float[Tensor, "b d h w"]) -> Float[Tensor, ""]:
        """Pull codes and vectors together: ‖sg[z] - e‖² + β ‖z - sg[e]‖² (van den Oord et al., eq. 3).

        sg means "no gradient through here", and the squares are averaged over all numbers. `legacy` multiplies the
        first term by β instead. CompVis did this by mistake, and kept it because models had been trained with it. The
        value of the loss is the same, (1 + β) ‖z - e‖², and only the gradients differ.
        """
        # The first term moves each code towards the vectors that chose it, as k-means moves its centres.
        to_vectors = (codes - z.detach()).square().mean()
        # The second, the commitment, keeps the encoder close to the codes that it chose, so that its vectors do not
        # grow away from them. With β < 1, as in the paper, the codes follow the encoder more than it follows them.
        commitment = (z - codes.detach()).square().mean()
        return self.beta * to_vectors + commitment if self.legacy else to_vectors + self.beta * commitment

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """The index of the code with the smallest squared distance to each vector; the first if several are equal."""
        vectors = z.movedim(1, -1)  # [b d h w] -> [b h w d]
        # ‖z - e‖² = ‖z‖² - 2 z·e + ‖e‖², so a matrix product does it, without a table of all differences. ‖z‖² is the
        # same for all codes and is left out: it changes no argmin, and if it is large, rounding would swallow the rest.
        # Autocast is off because two codes may be closer together than half precision can tell.
        with torch.autocast(z.device.type, enabled=False):
            codes = self.embedding.weight.float()
            squares = codes.square().sum(dim=1)
            # 4,096 vectors at a time, because at 512x512 pixels the table of distances to 8,192 codes would take half
            # a gigabyte.
            nearest = [
                torch.addmm(squares, part, codes.T, alpha=-2).argmin(dim=1)
                for part in vectors.flatten(0, -2).float().split(4096)
            ]
        return torch.cat(nearest).view(vectors.shape[:-1])

    def lookup(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """The codes that have these indices.

        Raises:
            ValueError: an index that no code has.
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
        """The effective number of codes in use: 1 if it is always the same one, n_embed if all are equally frequent."""
        # exp(-Σ p log p), where p is the frequency of each code; entr(0) is 0.
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
        # From the channels of the encoder to the numbers of a code, and back to those of the decoder.
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Float[Tensor, "b c H W"]) -> Quantized:
        """Picture in [-1, 1] → its codes.

        Raises:
            ValueError: a height or width that is not divisible by the downsampling factor (4 in VQ-f4).
        """
        # Tiles are joined before they are quantised: codes cannot be faded into each other.
        return self.quantize(self._encode(x))

    def decode(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Codes → picture, about in [-1, 1]: clamp it before you show it."""
        return self._decode(z)

    def decode_code(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        """Indices of codes, 0..n_embed-1 → picture.

        Raises:
            ValueError: an index that no code has.
        """
        return self._decode(self.quantize.lookup(indices))

    def forward(self, x: Float[Tensor, "b c H W"], return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction [b c H W] and the quantiser's loss [], from which the training loss is computed.

        Args:
            x: pictures in [-1, 1].
            return_pred_indices: also return the indices of the codes [b h w], to see how many of them are in use.
        """
        quantized = self.quantize(self._encode(x))
        result = self._decode(quantized.z), quantized.loss
        return (*result, quantized.indices) if return_pred_indices else result


class VQModelInterface(VQModel):
    """A VQModel as diffusion uses it: the quantiser is part of the decoder. CompVis `autoencoder.py: VQModelInterface`.

    Noise can be added to numbers, but not to a choice among codes, so diffusion works on the continuous h from before
    the quantiser. Its result is close to codes, but not equal. Moving each vector to the nearest code before decoding
    removes that small error.
    """

    def encode(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """Picture in [-1, 1] → h, not yet quantised.

        Raises:
            ValueError: a height or width that is not divisible by the downsampling factor (4 in VQ-f4).
        """
        return self._encode(x)

    def decode(self, h: Float[Tensor, "b d h w"], force_not_quantize: bool = False) -> Float[Tensor, "b c H W"]:
        """h → codes → picture, about in [-1, 1]. With `force_not_quantize`, h itself is decoded."""
        return self._decode(h if force_not_quantize else self.quantize(h).z)
