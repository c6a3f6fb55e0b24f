"""Random draws and argument checks that the augmentations share.

Everything is drawn on the device of the generator and moved: one CPU generator gives the same draws on every device, a
generator of the accelerator gives them without a transfer. None means torch's global CPU generator. Nothing here reads
a tensor's content, so no call waits for the device.
"""

import math

import torch
from torch import Tensor

from ltkernels import _checks

Generator = torch.Generator | None


def device_of(generator: Generator) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def uniform(n: int, generator: Generator) -> Tensor:
    """(n,) float64 in [0, 1)."""
    return torch.rand(n, dtype=torch.float64, generator=generator, device=device_of(generator))


def integers(high: int, n: int, generator: Generator) -> Tensor:
    """(n,) int64 in [0, high)."""
    return torch.randint(high, (n,), generator=generator, device=device_of(generator))


def permutation(n: int, generator: Generator) -> Tensor:
    """(n,) int64."""
    return torch.randperm(n, generator=generator, device=device_of(generator))


def spread(n: int, size: int, generator: Generator) -> Tensor:
    """(n,) int64 in [0, size): whole permutations one after the other, so that no index comes twice more than another."""
    rounds = [permutation(size, generator) for _ in range(-(-n // size))]
    return torch.cat(rounds)[:n]


def beta(alpha: float, n: int, generator: Generator) -> Tensor:
    """(n,) float64 from Beta(alpha, alpha), from uniform draws alone (torch's own sampler takes no generator).

    Beta(a, a) for a > 1/2 is (1 + sqrt(1 - u^(2 / (2a - 1))) cos(2 pi v)) / 2 (Ulrich 1984). A Gamma(a) variable is a
    Gamma(a + 1) times u^(1/a), so that logit Beta(a, a) = logit Beta(a + 1, a + 1) + (log u - log v) / a.
    """
    alpha = _checks.number("alpha", alpha, above=0.0)
    if alpha == 1.0:
        return uniform(n, generator)
    u, v, left, right = (uniform(n, generator) for _ in range(4))
    cosine = torch.cos(2 * math.pi * v) * torch.sqrt(1 - u ** (2 / (2 * alpha + 1)))
    # 1 - u lies in (0, 1]: its logarithm is finite.
    boost = (torch.log1p(-left) - torch.log1p(-right)) / alpha
    return torch.sigmoid(torch.log1p(cosine) - torch.log1p(-cosine) + boost)


def check_images(images: Tensor, name: str = "images") -> None:
    """(n, ..., height, width) with at least one sample."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} is {type(images).__name__}; it must be a tensor")
    if images.dim() < 3 or images.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; it must be (n, ..., height, width), none of them 0")


def check_floating(samples: Tensor, name: str) -> None:
    """(n, ...) floating with at least one sample."""
    if not isinstance(samples, Tensor):
        raise TypeError(f"{name} is {type(samples).__name__}; it must be a tensor")
    if not samples.is_floating_point():
        raise TypeError(f"{name} has dtype {samples.dtype}; it must be floating")
    if samples.dim() < 2 or len(samples) == 0:
        raise ValueError(f"{name} has shape {tuple(samples.shape)}; it must be (n, ...) with n >= 1")


def check_labels(labels: Tensor, n: int, name: str) -> None:
    """(n,) int64."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is {type(labels).__name__}; it must be a tensor")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {labels.dtype}; it must be int64")
    if labels.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; it must be ({n},)")


def members(labels: Tensor, label: int, name: str = "labels") -> Tensor:
    """Indices of the samples of a class; ValueError where there are none."""
    rows = (labels == label).nonzero().flatten()
    if len(rows) == 0:
        raise ValueError(f"{name} holds no sample of class {label}")
    return rows
