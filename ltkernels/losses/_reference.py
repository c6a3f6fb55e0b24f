"""The loss in plain torch, for reading: it defines margins, smoothing, mixed labels, probabilities and ignored rows.

It serves what no kernel does (double backward, class probabilities, on a GPU gradients of the tables) and runs in the logits' precision,
float32 at least. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import REDUCTIONS, real_dtype
from . import _terms


def adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    margin: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    focal_gamma: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    term: _terms.Term | None = None,
) -> Tensor:
    """logits (N, C); target (N,) class indices or (N, C) probabilities; see `ltkernels.functional.adjusted_cross_entropy`."""
    z = logits.to(real_dtype(logits.dtype))
    a = z if scale is None else z * scale
    a = a if shift is None else a + shift
    if target.is_floating_point():
        log_p = torch.log_softmax(a, dim=1)
        q = target.to(z.dtype) * (1 - label_smoothing) + label_smoothing / z.shape[1]
        weighted = q if weight is None else q * weight
        row = -(weighted * log_p).sum(dim=1)
        denominator = torch.tensor(z.shape[0], dtype=z.dtype, device=z.device)
        return _reduce(row, denominator, denominator, reduction)

    valid = target != ignore_index
    labels = torch.where(valid, target, 0)
    share = torch.ones_like(z[:, 0]) if lam is None else lam

    def one_label(each: Tensor) -> Tensor:
        if term is None:
            return _one_label(a, each, margin, row_scale, weight, focal_gamma, label_smoothing)
        if term.form == "sigmoid":
            return _terms.sigmoid_rows(z, each, weight, focal_gamma, term)
        if term.form == "arcface":
            at = each.unsqueeze(1)
            adjusted = a.scatter(1, at, _terms.arcface_logit(a.gather(1, at), term))
        else:
            adjusted = _terms.add_term(a, z, each, term)
        return _one_label(adjusted, each, margin, row_scale, weight, focal_gamma, label_smoothing)

    row = share * one_label(labels)
    row_weight = share * _take(weight, labels, z)
    if target_b is not None:
        row = row + (1 - share) * one_label(target_b)
        row_weight = row_weight + (1 - share) * _take(weight, target_b, z)
    row = torch.where(valid, row, 0)
    return _reduce(row, torch.where(valid, row_weight, 0).sum(), valid.sum(), reduction)


def _one_label(
    a: Tensor,
    labels: Tensor,
    margin: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    focal_gamma: float,
    label_smoothing: float,
) -> Tensor:
    """Row losses (N,) for one label a row."""
    at = labels.unsqueeze(1)
    if margin is not None:
        a = a.scatter_add(1, at, -margin[at])
    if row_scale is not None:
        a = a * row_scale[at]
    log_p = torch.log_softmax(a, dim=1)
    nll = -log_p.gather(1, at).squeeze(1)
    modulated = nll
    if focal_gamma != 0.0:
        # phi(l) = (1 - e^-l)^gamma l. At l = 0 its slope is 0, and pow's would be infinite for gamma < 1.
        positive = nll > 0
        q = -torch.expm1(-torch.where(positive, nll, 1.0))
        modulated = torch.where(positive, q**focal_gamma * nll, nll * 0)
    row = (1 - label_smoothing) * _take(weight, labels, a) * modulated
    if label_smoothing != 0.0:
        every = log_p if weight is None else log_p * weight
        row = row - label_smoothing / a.shape[1] * every.sum(dim=1)
    return row


def _take(table: Tensor | None, labels: Tensor, like: Tensor) -> Tensor:
    return torch.ones_like(like[:, 0]) if table is None else table[labels]


def _reduce(row: Tensor, weights: Tensor, rows: Tensor, reduction: int) -> Tensor:
    name = REDUCTIONS[reduction]
    if name == "none":
        return row
    if name == "sum":
        return row.sum()
    return row.sum() / (weights if name == "mean" else rows)
