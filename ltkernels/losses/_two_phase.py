"""The loss in two phases: statistics of every row, then the gradient from given statistics.

The fused kernel does both in one read of the logits. Where the classes of a row are not all in one place (a classifier sharded over
processes, logits that are computed block by block and dropped) each part gives its statistics, `merge` adds them up, `finish` turns
them into losses and factors, and `gradient` reads each part once more. Statistics and factors are float64, a few numbers a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._checks import real_dtype, smooths

IGNORED = -2  # the label of an ignored row, as the kernels take it


class Finished(NamedTuple):
    """What the statistics of whole rows give."""

    loss: Tensor  # (N,) float64, 0 for ignored rows
    terms: Tensor  # (N, 4) float64 for `gradient`, before upstream factor and denominator
    valid: Tensor  # (N,) bool


def local_labels(target: Tensor, ignore_index: int, start: int, classes: int) -> Tensor:
    """(N,) class ids to ids within the part [start, start + classes); -1 for labels elsewhere, `IGNORED` for ignored rows."""
    here = (target >= start) & (target < start + classes)
    return torch.where(target == ignore_index, IGNORED, torch.where(here, target - start, -1))


def statistics(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    smooth: bool = False,
) -> Tensor:
    """First phase on a part of the classes; no gradient flows through it.

    Args:
        logits: (N, C_part), unit class stride. labels: (N,) int64 from `local_labels`. row_scale: (N,) float64, sigma of each label.
        shift, scale, weight: (C_part,) tables in the loss' dtype. smooth: also sum weight * a, for label smoothing.

    Returns:
        (N, 4) float64: a reference r near the largest a_j but the label's; the sum of exp(a_j - r) over them; the label's own a
        without its margin, -inf where it is elsewhere; the smoothing sum.
    """
    part = _backends.ClassPart(logits, labels, row_scale, shift, scale, weight)
    kernels = _backends.two_phase_kernels(logits.device)
    if kernels is None:
        return _torch_statistics(part, smooth)
    out = torch.empty(len(logits), 4, dtype=torch.float64, device=logits.device)
    kernels[0](part, smooth, out)
    return out


def merge(parts: Tensor) -> Tensor:
    """(P, N, 4) statistics of P parts to the (N, 4) of all their classes."""
    reference = parts[:, :, 0].amax(dim=0)
    reference = torch.where(parts[:, :, 0].isnan().any(dim=0), torch.nan, reference)
    # Parts whose classes are all masked have -inf, and so may have all of them.
    below = torch.where(parts[:, :, 0] == reference, 0.0, parts[:, :, 0] - reference)
    others = (parts[:, :, 1] * torch.exp(below)).sum(dim=0)
    return torch.stack([reference, others, parts[:, :, 2].amax(dim=0), parts[:, :, 3].sum(dim=0)], dim=1)


def finish(
    rows: Tensor,
    target: Tensor,
    *,
    classes: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    weight: Tensor | None = None,
    label_scale: Tensor | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
) -> Finished:
    """Losses and gradient factors from the statistics `rows` (N, 4) of whole rows, as the fused kernel forms them.

    `target` (N,) and the tables (C,) are those of all `classes`; the formulas are in csrc/README.md. `label_scale` alone needs `shift`,
    which it leaves as it is.
    """
    valid = target != ignore_index
    label = torch.where(valid, target, 0)

    def of_label(table: Tensor | None, neutral: float) -> Tensor:
        return torch.full_like(rows[:, 0], neutral) if table is None else table.double()[label]

    sigma, alpha = of_label(row_scale, 1.0), of_label(weight, 1.0)
    reference, others, label_a, smooth_a = rows.unbind(1)
    kappa = of_label(label_scale, 1.0)
    if label_scale is not None:
        # sigma (kappa beta z + delta) from sigma (beta z + delta); of a class that is removed, still -inf
        delta = of_label(shift, 0.0)
        label_a = torch.where(delta == -torch.inf, label_a, kappa * label_a + sigma * delta * (1.0 - kappa))
    label_a = label_a - sigma * of_label(margin, 0.0)
    towers = label_a - reference > 500.0
    base = torch.where(towers, label_a, reference)
    shrink = torch.where(towers, torch.exp(reference - base), 1.0)
    others = others * shrink
    below = label_a - base
    own = torch.exp(below)
    total = others + own
    nll = torch.where(others < 2.0 * own, torch.log1p(others / own), torch.log(total) - below)
    phi, slope = nll, torch.ones_like(nll)
    if focal_gamma != 0.0:
        q = -torch.expm1(-nll)
        power, p = q**focal_gamma, torch.exp(-nll)
        certain = q <= 0.0
        phi = torch.where(certain, 0.0, power * nll)
        tail = torch.where(p > 0.0, focal_gamma * nll * p * power / q, 0.0)
        slope = torch.where(certain, 0.0, power + tail)
    smooth = smooths(label_smoothing)
    eps = of_label(label_smoothing, 0.0) if isinstance(label_smoothing, Tensor) else label_smoothing
    hard, soft = (1.0 - eps) * alpha, eps / classes
    loss, g = hard * phi, hard * slope
    label_grad = -hard * slope * (others / total)
    if smooth:
        weights = float(classes) if weight is None else weight.double().sum()
        smoothed = soft * ((torch.log(total) + base) * weights - (smooth_a + alpha * label_a))
        if isinstance(eps, Tensor):  # a class that is removed has a = -inf
            smoothed = torch.where(eps != 0, smoothed, 0.0)
        loss = loss + smoothed
        g = g + soft * weights
        label_grad = label_grad + soft * weights * (own / total) - soft * alpha
    label_grad = label_grad * sigma * of_label(scale, 1.0) * kappa
    terms = torch.stack([reference, sigma * g * shrink / total, -sigma * soft, label_grad], dim=1)
    return Finished(torch.where(valid, loss, 0.0), terms, valid)


def gradient(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    terms: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Second phase on a part of the classes: the gradient with respect to its logits, in their dtype.

    `terms` (N, 4) float64 from `finish`, columns 1 to 3 times each row's upstream factor; the rest as in `statistics`. `out` may be the
    logits themselves.
    """
    part = _backends.ClassPart(logits, labels, row_scale, shift, scale, weight)
    kernels = _backends.two_phase_kernels(logits.device)
    if kernels is None:
        return _torch_gradient(part, terms)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    kernels[1](part, terms.contiguous(), out)
    return out


