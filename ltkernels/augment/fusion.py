"""OFA: what is specific to a tail sample fused with what is generic in a sample of a confusing head class.

Chu et al. 2020, "Feature Space Augmentation for Long-Tailed Data" (arXiv:2008.03673). No code of the authors is public;
the choices that the text leaves open are named parameters, and what the reimplementation gets wrong is right
here: every fused sample carries the label of its own tail sample, and head samples come from head classes only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ltkernels import _checks
from ltkernels.augment import _draws
from ltkernels.augment._draws import Generator

POOLINGS = ("kept", "average", "none")


def class_activation_maps(maps: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """(n, h, w): where the evidence for a class lies, in [0, 1].

    `maps` (n, c, h, w) are the last feature maps, `weight` (C, c) the rows of a linear classifier on their average,
    `classes` (n,) int64. ReLU of the weighted sum of channels, scaled by its own minimum and maximum: for such a
    classifier, this is Grad-CAM. A constant map says nothing about place and gives 0 everywhere. Raises TypeError or ValueError naming
    the argument.
    """
    _check_maps(maps, classes, weight, "maps", "classes")
    cam = torch.einsum("nc,nchw->nhw", weight[classes].to(maps.dtype), maps).relu()
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return (cam - low) / torch.where(high > low, high - low, 1.0)


def confusing_classes(
    logits: Tensor, labels: Tensor, tail_class: int, head_classes: Sequence[int], k: int = 3
) -> list[int]:
    """The `k` head classes that get the highest mean probability on the samples of `tail_class`, highest first.

    `logits` (n, C) and `labels` (n,) of the same samples. Ties go to the class listed first; the tail class itself is
    never chosen; fewer than k head classes give all of them. Raises TypeError or ValueError naming the argument.
    """
    _draws.check_floating(logits, "logits")
    _draws.check_labels(labels, len(logits), "labels")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    candidates = [c for c in head_classes if c != tail_class]
    if not candidates:
        raise ValueError("head_classes must hold a class other than tail_class")
    mean = logits[_draws.members(labels, tail_class)].double().softmax(1).mean(0)
    order = mean[candidates].argsort(descending=True, stable=True).tolist()
    return [candidates[i] for i in order[:k]]


def fuse(
    tail_maps: Tensor,
    tail_labels: Tensor,
    head_maps: Tensor,
    head_labels: Tensor,
    weight: Tensor,
    *,
    tail_threshold: float = 0.8,
    head_threshold: float = 0.2,
    generator: Generator = None,
) -> tuple[Tensor, Tensor]:
    """Fuse pairs of feature maps; the label of row i is tail_labels[i]. The form for training batches.

    A place is specific to the tail sample where its activation map exceeds `tail_threshold`, generic in the head sample
    where that one's map lies below `head_threshold`. With gamma ~ U(0, 1) for each row and u ~ U(0, 1) for each place,
    the fused map takes the tail's specific features where u > gamma and the head's generic ones elsewhere; a place that
    gets neither is 0. The place of the tail's highest activation is always taken from the tail: without it a sample
    could carry the label and nothing of the class. Where a map is constant (a single place, say), all of it is taken
    as specific, or generic.

    Args:
        tail_maps, head_maps: (n, c, h, w) floating. tail_labels, head_labels: (n,) int64.
        weight: (C, c) of the linear classifier behind the average pooling.
        generator: of any device; None is the global CPU generator.

    Returns:
        Fused maps (n, c, h, w), and kept (n, h, w) bool: the places that are not 0. Raises ValueError naming the argument.
    """
    _check_maps(tail_maps, tail_labels, weight, "tail_maps")
    _check_maps(head_maps, head_labels, weight, "head_maps")
    if head_maps.shape != tail_maps.shape:
        raise ValueError(f"head_maps has shape {tuple(head_maps.shape)}, tail_maps {tuple(tail_maps.shape)}")
    tail_threshold = _checks.number("tail_threshold", tail_threshold, low=0.0)
    if tail_threshold >= 1:
        raise ValueError(f"tail_threshold is {tail_threshold}; it must be below 1")
    head_threshold = _checks.number("head_threshold", head_threshold, above=0.0)
    n, _, h, w = tail_maps.shape
    tail_cam = class_activation_maps(tail_maps, weight, tail_labels).flatten(1)
    head_cam = class_activation_maps(head_maps, weight, head_labels).flatten(1)
    specific = (tail_cam > tail_threshold) | (tail_cam.amax(1, keepdim=True) == 0)
    generic = head_cam < head_threshold
    gamma = _draws.uniform(n, generator).to(tail_maps.device)[:, None]
    from_tail = _draws.uniform(n * h * w, generator).to(tail_maps.device).view(n, h * w) > gamma
    peak = tail_cam.argmax(1, keepdim=True)
    from_tail = from_tail.scatter(1, peak, True)  # at its peak a map is 1 or constant, hence specific
    take_tail, take_head = (from_tail & specific).view(n, 1, h, w), (~from_tail & generic).view(n, 1, h, w)
    fused = torch.where(take_tail, tail_maps, torch.where(take_head, head_maps, 0.0))
    return fused, (take_tail | take_head)[:, 0]


def pooled(fused: Tensor, kept: Tensor, pool: str) -> Tensor:
    """(n, c) from fused maps: the mean over all places ("average"), over the kept ones ("kept"); "none" leaves the maps."""
    if pool == "none":
        return fused
    if pool == "average":
        return fused.mean((2, 3))
    return fused.sum((2, 3)) / kept.sum((1, 2)).to(fused.dtype)[:, None]


def ofa(
    maps: Tensor,
    labels: Tensor,
    tail_class: int,
    n: int,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    head_classes: Sequence[int],
    num_confusing: int = 3,
    tail_threshold: float = 0.8,
    head_threshold: float = 0.2,
    pool: str = "kept",
    generator: Generator = None,
) -> Tensor:
    """`n` fused features of `tail_class`, from its samples and samples of its confusing head classes: the offline form.

    Tail samples come in whole rounds, so that each is used equally often; each is fused with a random sample of the
    `num_confusing` head classes that `confusing_classes` gives. See `fuse` for the fusion.

    Args:
        maps: (m, c, h, w) floating, the last feature maps of the training samples; labels: (m,) int64.
        weight: (C, c), bias: (C,) or None: the linear classifier behind the average pooling.
        head_classes: the classes that may lend their generic features.
        pool: how maps become vectors. "kept" (default) averages over the places that were kept, so that vectors have the
            scale of real ones; "average" over all places; "none" returns the maps (n, c, h, w).
        generator: of any device; None is the global CPU generator.

    Returns:
        (n, c) in the dtype of `maps`. Raises TypeError or ValueError naming the argument.
    """
    _check_maps(maps, labels, weight, "maps")
    if pool not in POOLINGS:
        raise ValueError(f"pool is {pool!r}; it must be one of {', '.join(POOLINGS)}")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    own = _draws.members(labels, tail_class)
    logits = torch.nn.functional.linear(maps[own].mean((2, 3)), weight.to(maps.dtype), bias)
    chosen = confusing_classes(logits, labels[own], tail_class, head_classes, num_confusing)
    others = torch.isin(labels, torch.tensor(chosen, device=labels.device)).nonzero().flatten()
    if len(others) == 0:
        raise ValueError(f"labels holds no sample of the head classes {', '.join(map(str, chosen))}")
    tail = own[_draws.spread(n, len(own), generator).to(labels.device)]
    head = others[_draws.integers(len(others), n, generator).to(labels.device)]
    thresholds = {"tail_threshold": tail_threshold, "head_threshold": head_threshold}
    fused, kept = fuse(maps[tail], labels[tail], maps[head], labels[head], weight, generator=generator, **thresholds)
    return pooled(fused, kept, pool)


def _check_maps(maps: Tensor, labels: Tensor, weight: Tensor, name: str, labels_name: str = "") -> None:
    _draws.check_floating(maps, name)
    if maps.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; it must be (n, channels, height, width)")
    _draws.check_labels(labels, len(maps), labels_name or f"{name.removesuffix('maps')}labels")
    _draws.check_floating(weight, "weight")
    if weight.dim() != 2 or weight.shape[1] != maps.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; {name} with {maps.shape[1]} channels need (C, {maps.shape[1]})"
        )
