"""`row_statistics`: what a row of logits says of its label, in one read: loss, margin, correctness, the strongest other class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends, _checks
from .._errors import ArgumentError, DTypeError
from .._watch import direct, is_dtensor, watched
from ._two_phase import IGNORED, adjusted


class RowStatistics(NamedTuple):
    """Per row, without gradient. Ignored rows have 0, False and -1.

    loss: (N,) cross-entropy, float64 for float64 logits and float32 for all others.
    margin: (N,) a_y less the largest other a_j, as the loss; AUM is its mean over epochs, and a row is misclassified where it is negative.
    correct: (N,) bool: the label's logit is the largest, and where others are as large, its class is the lowest of them, as in `argmax`.
    other: (N,) int64, the class of the largest other logit, the lowest of equal ones; -1 where there is none above -inf.
    """

    loss: Tensor
    margin: Tensor
    correct: Tensor
    other: Tensor


@torch.no_grad()
def row_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    ignore_index: int = -100,
) -> RowStatistics:
    """Loss, margin, correctness and strongest other class of every row, in one read of the logits; no gradient flows through it.

    With ``a_j = scale_j z_j + shift_j``: what training dynamics need of a step (area under the margin, Pleiss et al. 2020,
    arXiv:2001.10528; forgetting events), for the loss the network is trained on or, without tables, for its prediction.

    Args:
        logits: (N, C); float32, float64, bfloat16 or float16.
        target: (N,) class ids.
        shift, scale: (C,) tables, as in `adjusted_cross_entropy`.
        ignore_index: label of rows that have no statistics.

    Returns:
        A `RowStatistics`.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels that do not fit.

    Example:
        >>> found = ltk.functional.row_statistics(torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([2]))
        >>> found.margin.item(), found.correct.item(), found.other.item()
        (-1.5, False, 0)
    """
    _checks.logits(logits)
    if type(logits) is not Tensor and is_dtensor(logits):
        raise DTypeError("logits is a DTensor; give a plain tensor, such as its to_local()")
    if logits.dim() != 2:
        raise ArgumentError(f"logits has shape {tuple(logits.shape)}; it must be (N, C)")
    if _checks.target(target, logits):
        raise DTypeError("target holds class probabilities; row_statistics takes class indices")
    real, classes = _checks.real_dtype(logits.dtype), logits.shape[1]
    shift = None if shift is None else _checks.table("shift", shift, classes, logits.device, real)
    scale = None if scale is None else _checks.table("scale", scale, classes, logits.device, real)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    target = target.to(torch.int64)
    valid = target != ignore_index
    if not watched() and target.is_cpu:
        bad = valid & ((target < 0) | (target >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise _backends.bad_label("target", int(target[row]), row, classes, ignore_index)
    return _found(logits, target, valid, shift, scale)


def _found(logits: Tensor, target: Tensor, valid: Tensor, shift: Tensor | None, scale: Tensor | None) -> RowStatistics:
    real = _checks.real_dtype(logits.dtype)
    labels = torch.where(valid, target, IGNORED)
    ones = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    logits = logits if logits.shape[1] < 2 or logits.stride(1) == 1 else logits.contiguous()
    part = _backends.ClassPart(logits, labels, ones, shift, scale, None)
    kernel = logits.is_cpu and direct((logits, target, shift, scale))
    rows, other = _backends.row_maxima(part) if kernel else _torch_maxima(part)
    highest, others, own, _ = rows.unbind(1)
    # log(1 + sum of exp(a_j - a_y)), from the larger of both.
    top = torch.maximum(highest, own)
    below = torch.where(highest == top, 0, highest - top)
    loss = torch.log(others * torch.exp(below) + torch.exp(own - top)) - (own - top)
    margin = own - highest
    correct = (margin > 0) | ((margin == 0) & (target < other))
    return RowStatistics(
        torch.where(valid, loss, 0).to(real),
        torch.where(valid, margin, 0).to(real),
        valid & correct,
        other,
    )


def _torch_maxima(part: _backends.ClassPart) -> tuple[Tensor, Tensor]:
    """`_backends.row_maxima` in torch's operations."""
    a, labels = adjusted(part), part.labels
    here = labels >= 0
    if a.shape[1] == 0:
        return a.new_zeros(len(a), 4, dtype=torch.float64), torch.full_like(labels, -1)
    at = labels.clamp_min(0)[:, None]
    own = a.gather(1, at)[:, 0]
    outside = a.scatter(1, at, torch.where(here[:, None], -torch.inf, a.gather(1, at)))
    highest, index = outside.max(dim=1)
    usable = torch.where(highest == -torch.inf, 0, highest)
    others = torch.exp(outside - usable[:, None]).sum(dim=1, dtype=torch.float64)
    rows = torch.stack([highest.double(), others, own.double(), torch.zeros_like(others)], dim=1)
    index = torch.where(here & (highest > -torch.inf), index, -1)
    return torch.where(here[:, None], rows, 0), index