# ---- the same in plain torch, for devices whose kernels have no two phases -------------------------------------------


def adjusted(part: _backends.ClassPart) -> Tensor:
    """The adjusted logits of a part, in the working dtype."""
    real = real_dtype(part.logits.dtype)
    a = part.logits.to(real)
    a = a if part.scale is None else a * part.scale
    a = a if part.shift is None else a + part.shift
    return a * part.row_scale.to(real)[:, None]


def _torch_statistics(part: _backends.ClassPart, smooth: bool) -> Tensor:
    """`statistics`; the reference is the maximum."""
    logits, labels, weight = part.logits, part.labels, part.weight
    if logits.shape[1] == 0:  # as a row that is masked whole
        rows = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0], dtype=torch.float64, device=logits.device)
        return torch.where((labels == IGNORED)[:, None], 0.0, rows)
    a = adjusted(part)
    here = (labels >= 0)[:, None]
    at = labels.clamp_min(0)[:, None]
    label_a = torch.where(here, a.gather(1, at), -torch.inf)[:, 0]
    others = a.scatter(1, at, torch.where(here, -torch.inf, a.gather(1, at)))
    reference = others.amax(dim=1)
    below = others - torch.where(reference == -torch.inf, 0.0, reference)[:, None]
    smooth_a = torch.zeros_like(reference)
    if smooth:
        terms = a if weight is None else a * weight
        smooth_a = terms.scatter(1, at, torch.where(here, 0.0, terms.gather(1, at))).sum(dim=1, dtype=torch.float64)
    columns = [
        reference.double(),
        torch.exp(below).sum(dim=1, dtype=torch.float64),
        label_a.double(),
        smooth_a.double(),
    ]
    return torch.where((labels == IGNORED)[:, None], 0.0, torch.stack(columns, dim=1))


def _torch_gradient(part: _backends.ClassPart, terms: Tensor) -> Tensor:
    """`gradient`."""
    logits, labels, scale, weight = part.logits, part.labels, part.scale, part.weight
    if logits.shape[1] == 0:
        return torch.empty_like(logits)
    a = adjusted(part)
    reference, factor, smooth, label_grad = (column.to(a.dtype)[:, None] for column in terms.unbind(1))
    grad = factor * torch.exp(a - torch.where(reference == -torch.inf, 0.0, reference))
    grad = grad + (smooth if weight is None else smooth * weight)
    grad = grad if scale is None else grad * scale
    at = labels.clamp_min(0)[:, None]
    grad = grad.scatter(1, at, torch.where((labels >= 0)[:, None], label_grad, grad.gather(1, at)))
    return torch.where((labels == IGNORED)[:, None], 0.0, grad).to(logits.dtype)
