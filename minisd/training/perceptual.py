"""Do two pictures look alike? The distance between the activations of a network that was trained to recognise things.

A mean error compares pixel by pixel: a sharp edge that is off by one pixel costs more than no edge at all. The maps of
a network that recognises things say what is where, and how sharp it is. Zhang et al. 2018 (arXiv:1801.03924) found that
this distance agrees with people's judgement, and called the best form of it LPIPS:

    d(x, x̂) = Σ_l mean over places of Σ_c w_lc (f_lc(x) - f_lc(x̂))²            (f_l: map of layer l, of unit length)

(Their eq. 1 has w within the square; the weights that they published are these w.) `CLIPPerceptual` is that distance
in minisd's own image tower, with equal w, because no people have judged it. `LPIPS` is the published one, which CompVis
trains with; it needs two files of weights.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoint import load_weights, read_weights
from ..clip import CLIPModel


class CLIPPerceptual(nn.Module):
    """The distance in the image tower of a CLIP that minisd trained: between 0 and 4, mostly far below 1.

    It compares the tokens of the patches in each layer; the class token belongs to no place. The last layer is left
    out, because CLIP reads only the class token there, so its patch tokens were never trained. The tower is frozen.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.vision_model = clip.vision_model.eval().requires_grad_(False)
        self.image_size = clip.vision_config.image_size

    def forward(self, x: Float[Tensor, "b 3 H W"], x_hat: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b"]:
        """Pictures in [-1, 1], as the tower was trained on, of any size → a distance for each pair."""
        with torch.no_grad():  # the picture is given; only the reconstruction is to change
            wanted = self.features(x)
        pairs = zip(wanted, self.features(x_hat), strict=True)
        # Between vectors of unit length, ‖a - b‖² is between 0 and 4: twice one minus their cosine.
        return torch.stack([(a - b).square().sum(dim=-1).mean(dim=1) for a, b in pairs]).mean(dim=0)

    def features(self, x: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b n d"]]:
        """The tokens of the patches, of unit length: as they go in, and after each layer but the last."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        tokens = self.vision_model.pre_layrnorm(self.vision_model.embeddings(x))
        states = [tokens]
        for layer in self.vision_model.encoder.layers[:-1]:
            states.append(layer(states[-1]))
        return [F.normalize(state[:, 1:].float(), dim=-1) for state in states]


class LPIPS(nn.Module):
    """The published distance: VGG16 that was trained on ImageNet, and weights w learned from people's judgements.

    minisd does not contain the networks. If you have the two files, torchvision's VGG16 (`vgg16-….pth`) and the weights
    w of LPIPS version 0.1 (`vgg.pth`), `from_files` reads them. CompVis taming-transformers `lpips.py: LPIPS`.
    """

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG16: so many convolutions to so many channels

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width, count in self.STAGES:
            for _ in range(count):
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)  # numbered as in torchvision
        self.lin = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width, _ in self.STAGES)
        # From [-1, 1] to what VGG was trained on: colours in [0, 1], minus ImageNet's mean, over its deviation.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_files(cls, vgg: str | Path, lin: str | Path) -> "LPIPS":
        """Read VGG16's weights (`features.…` of torchvision's file) and LPIPS' own (`lin0.model.1.weight`, …).

        Raises:
            FileNotFoundError, CheckpointError: a file is missing, or holds other weights; nothing has been loaded.
        """
        lpips, vgg, lin = cls(), Path(vgg), Path(lin)
        state = {name: tensor for name, tensor in read_weights(vgg).items() if name.startswith("features.")}
        for name, tensor in read_weights(lin).items():
            state[name.replace(".model.1.", ".").replace("lin", "lin.", 1)] = tensor
        load_weights(lpips, state, f"{vgg} and {lin}")
        return lpips

    def forward(self, x: Float[Tensor, "b 3 H W"], x_hat: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b"]:
        """Pictures in [-1, 1], of 16 pixels at least → a distance for each pair."""
        with torch.no_grad():
            wanted = self.maps(x)
        pairs = zip(self.lin, wanted, self.maps(x_hat), strict=True)
        return sum((lin.weight * (a - b).square()).sum(dim=1).mean(dim=(1, 2)) for lin, a, b in pairs)

    def maps(self, x: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b c h w"]]:
        """What each stage ends with, before it is halved; of unit length at each place."""
        h, maps = (x - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):  # each stage ends with one
                maps.append(F.normalize(h.float(), dim=1, eps=1e-10))
            h = layer(h)
        return maps
