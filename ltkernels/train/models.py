"""Models: a backbone that turns a sample into a feature vector, and a classifier on top, kept apart.

A new backbone is one function in `BACKBONES`; one outside this package is named by its import path. Either takes
`input_shape` (the shape of one sample) and gives a module that maps (n, *input_shape) to features (n, d).
"""

import importlib
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels._names import did_you_mean
from ltkernels.nn import CosineLinear
from ltkernels.train.checkpoint import undump

# A loss that is defined on plain logits cannot separate classes with cosines in [-1, 1] (its smallest possible value at
# C = 10 is 1.4 nats): under such a loss the cosine head's logits are multiplied by this. Losses that are defined on
# cosines bring their own scale.
COSINE_TEMPERATURE = 16.0


class ScaledCosineLinear(CosineLinear):
    """A cosine head for losses defined on plain logits: cosines times `COSINE_TEMPERATURE`."""

    def forward(self, features: Tensor) -> Tensor:
        return COSINE_TEMPERATURE * super().forward(features)


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


def _timm(name: str) -> Callable[[tuple[int, ...]], nn.Module]:
    """A backbone of timm without its classifier; never downloads."""

    def factory(input_shape: tuple[int, ...]) -> nn.Module:
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"model timm:{name} needs the package: pip install timm") from error
        channels = _images(f"timm:{name}", input_shape)
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
        except RuntimeError as error:
            raise ValueError(f"model timm:{name}: {str(error)[:200]}") from error

    return factory


def load_weights(backbone: nn.Module, path: Path) -> None:
    """Load pretrained weights of `backbone` from a .safetensors file or one of `torch.save` (weights alone are read; a
    `state_dict`, `model` or `state` inside it is found). What belongs to a classifier beyond the backbone is left out.

    Raises FileNotFoundError or ValueError naming the file: it lacks a parameter, or holds one of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("a .safetensors file needs the package: pip install safetensors") from error
        try:
            state = load_file(str(path))
        except Exception as error:  # SafetensorError, and whatever a forged header makes it raise
            raise ValueError(f"weights {path}: not a .safetensors file: {str(error)[:200]}") from error
    else:
        state = undump(path.read_bytes(), f"weights {path}")
        state = next(
            (state[key] for key in ("state_dict", "model", "state") if isinstance(state.get(key), dict)), state
        )
    own = backbone.state_dict()
    for prefix in ("module.", "backbone."):
        if not set(own) & set(state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counters]
    if missing:
        raise ValueError(f"weights {path}: lacks {len(missing)} of the backbone's {len(own)} tensors, as {missing[0]}")
    try:
        backbone.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"weights {path}: do not fit the backbone: {reason}") from error


def _factory(name: str) -> Callable[[tuple[int, ...]], nn.Module]:
    if name in BACKBONES:
        return BACKBONES[name]
    module_name, colon, attribute = name.partition(":")
    if module_name == "timm" and attribute:
        return _timm(attribute)
    if not (module_name and colon and attribute):
        raise ValueError(
            f"unknown model {name!r}{did_you_mean(name, BACKBONES)}; known: {', '.join(BACKBONES)}, timm:NAME, or an import path "
            "package.module:Name"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} cannot be imported: {error}") from error
    return factory


def build_backbone(name: str, input_shape: tuple[int, ...], seed: int) -> tuple[nn.Module, int]:
    """The backbone by name, initialised from `seed`, and its number of features d.

    The global random state is left as it was. Raises ValueError for an unknown name (listing the known) or where the
    module does not map (2, *input_shape) to (2, d).
    """
    factory = _factory(name)
    contract = f"model {name!r}: it is called with input_shape={input_shape}, one sample's shape, and gives a Module to features (n, d)"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            backbone = factory(input_shape)
        except TypeError as error:
            raise ValueError(f"{contract}; {error}") from error
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"model {name!r} gave {type(backbone).__name__}, not a torch.nn.Module")
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.zeros(2, *input_shape))
    backbone.train()
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"model {name!r} must map (2, ...) samples to (2, d) features, got {shape}")
    return backbone, features.shape[1]


def feature_maps(backbone: nn.Module) -> nn.Module:
    """The part of a backbone before its global average pooling: (n, channels, height, width) maps whose means are the
    features, as `ltkernels.augment.ofa` takes them. It shares the backbone's weights. Raises ValueError for a backbone
    that is no nn.Sequential ending in average pooling to one place and flattening."""
    layers = list(backbone) if isinstance(backbone, nn.Sequential) else []
    pools = len(layers) > 2 and isinstance(layers[-2], nn.AdaptiveAvgPool2d) and layers[-2].output_size in (1, (1, 1))
    if not (pools and isinstance(layers[-1], nn.Flatten)):
        raise ValueError("the backbone must be an nn.Sequential that ends in global average pooling and flattening")
    return nn.Sequential(*layers[:-2]).train(backbone.training)


def build_head(kind: str, in_features: int, num_classes: int, loss_logits: str, seed: int) -> nn.Module:
    """A `linear` or `cosine` classifier for a loss defined on `linear` or `cosine` logits, initialised from `seed`.

    Raises ValueError for a linear head under a loss that is defined on cosines: its margins would have no meaning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "cosine":
            cosine = CosineLinear if loss_logits == "cosine" else ScaledCosineLinear
            return cosine(in_features, num_classes)
        if loss_logits == "cosine":
            raise ValueError("head linear does not fit: the loss is defined on cosine logits; use head cosine")
        return nn.Linear(in_features, num_classes)
