"""The perceptual distance of two pictures: the difference between the activations of a network for recognition.

A mean error compares pixel by pixel, so a sharp edge that is one pixel off costs more than a blurred one. The feature
maps of a network that was trained to recognise objects describe what is where and how sharp it is. Zhang et al. 2018
(arXiv:1801.03924) found that the distance between such maps agrees well with people's judgement, and called the best
version of it LPIPS:

    d(x, x̂) = Σ_l mean over pixels of Σ_c w_lc (f_lc(x) - f_lc(x̂))²     (f_l: map of layer l, of unit length per pixel)

(Their eq. 1 has w inside the square, but the published weights are the w of this form.) `CLIPPerceptual` is the same
distance in the image tower of minisd's CLIP. Its w are all equal, because there are no human judgements to learn them
from. `LPIPS` is the published distance, which CompVis uses for training; it needs two files of weights.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoint import load_weights, read_weights
from ..clip import CLIPModel


class CLIPPerceptual(nn.Module):
    """The perceptual distance in the image tower of a CLIP trained with minisd: from 0 to 4, usually far below 1.

    It compares the patch tokens after each layer, not the class token, which belongs to no place in the picture. The
    last layer is left out, because CLIP reads only the class token there: its patch tokens get no training signal. The
    tower is frozen.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.vision_model = clip.vision_model.eval().requires_grad_(False)
        self.image_size = clip.vision_config.image_size

    def forward(self, x: Float[Tensor, "b 3 H W"], x_hat: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b"]:
        """Pictures in [-1, 1], the range of the tower's training, of any size → a distance for each pair."""
        with torch.no_grad():  # the picture is a constant; only the reconstruction needs gradients
            wanted = self.features(x)
        pairs = zip(wanted, self.features(x_hat), strict=True)
        # For vectors of unit length, ‖a - b‖² = 2 (1 - cosine), which lies between 0 and 4.
        return torch.stack([(a - b).square().sum(dim=-1).mean(dim=1) for a, b in pairs]).mean(dim=0)

    def features(self, x: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b n d"]]:
        """The patch tokens, scaled to unit length: before the first layer, and after each layer except for the last."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        tokens = self.vision_model.pre_layrnorm(self.vision_model.embeddings(x))
        states = [tokens]
        for layer in self.vision_model.encoder.layers[:-1]:
            states.append(layer(states[-1]))
        return [F.normalize(state[:, 1:].float(), dim=-1) for state in states]


class LPIPS(nn.Module):
    """The published distance: VGG16 trained on ImageNet, and weights w learned from people's judgements.

    minisd does not include the weights. If you have the two files, torchvision's VGG16 (`vgg16-….pth`) and the weights
    w of LPIPS version 0.1 (`vgg.pth`), `from_files` reads them. CompVis taming-transformers `lpips.py: LPIPS`.
    """

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG16: (channels, number of convolutions)

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
        # Converts [-1, 1] to VGG's training input: colours in [0, 1], minus ImageNet's mean, over its standard
        # deviation.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_files(cls, vgg: str | Path, lin: str | Path) -> "LPIPS":
        """Read the weights of VGG16 (`features.…` in torchvision's file) and of LPIPS (`lin0.model.1.weight`, …).

        Raises:
            FileNotFoundError, CheckpointError: a file is missing, or holds other weights.
        """
        lpips, vgg, lin = cls(), Path(vgg), Path(lin)
        state = {name: tensor for name, tensor in read_weights(vgg).items() if name.startswith("features.")}
        for name, tensor in read_weights(lin).items():
            state[name.replace(".model.1.", ".").replace("lin", "lin.", 1)] = tensor
        load_weights(lpips, state, f"{vgg} and {lin}")
        return lpips

    def forward(self, x: Float[Tensor, "b 3 H W"], x_hat: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b"]:
        """Pictures in [-1, 1], at least 16 pixels wide and high → a distance for each pair."""
        with torch.no_grad():
            wanted = self.maps(x)
        pairs = zip(self.lin, wanted, self.maps(x_hat), strict=True)
        return sum((lin.weight * (a - b).square()).sum(dim=1).mean(dim=(1, 2)) for lin, a, b in pairs)

    def maps(self, x: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b c h w"]]:
        """The last map of each stage, before it is halved, scaled to unit length at each pixel."""
        h, maps = (x - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):  # each stage ends with one
                maps.append(F.normalize(h.float(), dim=1, eps=1e-10))
            h = layer(h)
        return maps
