"""Which words each pixel attends to: the attention weights of the UNet, recorded while a picture is drawn.

    with record_attention(sd) as maps:
        sd.txt2img("fox, noto style", steps=25)
    maps.tokens                                     # "<start>", "fox", ",", "noto", "style", "<end>", "<pad>", …
    maps.at(step=-1, layer="middle_block", token="fox")    # [h w]: how much each pixel attends to that word

Each cross-attention layer computes a weight for every pixel and token, and the weights of a pixel sum to 1 (Vaswani et
al. 2017, eq. 1). Hertz et al. 2022 (arXiv:2208.01626) and Tang et al. 2022 (arXiv:2210.04885) interpret such maps of
Stable Diffusion.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..attention import RECORDING, CrossAttention, SpatialTransformer
from ..clip import END, START, FrozenCLIPEmbedder
from ..latent_diffusion import LatentDiffusion


class AttentionMaps:
    """The attention weights of one drawing, by step and layer. A second drawing in the same `with` replaces the first.

    With plms and heun, which call the UNet more than once in a step, "step" means a call of the UNet.
    """

    def __init__(self):
        self.timesteps: list[int] = []  # t of each call of the UNet
        self.prompts: list[list[str]] = []  # for each picture, the tokens of its prompt
        self.guided = False  # whether the batch was [unconditional, conditional], as in classifier-free guidance
        # For each call {layer: (weights [b n m] or [b heads n m], (height, width) of the map with these n pixels)}.
        self._calls: list[dict[str, tuple[Tensor, tuple[int, int]]]] = []

    @property
    def tokens(self) -> list[str]:
        """The tokens of the first picture's prompt: "<start>", words or pieces of words, "<end>", then "<pad>"."""
        if not self.prompts:
            raise ValueError("the prompt was not encoded inside the `with`, so its tokens are unknown: draw inside it")
        return self.prompts[0]

    @property
    def layers(self) -> list[str]:
        """The names of the layers, as in the checkpoint, in the order of the UNet's forward pass."""
        return list(self._calls[0]) if self._calls else []

    def raw(self, step: int, layer: str) -> Float[Tensor, "b n m"] | Float[Tensor, "b heads n m"]:
        """All weights of a layer in one call: of n pixels for m tokens (in attn1, self-attention, for m = n pixels)."""
        return self._calls[step][layer][0]

    def at(
        self,
        step: int | None = None,
        layer: str | None = None,
        token: int | str | None = None,
        picture: int = 0,
        head: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "h w"] | Float[Tensor, "m h w"]:
        """How much each pixel attends to a token, in [0, 1].

        Args:
            step: which call of the UNet; negative numbers count from the end. None: the mean over all calls.
            layer: the name of a layer, or the beginning of several names ("output_blocks"), which gives their mean.
                None: the mean over all layers.
            token: its position, from 0, or its name in `tokens`. If a word has several tokens or occurs several times,
                their weights are added. None: all tokens, [m h w].
            picture: which picture of the batch.
            head: which head, if the heads were recorded separately. None: the mean over heads.
            size: (height, width) to which the maps are enlarged (nearest neighbour). None: that of the finest layer.

        Raises:
            ValueError: there is no such step, layer, token or picture.
        """
        names = [name for name in self.layers if name.startswith(layer or "") and name.endswith("attn2")]
        if not names:
            known = ", ".join(self.layers) or "none"
            raise ValueError(f"no cross-attention was recorded in a layer {layer!r}; there are: {known}")
        if step is not None and not -len(self._calls) <= step < len(self._calls):
            raise ValueError(f"there is no step {step}: {len(self._calls)} calls of the UNet were recorded")
        size = size or max(self._calls[0][name][1] for name in names)

        maps = []
        for call in self._calls if step is None else [self._calls[step]]:
            for name in names:
                weights, grid = call[name]
                if not 0 <= picture < len(weights):
                    raise ValueError(f"there is no picture {picture}: {len(weights)} were drawn, counted from 0")
                one = weights[picture]
                if one.ndim == 3:  # [heads n m]
                    one = one.mean(0) if head is None else one[head]
                elif head is not None:
                    raise ValueError("the heads were averaged: record_attention(sd, by_head=True) keeps them apart")
                one = one.T.unflatten(1, grid)  # [n m] -> [m h w]
                maps.append(F.interpolate(one[None], size, mode="nearest")[0])
        mean = torch.stack(maps).mean(0)
        return mean if token is None else mean[self._places(token, picture, len(mean))].sum(0)

    def _places(self, token: int | str, picture: int, count: int) -> list[int]:
        """The positions of a word or token in the prompt; for a word of several tokens, those of all its tokens."""
        if isinstance(token, int):
            if not -count <= token < count:
                raise ValueError(f"there is no token {token}: the context has {count}")
            return [token]
        tokens = self.prompts[picture] if self.tokens else []
        spans = [(i, j) for i in range(count) for j in range(i + 1, count + 1) if "".join(tokens[i:j]) == token.lower()]
        if not spans:
            raise ValueError(f"{token!r} is not in the prompt, whose tokens are {' '.join(tokens)}")
        return [place for i, j in spans for place in range(i, j)]


