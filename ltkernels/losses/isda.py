"""Implicit semantic data augmentation as a wider linear head, and the class variances that it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError, DTypeError


def isda_head(features: Tensor, weight: Tensor, target: Tensor, variance: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Implicit semantic data augmentation (ISDA), Wang et al. 2019 (arXiv:1909.12220), with diagonal covariances, as a linear head of width
    2 D: features and weights whose cross-entropy is ISDA's.

    ISDA adds to the logit of class j ``lam / 2 (w_j - w_y)^T Sigma_y (w_j - w_y)``. Expanded, what depends on j is linear in ``[w_j, w_j *
    w_j]``: with ``[h - lam s_y * w_y, lam / 2 s_y]`` as features (s_y the variances of class y), the logits are ISDA's up to a number of
    the row, which softmax does not see. So no N x C x D tensor is formed, and `ltkernels.functional.linear_adjusted_cross_entropy` does
    not even form the logits; tables, sample weights and everything else of it apply:

        wide, weights = ltk.functional.isda_head(features, weight, target, variances.variance, lam)
        loss = ltk.functional.linear_adjusted_cross_entropy(wide, weights, target, bias=bias)

    The authors let lam rise linearly from 0 to 0.5 over the training.

    Args:
        features: (N, D) float32, float64, bfloat16 or float16.
        weight: (C, D), the classifier, in the features' dtype.
        target: (N,) class indices; a row whose label is outside [0, C) stays as it is, for an `ignore_index`.
        variance: (C, D) of each class' features, or (D,) for all of them, at least 0; `ClassVariances` streams them. A constant.
        lam: strength, at least 0.

    Returns:
        (N, 2 D) features and (C, 2 D) weights in the features' dtype, differentiable in features and weight.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, a lam out of range.

    Predict with: the logits of features and weight as they are.

    Example:
        >>> features, weight = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
        >>> wide, weights = ltk.functional.isda_head(features, weight, torch.tensor([0]), torch.tensor([0.2, 0.4]), 0.5)
        >>> round(ltk.functional.linear_adjusted_cross_entropy(wide, weights, torch.tensor([0])).item(), 4)
        0.6961
    """
    for name, value in (("features", features), ("weight", weight), ("variance", variance)):
        if not isinstance(value, Tensor) or value.dtype not in _checks.FLOATING:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise DTypeError(f"{name} is {kind}; it must be a float32, float64, bfloat16 or float16 tensor")
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ArgumentError(
            f"features has shape {tuple(features.shape)} and weight {tuple(weight.shape)}; they must be (N, D) and (C, D)"
        )
    if features.dtype != weight.dtype:
        raise DTypeError(f"features has dtype {features.dtype}, weight {weight.dtype}; both must be of one dtype")
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != features.shape[:1]:
        found = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ArgumentError(f"target is {found}; it must hold class indices ({len(features)},)")
    if variance.shape not in (weight.shape, weight.shape[1:]):
        shape = tuple(weight.shape)
        raise ArgumentError(f"variance has shape {tuple(variance.shape)}; it must be {shape} or {shape[1:]}")
    lam = _checks.number("lam", lam, low=0.0)
    valid = (target >= 0) & (target < len(weight))
    labels = target.long().where(valid, 0)
    real = _checks.real_dtype(features.dtype)
    spread = variance.detach().to(real)
    spread = spread[labels] if spread.dim() == 2 else spread.expand(len(labels), -1)
    spread = lam * spread.where(valid.unsqueeze(1), 0.0)
    w = weight.to(real)
    wide = torch.cat([features.to(real) - spread * w[labels], spread / 2], dim=1)
    return wide.to(features.dtype), torch.cat([w, w * w], dim=1).to(weight.dtype)


class ClassVariances(torch.nn.Module):
    """Variances of every class' features, streamed: the diagonal covariances of ISDA, 2 C D numbers of state in buffers.

    Args:
        num_features: D.
        num_classes: C.

    Attributes:
        count, mean, scatter: (C,), (C, D) and (C, D) float64: samples, their mean, sums of squares about it.
        variance: (C, D) float64, what `isda_head` takes.

    Raises:
        TypeError, ValueError: sizes that are no integers above 0; later features and labels as `update`.

    Source: the merge of Chan, Golub & LeVeque (1979); ISDA's own running estimate is the same.

    Example:
        >>> variances = ltk.nn.ClassVariances(2, 3)
        >>> variances.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 1])).variance[1]
        tensor([1., 0.], dtype=torch.float64)
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        classes = _checks.num_classes(num_classes)
        width = _checks.integer("num_features", num_features)
        if width < 1:
            raise ArgumentError(f"num_features is {width}; it must be at least 1")
        self.register_buffer("count", torch.zeros(classes, dtype=torch.float64))
        for name in ("mean", "scatter"):
            self.register_buffer(name, torch.zeros(classes, width, dtype=torch.float64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets all samples; after ``to_empty`` the buffers hold anything."""
        for held in (self.count, self.mean, self.scatter):
            held.zero_()

    @property
    def variance(self) -> Tensor:
        """(C, D) float64, divided by the number of samples; 0 for classes of fewer than two."""
        return self.scatter / self.count.clamp(min=1).unsqueeze(1)

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor) -> ClassVariances:
        """Adds features (n, D) with class indices (n,); those outside [0, C) are left out. Returns self.

        Raises TypeError and ValueError for dtypes and shapes that do not fit, and ValueError for features that are not finite (first
        row named) on the CPU; a refused batch changes nothing."""
        classes, width = self.mean.shape
        if not isinstance(features, Tensor) or features.dtype not in _checks.FLOATING:
            raise DTypeError("features must be a float32, float64, bfloat16 or float16 tensor")
        if features.dim() != 2 or features.shape[1] != width:
            raise ArgumentError(f"features has shape {tuple(features.shape)}; it must be (n, {width})")
        if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != features.shape[:1]:
            raise ArgumentError(f"target must hold class indices ({len(features)},)")
        labels = target.long()  # torch does not compare unsigned integers of more than 8 bits
        valid = (labels >= 0) & (labels < classes)
        labels = labels.where(valid, 0)
        x = features.to(self.mean).where(valid.unsqueeze(1), 0.0)
        if x.is_cpu and not bool(torch.isfinite(x).all()):
            row = int(torch.isfinite(x).all(dim=1).logical_not().nonzero()[0])
            raise ArgumentError(f"features holds NaN or infinity, first in row {row}")
        one = valid.to(x.dtype)
        added = torch.zeros_like(self.count).index_add_(0, labels, one)
        mean = torch.zeros_like(self.mean).index_add_(0, labels, x) / added.clamp(min=1).unsqueeze(1)
        centred = (x - mean[labels]).where(valid.unsqueeze(1), 0.0)
        scatter = torch.zeros_like(self.mean).index_add_(0, labels, centred * centred)
        total = self.count + added
        delta = mean - self.mean
        share = (added / total.clamp(min=1)).unsqueeze(1)
        self.scatter += scatter + delta * delta * (self.count.unsqueeze(1) * share)
        self.mean += delta * share
        self.count.copy_(total)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Module.half() and friends would round the sums: they follow the device only.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
