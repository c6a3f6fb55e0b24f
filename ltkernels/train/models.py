"""Models: a backbone that turns a sample into a feature vector, and a classifier on top, kept apart.

A new backbone is one function in `BACKBONES`. It takes `input_shape` (the shape of one sample) and gives a module that maps
(n, *input_shape) to features (n, d). Those of other libraries and of users are in `backbones.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels.nn import CosineLinear

# A loss that is defined on plain logits cannot separate classes with cosines in [-1, 1] (its smallest possible value at
# C = 10 is 1.4 nats): under such a loss the cosine head's logits are multiplied by this. Losses that are defined on
# cosines bring their own scale.
COSINE_TEMPERATURE = 16.0


class ScaledCosineLinear(CosineLinear):
    """A cosine head for losses defined on plain logits: cosines times `scale`."""

    def __init__(self, in_features: int, num_classes: int, scale: float = COSINE_TEMPERATURE) -> None:
        super().__init__(in_features, num_classes)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * super().forward(features)


class Shifted(nn.Module):
    """A head with a constant added to its logits: post-hoc logit adjustment as part of the model."""

    def __init__(self, head: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("shift", shift)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features) + self.shift


@dataclass(frozen=True)
class HeadSpec:
    """What a classifier's head is: `kind` linear or cosine, for a loss defined on `logits` (linear or cosine); `scale` multiplies
    cosines under a loss on linear logits."""

    kind: str
    logits: str
    shifted: bool = False
    scale: float = COSINE_TEMPERATURE

    @classmethod
    def of(cls, head: nn.Module) -> "HeadSpec":
        """What a head was built as."""
        if isinstance(head, Shifted):
            return replace(cls.of(head.head), shifted=True)
        if isinstance(head, ScaledCosineLinear):
            return cls("cosine", "linear", scale=head.scale)
        kind = "cosine" if isinstance(head, CosineLinear) else "linear"
        return cls(kind, kind)

    def build(self, in_features: int, num_classes: int, seed: int) -> nn.Module:
        """The head, initialised from `seed`; a shift begins at 0.

        Raises ValueError for a linear head under a loss that is defined on cosines: its margins would have no meaning.
        """
        if self.kind != "cosine" and self.logits == "cosine":
            raise ValueError("head linear does not fit: the loss is defined on cosine logits; use head cosine")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.kind != "cosine":
                head: nn.Module = nn.Linear(in_features, num_classes)
            elif self.logits == "cosine":
                head = CosineLinear(in_features, num_classes)
            else:
                head = ScaledCosineLinear(in_features, num_classes, self.scale)
        return Shifted(head, torch.zeros(num_classes)) if self.shifted else head


class Classifier(nn.Module):
    """`head(backbone(x))`; `backbone` gives the features that the selection works on."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def _images(name: str, input_shape: tuple[int, ...]) -> int:
    """The number of channels; ValueError where samples are not images."""
    if len(input_shape) != 3:
        raise ValueError(f"model {name} needs images (channels, height, width), the data has samples of {input_shape}")
    return input_shape[0]


def mlp(input_shape: tuple[int, ...]) -> nn.Module:
    """Two hidden layers of 128 and 64 units for any sample shape; 64 features."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())


class Wide(nn.Module):
    """`mlp` beside the samples themselves (Cheng et al. 2016, wide and deep): 64 + size features. The head sees what a linear
    model sees, which on tables is often all there is, and the two layers add what it cannot."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.deep = mlp(input_shape)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), self.deep(x)], 1)


def cnn(input_shape: tuple[int, ...]) -> nn.Module:
    """Three 3x3 convolutions with batch norm and pooling; 64 features. For small images.

    32, 64, 64 channels below 16 pixels, else 16, 32, 64 with a pooling more: the first layers of 28x28 images cost most.
    """
    channels = _images("cnn", input_shape)
    (first, second), pool = ((16, 32), 2) if min(input_shape[1:]) >= 16 else ((32, 64), 1)
    return nn.Sequential(
        *(nn.Conv2d(channels, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(pool)),
        *(nn.Conv2d(first, second, 3, padding=1, bias=False), nn.BatchNorm2d(second), nn.ReLU()),
        nn.MaxPool2d(2, ceil_mode=True),
        *(nn.Conv2d(second, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and the parameter-free shortcut (option A): subsample by 2, pad new channels with zeros."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.pad = (channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


def resnet32(input_shape: tuple[int, ...]) -> nn.Module:
    """The CIFAR ResNet-32 of He et al. 2016: 3 stages of 5 blocks, 16/32/64 channels, option-A shortcuts; 64 features.

    With a linear head for 10 classes on RGB images it has 464 154 parameters, with a cosine head 464 144.
    """
    channels = _images("resnet32", input_shape)
    widths = [16] * 6 + [32] * 5 + [64] * 5
    backbone = nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(_BasicBlock(a, b) for a, b in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return backbone


BACKBONES: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "cnn": cnn,
    "mlp": mlp,
    "wide": Wide,
    "resnet32": resnet32,
}


def block_depths(backbone: nn.Module) -> dict[nn.Parameter, int]:
    """How far below the top each parameter lies, in blocks: 0 behind the last block, 1 in it, L + 1 before the first of L.

    Blocks are what a backbone repeats: the parts of one class in an nn.Sequential or nn.ModuleList, the outermost such. Layer-wise
    decay of the rate (Clark et al. 2020; Bao et al. 2022) takes these numbers. Raises ValueError for a backbone without blocks.
    """
    blocks = _blocks(backbone)
    if not blocks:
        raise ValueError(
            "layer_decay needs a backbone of blocks: parts of one class in an nn.Sequential or nn.ModuleList"
        )
    place = {parameter: i for i, block in enumerate(blocks, 1) for parameter in block.parameters()}
    depths, at = {}, 0
    for parameter in backbone.parameters():
        # What lies between two blocks goes with the first.
        outside = parameter not in place
        at = place.get(parameter, at)
        depths[parameter] = 0 if outside and at == len(blocks) else len(blocks) + 1 - at
    return depths


def _blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential | nn.ModuleList):
        parts = [part for part in module if any(True for _ in part.children()) and any(True for _ in part.parameters())]
        if len(parts) > len({type(part) for part in parts}):
            return parts
    return [block for child in module.children() for block in _blocks(child)]


def feature_maps(backbone: nn.Module) -> nn.Module:
    """The part of a backbone before its global average pooling: (n, channels, height, width) maps whose means are the
    features, as `ltkernels.augment.ofa` takes them. It shares the backbone's weights. Raises ValueError for a backbone
    that is no nn.Sequential ending in average pooling to one place and flattening."""
    layers = list(backbone) if isinstance(backbone, nn.Sequential) else []
    pools = len(layers) > 2 and isinstance(layers[-2], nn.AdaptiveAvgPool2d) and layers[-2].output_size in (1, (1, 1))
    if not (pools and isinstance(layers[-1], nn.Flatten)):
        raise ValueError("the backbone must be an nn.Sequential that ends in global average pooling and flattening")
    return nn.Sequential(*layers[:-2]).train(backbone.training)
