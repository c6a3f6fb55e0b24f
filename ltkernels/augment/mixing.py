"""Mixing in image space, a batch at a time: mixup, CutMix, Remix, CMO.

Each returns the mixed images and a target ``(y_a, y_b, lam)`` that every loss of this library takes as it is: the loss
is ``lam * L(y_a) + (1 - lam) * L(y_b)``. No call waits for the device.

`alpha` is the parameter of Beta(alpha, alpha). With `per_row` (the default) each row has its own share and box; with
``per_row=False`` the batch has one, as in the papers' code. `generator` may live on any device; a CPU generator (None:
the global one) gives the same draws wherever the images are.
"""

import torch
from torch import Tensor

from ltkernels import _checks
from ltkernels.augment import _draws
from ltkernels.augment._draws import Generator

Mixed = tuple[Tensor, tuple[Tensor, Tensor, Tensor]]


def _shares(n: int, alpha: float, per_row: bool, generator: Generator) -> Tensor:
    return _draws.beta(alpha, n if per_row else 1, generator).expand(n)


def blend(images: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """lam * images + (1 - lam) * other, with lam (n,)."""
    weight = lam.to(images.dtype).view(-1, *[1] * (images.dim() - 1))
    return torch.lerp(other, images, weight)


def mixup(
    images: Tensor, target: Tensor, *, alpha: float = 1.0, per_row: bool = True, generator: Generator = None
) -> Mixed:
    """Convex combinations of the rows with a random permutation of them (Zhang et al. 2018, arXiv:1710.09412).

    Args:
        images: (n, ...) floating; features do as well.
        target: (n,) int64.
        alpha, per_row, generator: see the module's head.

    Returns:
        The mixed rows, and (target, target of the partners, lam (n,)). Raises TypeError or ValueError naming the argument.
    """
    _draws.check_floating(images, "images")
    _draws.check_labels(target, len(images), "target")
    lam = _shares(len(images), alpha, per_row, generator).to(images.device, _checks.real_dtype(images.dtype))
    partner = _draws.permutation(len(images), generator).to(images.device)
    return blend(images, images[partner], lam), (target, target[partner], lam)


def remix(
    images: Tensor,
    target: Tensor,
    class_counts: _checks.ClassCounts,
    *,
    alpha: float = 1.0,
    kappa: float = 3.0,
    tau: float = 0.5,
    per_row: bool = True,
    generator: Generator = None,
) -> Mixed:
    """mixup whose label goes to the rarer class where the counts differ much (Chou et al. 2020, arXiv:2007.03943).

    With n_i and n_j the counts of a row's class and its partner's, the label's share of the row is 0 where
    n_i / n_j >= kappa and lam < tau, 1 where n_i / n_j <= 1 / kappa and 1 - lam < tau, and lam elsewhere. The images are
    those of `mixup` with the same generator.

    Args:
        images, target, alpha, per_row, generator: as in `mixup`.
        class_counts: (C,) integers; a tensor on the images' device saves a transfer a call.
        kappa: at least 1. tau: in [0, 1].

    Returns:
        As `mixup`. Raises TypeError or ValueError naming the argument.
    """
    kappa, tau = _checks.number("kappa", kappa, low=1.0), _checks.number("tau", tau, low=0.0, high=1.0)
    counts = _counts(class_counts)
    mixed, (first, second, lam) = mixup(images, target, alpha=alpha, per_row=per_row, generator=generator)
    counts = counts.to(images.device, torch.float64)
    ratio = counts[first] / counts[second]
    to_partner = (ratio >= kappa) & (lam < tau)
    to_row = (ratio <= 1 / kappa) & (1 - lam < tau)
    return mixed, (first, second, lam.masked_fill(to_partner, 0.0).masked_fill(to_row, 1.0))


def _counts(class_counts: _checks.ClassCounts) -> Tensor:
    """(C,); a tensor stays where it is and is not read."""
    if not isinstance(class_counts, Tensor):
        return torch.tensor(_checks.count_list(class_counts))
    if class_counts.dim() != 1 or class_counts.is_floating_point():
        raise ValueError(f"class_counts is {class_counts!r}; it must be (C,) integers")
    return class_counts


def boxes(shape: tuple[int, int], share: Tensor, min_area: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random boxes of about `share` (n,) of a (height, width) image: masks (n, height, width) bool, and the exact areas
    (n,) float64 as shares of the image.

    Sides are sqrt(share) of the image's, rounded down but at least a pixel; the centre is uniform over the pixels; what
    sticks out is cut off, as in CutMix. The centre's pixel is always inside, so no box is empty. A box with no more than
    `min_area` of the image left is replaced: sides are those of max(share, min_area), rounded up, and the box is moved
    inside the image.
    """
    height, width = shape
    n, device = len(share), share.device
    places = [torch.floor(_draws.uniform(n, generator).to(device) * size).long() for size in shape]
    root = share.sqrt()
    large = share.clamp_min(min_area).sqrt()
    sides = [torch.floor(root * size).long().clamp_min(1) for size in shape]
    enlarged = [(torch.floor(large * size).long() + 1).clamp_max(size) for size in shape]
    first = [place - side // 2 for place, side in zip(places, sides)]
    last = [(start + side).clamp_max(size) for start, side, size in zip(first, sides, shape)]
    first = [start.clamp_min(0) for start in first]
    if min_area > 0:
        small = (last[0] - first[0]) * (last[1] - first[1]) <= min_area * height * width
        for axis, size in enumerate(shape):
            inside = (places[axis] - enlarged[axis] // 2).clamp_min(0)
            inside = torch.minimum(inside, size - enlarged[axis])
            first[axis] = torch.where(small, inside, first[axis])
            last[axis] = torch.where(small, inside + enlarged[axis], last[axis])
    rows, columns = (
        (start[:, None] <= line) & (line < end[:, None])
        for start, end, line in zip(first, last, (torch.arange(size, device=device) for size in shape))
    )
    area = ((last[0] - first[0]) * (last[1] - first[1])).double() / (height * width)
    return rows[:, :, None] & columns[:, None, :], area


def paste(
    background: Tensor, foreground: Tensor, share: Tensor, min_area: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Boxes of about `share` (n,) of the foreground over the background; the images, and the background's exact share."""
    height, width = background.shape[-2:]
    mask, area = boxes((height, width), share, min_area, generator)
    mask = mask.view(len(mask), *[1] * (background.dim() - 3), *mask.shape[1:])
    # Subtracted in float64: the rounded shares of background and foreground then add up to 1.
    return torch.where(mask, foreground, background), (1 - area).to(_checks.real_dtype(background.dtype))


def _pasted(
    background: Tensor, foreground: Tensor, alpha: float, min_area: float, per_row: bool, generator: Generator
) -> tuple[Tensor, Tensor]:
    n = len(background) if per_row else 1
    share = 1 - _draws.beta(alpha, n, generator).to(background.device)
    images, lam = paste(background, foreground, share, min_area, generator)
    return images, lam.expand(len(background))


def cutmix(
    images: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    min_area: float = 0.0,
    per_row: bool = True,
    generator: Generator = None,
) -> Mixed:
    """A random box of each row is replaced by that of its partner in a permutation (Yun et al. 2019, arXiv:1905.04899).

    Args:
        images: (n, ..., height, width) of any dtype.
        target: (n,) int64.
        alpha, per_row, generator: see the module's head.
        min_area: boxes cover more than this share of the image; 0 (the default) still excludes empty boxes.

    Returns:
        The images, and (target, target of the partners, lam (n,)) with lam exactly 1 - box area / image area after
        clipping. Raises TypeError or ValueError naming the argument.
    """
    _draws.check_images(images)
    _draws.check_labels(target, len(images), "target")
    min_area = _min_area(min_area)
    partner = _draws.permutation(len(images), generator).to(images.device)
    mixed, lam = _pasted(images, images[partner], alpha, min_area, per_row, generator)
    return mixed, (target, target[partner], lam)


def cmo(
    background: Tensor,
    background_target: Tensor,
    foreground: Tensor,
    foreground_target: Tensor,
    *,
    alpha: float = 1.0,
    min_area: float = 0.0,
    per_row: bool = True,
    generator: Generator = None,
) -> Mixed:
    """A random box of a (mostly rare) foreground over a (mostly frequent) background (CMO: Park et al. 2022, arXiv:2112.00412).

    The paper takes the background from the ordinary batches and the foreground from `foreground_indices`, with
    probability 1/2 a batch, not in the first and last three epochs.

    Args:
        background, foreground: (n, ..., height, width), the same shape and dtype.
        background_target, foreground_target: (n,) int64.
        alpha, min_area, per_row, generator: as in `cutmix`; the box is the foreground's part.

    Returns:
        The images, and (background_target, foreground_target, lam (n,)) with lam the background's exact share. Raises
        TypeError or ValueError naming the argument.
    """
    _draws.check_images(background, "background")
    if foreground.shape != background.shape or foreground.dtype != background.dtype:
        raise ValueError(
            f"foreground is {foreground.dtype} {tuple(foreground.shape)}, background {background.dtype} "
            f"{tuple(background.shape)}; they must agree"
        )
    _draws.check_labels(background_target, len(background), "background_target")
    _draws.check_labels(foreground_target, len(foreground), "foreground_target")
    images, lam = _pasted(background, foreground, alpha, _min_area(min_area), per_row, generator)
    return images, (background_target, foreground_target, lam)


def foreground_indices(
    labels: Tensor, class_counts: _checks.ClassCounts, n: int, *, power: float = 1.0, generator: Generator = None
) -> Tensor:
    """CMO's foreground: `n` indices into `labels`, drawn with replacement with weights (1 / n_y)^power.

    power 1 (the paper's default) draws every class equally often; 0 draws samples as they come. `labels` (m,) int64,
    `class_counts` (C,). Returns (n,) int64 on the device of `labels`. Raises ValueError naming the argument.
    """
    _draws.check_labels(labels, len(labels), "labels")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    counts = _counts(class_counts).to(labels.device, torch.float64)
    weights = counts.clamp_min(1.0) ** -_checks.number("power", power, low=0.0)
    weights = weights[labels].to(_draws.device_of(generator))
    return torch.multinomial(weights, n, replacement=True, generator=generator).to(labels.device)


def _min_area(value: float) -> float:
    value = _checks.number("min_area", value, low=0.0)
    if value >= 1:
        raise ValueError(f"min_area is {value}; it must be below 1")
    return value
