"""The general sigmoid loss in plain torch, for reading: it serves second derivatives, gradients of tables and what has no kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._call import BATCH_MEAN, MEAN, NONE, SUM
from .._checks import real_dtype
from .._fused import Inputs, Outputs


class SigmoidCall(NamedTuple):
    """target: (N,) int64 class indices; or (N, C) uint8 or float32 entries, unit class stride. rebalance: (C,) real. All else as of
    `sigmoid_cross_entropy`."""

    target: Tensor
    rebalance: Tensor | None = None
    rebalance_map: tuple[float, ...] = (0.0, 0.0, 0.0)
    threshold: float = 0.0
    negative_scale: float = 1.0
    focal_gamma: float = 0.0
    ignore_index: int = -100
    reduction: int = MEAN
    statistics: bool = False
    backend: str = "cpu"


def reference(inputs: Inputs, call: SigmoidCall) -> Outputs:
    """The loss and the statistics in plain torch."""
    logits, scale, shift, positive, negative, weight, own = inputs
    assert logits is not None
    z = logits.to(real_dtype(logits.dtype))
    target = call.target
    if target.dim() == 1:
        counts = target != call.ignore_index
        labels = torch.where(counts, target, 0)
        hot = torch.zeros_like(z).scatter(1, labels.unsqueeze(1), 1.0)
        is_positive, is_negative = (hot == 1) & counts.unsqueeze(1), (hot == 0) & counts.unsqueeze(1)
    else:
        is_positive, is_negative = target == 1, target == 0
        counts = ((target != -1) & (target != call.ignore_index)).any(1)
    known = is_positive | is_negative
    a = torch.where(known, z, 0)  # whatever an ignored entry is
    a = a if scale is None else a * scale
    a = a if shift is None else a + shift
    x = torch.where(is_positive, -a, call.negative_scale * a)
    each = -F.logsigmoid(-x)  # softplus(x)
    if call.focal_gamma != 0.0:
        each = torch.exp(call.focal_gamma * F.logsigmoid(x)) * each
    factor = _factors(a.detach(), is_positive, positive, negative, call)
    row = torch.where(known & (factor != 0), factor * each, 0).sum(1)
    row_weight = torch.ones_like(row)
    if weight is not None:
        row, row_weight = row * weight[labels], row_weight * weight[labels]
    if own is not None:
        own = torch.where(counts, own, 0)
        row, row_weight = row * own, row_weight * own
    row = torch.where(counts, row, 0)
    loss = row
    if call.reduction == SUM:
        loss = row.sum()
    elif call.reduction != NONE:
        of_mean = torch.where(counts, row_weight, 0).sum()
        loss = row.sum() / (counts.sum() if call.reduction == BATCH_MEAN else of_mean)
    return loss, _statistics(x.detach(), is_positive, is_negative, factor.detach(), call)


def _factors(
    a: Tensor, is_positive: Tensor, positive: Tensor | None, negative: Tensor | None, call: SigmoidCall
) -> Tensor:
    """(N, C) factors of the binary cross-entropies; only the two tables are differentiable."""
    one = torch.ones_like(a)
    of_negatives = one if negative is None else one * negative
    if call.threshold > 0.0:
        of_negatives = torch.where(a < math.log(call.threshold / (1 - call.threshold)), 0, of_negatives)
    factor = torch.where(is_positive, one if positive is None else one * positive, of_negatives)
    if call.rebalance is not None:
        q = call.rebalance
        base, steepness, centre = call.rebalance_map
        share = q / torch.where(is_positive, q, 0).sum(1, keepdim=True)
        factor = factor * (base + torch.sigmoid(steepness * (share - centre)))
    return factor


def _statistics(x: Tensor, is_positive: Tensor, is_negative: Tensor, factor: Tensor, call: SigmoidCall) -> Tensor:
    if not call.statistics:
        return x.new_empty(0)
    slope = torch.sigmoid(x)
    if call.focal_gamma != 0.0:
        bce, q = -F.logsigmoid(-x), torch.sigmoid(-x)
        slope = torch.exp(call.focal_gamma * F.logsigmoid(x)) * (slope + call.focal_gamma * q * bce)
    slope = factor * slope
    positives = torch.where(is_positive, slope, 0).sum(0)
    return torch.stack([positives, torch.where(is_negative, call.negative_scale * slope, 0).sum(0)])
