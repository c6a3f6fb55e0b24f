"""The loss in plain torch, for reading: it defines margins, smoothing, mixed labels, probabilities and ignored rows.

It serves what no kernel does (double backward, class probabilities, on a GPU gradients of the tables) and runs in the logits' precision,
float32 at least. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import BATCH_MEAN, NONE, SUM, Call
from .._checks import real_dtype, smooths
from . import _soft, _terms

Number = float | Tensor  # a tensor where a compiler must not know the value


def adjusted_cross_entropy(logits: Tensor, call: Call) -> Tensor:
    """The loss of logits (N, C); see `ltkernels.functional.adjusted_cross_entropy`. `Call.grad_scale` has no part in it."""
    z = logits.to(real_dtype(logits.dtype))
    _, scale, margin, row_scale, weight = call.tables()
    own, smoothing, label_scale = call.sample_weight, call.smoothing, call.label_scale
    a = z if scale is None else z * scale
    a = a if call.shift is None else a + call.shift
    target, target_b = call.target, call.target_b
    focal_gamma: Number = call.focal_gamma
    label_smoothing: Number = call.label_smoothing
    if call.numbers is not None:
        focal_gamma, label_smoothing = call.numbers.to(z).unbind()
    if target.is_floating_point():
        given = (logits, target, call.shift, scale, weight, own)
        return _soft.reference(given, _soft.SoftTargets(call.label_smoothing, reduction=call.reduction))[0]

    valid = target != call.ignore_index
    labels = torch.where(valid, target, 0)
    if z.shape[1] == 0:  # there is no class to look up, and every label is ignored
        return _reduce(z.sum(dim=1), z.new_zeros(()), valid.sum(), call.reduction)
    share = torch.ones_like(labels, dtype=z.dtype) if call.lam is None else call.lam
    term = _terms.of(call)

    def one_label(each: Tensor) -> Tensor:
        eps = label_smoothing if smoothing is None else smoothing[each]
        if term is None:
            adjusted = a
            if label_scale is not None:
                at = each.unsqueeze(1)
                scaled = z if scale is None else z * scale
                scaled = label_scale[at] * scaled.gather(1, at)
                adjusted = a.scatter(1, at, scaled if call.shift is None else scaled + call.shift[at])
            return _one_label(adjusted, each, margin, row_scale, weight, focal_gamma, eps)
        if term.form == "sigmoid":
            return _terms.sigmoid_rows(a, each, weight, focal_gamma, term)
        if term.form == "vmf":
            adjusted = _terms.vmf_logits(z, term)
            adjusted = adjusted if call.shift is None else adjusted + call.shift
        elif term.form == "arcface":
            at = each.unsqueeze(1)
            adjusted = a.scatter(1, at, _terms.arcface_logit(a.gather(1, at), term))
        else:
            adjusted = _terms.add_term(a, z, each, term)
        return _one_label(adjusted, each, margin, row_scale, weight, focal_gamma, eps)

    row = share * one_label(labels)
    row_weight = share * _take(weight, labels, z)
    if target_b is not None:
        row = row + (1 - share) * one_label(target_b)
        row_weight = row_weight + (1 - share) * _take(weight, target_b, z)
    if own is not None:
        own = torch.where(valid, own, 0)
        row, row_weight = row * own, row_weight * own
    row = torch.where(valid, row, 0)
    return _reduce(row, torch.where(valid, row_weight, 0).sum(), valid.sum(), call.reduction)


def _one_label(
    a: Tensor,
    labels: Tensor,
    margin: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    focal_gamma: Number,
    label_smoothing: Number,
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
    if isinstance(focal_gamma, Tensor) or focal_gamma != 0.0:
        # phi(l) = (1 - e^-l)^gamma l. At l = 0 its slope is 0, and pow's would be infinite for gamma < 1.
        positive = nll > 0
        q = -torch.expm1(-torch.where(positive, nll, 1.0))
        modulated = torch.where(positive, q**focal_gamma * nll, nll * 0)
    row = (1 - label_smoothing) * _take(weight, labels, a) * modulated
    if smooths(label_smoothing):
        every = log_p if weight is None else log_p * weight
        smooth = label_smoothing / a.shape[1] * every.sum(dim=1)
        if isinstance(label_smoothing, Tensor):  # a class that is removed has log p = -inf
            smooth = torch.where(label_smoothing != 0, smooth, 0)
        row = row - smooth
    return row


def _take(table: Tensor | None, labels: Tensor, like: Tensor) -> Tensor:
    return torch.ones_like(labels, dtype=like.dtype) if table is None else table[labels]


def _reduce(row: Tensor, weights: Tensor, rows: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return row
    if reduction == SUM:
        return row.sum()
    return row.sum() / (rows if reduction == BATCH_MEAN else weights)
