"""LADE: logit adjustment with a regulariser that makes every class' logits a density ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from ..losses import adjusted_cross_entropy
from ._logsumexp import indices, matrix, within
from ._rows import lse


def lader(
    logits: Tensor,
    target: Tensor,
    class_counts: _checks.ClassCounts,
    *,
    lam: float = 0.1,
    importance: str = "class",
    ignore_index: int = -100,
) -> Tensor:
    r"""The regulariser of LADE, Hong et al. 2021 (arXiv:2012.00321), equation 12, in torch's operations.

    .. math::
        -\sum_c \pi_c \left( \mathrm{mean}_{i: y_i = c} z_{ic} - h_c - \lambda h_c^2 \right)

    with h_c the log-mean over all rows of ``e^{z_ic}`` times the importance of the row. It is a log-sum-exp over the rows: the classes are
    the rows of `linear_logsumexp`, and the samples its columns, where the logits themselves are not to be held.

    Args:
        logits: (N, C), without a prior; float32, float64, bfloat16 or float16.
        target: (N,) class ids.
        class_counts: (C,) training samples per class, integers, above 0.
        lam: lambda, at least 0.
        importance: ``"class"``: ``(1/C) / pi_c``, as the authors' code; ``"sample"``: ``(1/C) / pi_{y_i}``, as in the paper. They differ by
            more than a constant through lambda alone.
        ignore_index: label of rows that do not count.

    Returns:
        The regulariser, a number; float64 for float64 logits and float32 for all others. A class without a row has no first term. A batch
        without rows gives 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or counts that do not fit.

    Example:
        >>> round(ltk.functional.lader(torch.zeros(2, 2), torch.tensor([0, 1]), [1, 1]).item(), 4)
        0.0
    """
    matrix("logits", logits)
    counts = _checks.class_counts(class_counts)
    classes = len(counts.n)
    if logits.shape[1] != classes:
        raise ArgumentError(f"logits has {logits.shape[1]} columns; class_counts has {classes} classes")
    if importance not in ("class", "sample"):
        raise ArgumentError(f"importance is {importance!r}; it must be 'class' or 'sample'")
    lam = _checks.number("lam", lam, low=0.0)
    target = indices("target", target, len(logits), logits.device)
    within("target", target, 0, classes, ignore_index)
    z = logits.to(_checks.real_dtype(logits.dtype))
    prior = (counts.n / counts.total).to(z.device, z.dtype)
    valid = target != ignore_index
    label = torch.where(valid, target, 0)
    rows = valid.sum()
    own = torch.where(valid, z.gather(1, label[:, None])[:, 0], 0)
    zeros = torch.zeros(classes, dtype=z.dtype, device=z.device)
    here = zeros.index_add(0, label, valid.to(z.dtype))
    mean = zeros.index_add(0, label, own) / here.clamp_min(1)
    weights = -torch.log(prior * classes)  # log of the importance, by class
    adjusted = z + weights if importance == "class" else z + weights[label][:, None]
    h = lse(adjusted.masked_fill(~valid[:, None], -torch.inf).t()) - torch.log(rows.clamp_min(1).to(z.dtype))
    h = torch.where(rows > 0, h, 0)
    return -(prior * (mean - h - lam * h * h)).sum()


class LADE(torch.nn.Module):
    """LADE, Hong et al. 2021 (arXiv:2012.00321): logit-adjusted cross-entropy plus `alpha` times `ltkernels.functional.lader`.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        alpha: factor of the regulariser (authors: .1 on CIFAR-100-LT, .05 on ImageNet-LT and iNaturalist).
        lam: lambda of the regulariser (authors: .01, .5 and .1).
        importance: as in `ltkernels.functional.lader`.
        ignore_index: label of rows that do not count.

    Shape:
        logits (N, C), target (N,); loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError, ValueError: counts, options, shapes or labels that do not fit.

    Predict with: the logits plus the log of the prior that is expected at test time, which is a constant where that is uniform.

    Example:
        >>> loss = ltk.nn.LADE([6, 3, 1])
        >>> loss(torch.randn(8, 3), torch.arange(8) % 3).shape
        torch.Size([])
    """

    shift: Tensor
    class_counts: Tensor

    if TYPE_CHECKING:

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        alpha: float = 0.1,
        lam: float = 0.01,
        importance: str = "class",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        counts = _checks.class_counts(class_counts)
        if importance not in ("class", "sample"):
            raise ArgumentError(f"importance is {importance!r}; it must be 'class' or 'sample'")
        self.alpha = _checks.number("alpha", alpha, low=0.0)
        self.lam = _checks.number("lam", lam, low=0.0)
        self.importance, self.ignore_index = importance, _checks.integer("ignore_index", ignore_index)
        self.register_buffer("class_counts", torch.tensor(_checks.count_list(class_counts)))
        self.register_buffer("shift", torch.log(counts.n / counts.total).float())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = adjusted_cross_entropy(logits, target, shift=self.shift, ignore_index=self.ignore_index)
        return loss + self.alpha * lader(
            logits,
            target,
            self.class_counts,
            lam=self.lam,
            importance=self.importance,
            ignore_index=self.ignore_index,
        )