@contextmanager
def record_attention(
    sd: LatentDiffusion, self_attention: bool = False, by_head: bool = False
) -> Iterator[AttentionMaps]:
    """Record the attention weights of the UNet's transformers while pictures are drawn inside the `with`.

    Drawing is a little slower. The fused attention kernel does not store the weights, so a plain softmax is used in its
    place; the picture differs only by rounding. The weights are stored on the CPU: in Stable Diffusion v1, 8 MB for
    each step of a guided picture. What other threads draw is not recorded.

    self_attention: also record attn1, where pixels attend to pixels: `maps.raw(step, layer)`, [b n n].
    by_head: record each head, instead of their mean.

    Raises:
        ValueError: the model has no text encoder.
    """
    embedder, unet = sd.cond_stage_model, sd.model.diffusion_model
    watched = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, CrossAttention) and name.endswith(("attn1", "attn2") if self_attention else "attn2")
    }
    if not isinstance(embedder, FrozenCLIPEmbedder) or not watched:
        raise ValueError("this model reads no words, so there is no attention to them that could be recorded")

    maps, thread = AttentionMaps(), get_ident()
    encoded: list[tuple[Tensor, Tensor]] = []  # batches of prompts: their ids, and the context that was made of them
    transformers = {module for module in unet.modules() if isinstance(module, SpatialTransformer)}
    grid = [(0, 0)]  # height and width of the input of the SpatialTransformer that is running

    def after_any_module(module: nn.Module, args: tuple, output: object) -> None:
        if module is embedder.transformer and get_ident() == thread:
            encoded.append((args[0].tolist(), output))

    def before_any_module(module: nn.Module, args: tuple) -> None:
        if module is unet and get_ident() == thread:
            begin_call(*args)
        elif module in transformers and get_ident() == thread:
            grid[0] = tuple(args[0].shape[-2:])

    def begin_call(x: Tensor, timesteps: Tensor, context: Tensor) -> None:
        # If this context was made since the last call, a new drawing has begun. Another model may have the same text
        # encoder, so not everything that was encoded is for this one. With guidance, the batch holds the context of the
        # negative prompts first, and then that of the prompts.
        begun = [ids for ids, made in encoded if torch.equal(made[0].to(context), context[-len(ids)])]
        if begun:
            encoded.clear()
            maps.__init__()
            maps.prompts = [_readable(embedder.tokenizer.pieces(ids)) for ids in begun[0]]
            maps.guided = len(x) == 2 * len(begun[0])
        maps.timesteps.append(int(timesteps[0]))
        maps._calls.append({})

    def keep(name: str, weights: Tensor) -> Tensor:
        # With guidance, the batch holds each picture twice, and the half with the empty prompt comes first.
        seen = (weights[len(weights) // 2 :] if maps.guided else weights).detach().float()
        maps._calls[-1][name] = (seen if by_head else seen.mean(1)).cpu(), grid[0]
        return weights

    with ExitStack() as restore:
        # The hooks are not in the modules of this model, because a copy of the model would have them, too.
        restore.enter_context(register_module_forward_hook(after_any_module))
        restore.enter_context(register_module_forward_pre_hook(before_any_module))
        recorders, recorder = RECORDING.recorders, {layer: partial(keep, name) for name, layer in watched.items()}
        recorders.append(recorder)
        restore.callback(recorders.remove, recorder)
        yield maps


def _readable(pieces: list[str]) -> list[str]:
    """CLIP's tokens in readable form. Padding uses the end token too; only the first one ends the prompt."""
    readable = ["<start>" if p == START else "<end>" if p == END else p.removesuffix("</w>") for p in pieces]
    end = readable.index("<end>")
    return readable[: end + 1] + ["<pad>"] * (len(readable) - end - 1)
