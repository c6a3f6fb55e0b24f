"""Coupled experts through Triton: E x C logits a row, every expert's loss and gradient and what couples them, in one launch.

The twin of csrc/cpu/experts.inl. One row a program; its experts are the rows of a tile, so that a sum over the experts is one over the
tile's first axis. A second sweep over the row, out of the cache, forms the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import denominator_of
from .._checks import FLOATING, real_dtype
from .._fused import Inputs, Request
from . import _configs, _second
from ._configs import Specialisation, Tile
from ._kernels import labels, store_loss, store_tile, upstream_of
from ._row import (
    LN_2,
    LOG2_E,
    SCALE,
    SHIFT,
    TABLE,
    WEIGHT,
    exp2,
    finish,
    gather,
    has,
    kernel,
    label_data,
    label_factor,
    online,
    origin,
)
from .adjusted_ce import _launch, _or, _present

if TYPE_CHECKING:
    from ..losses._experts import Experts

# csrc/cpu/experts.h: enum Coupling
MEAN_KL = tl.constexpr(1)
MUTUAL_KL = tl.constexpr(2)
SUM = tl.constexpr(3)


@triton.jit
def table_tile(table, at, col, mask, default, REAL: tl.constexpr):
    """Entries `col` of the table's rows that begin at `at`."""
    return tl.load(table + at[:, None] + col[None, :], mask=mask, other=default).to(REAL)


@triton.jit
def over_experts(x, valid):
    """The sum over the experts, once for each of them."""
    return tl.zeros_like(x) + tl.sum(tl.where(valid, x, 0.0), 0)


@triton.jit
def tile_over_experts(x, valid):
    return tl.zeros_like(x) + tl.sum(tl.where(valid[:, None], x, 0.0), 0)[None, :]


@triton.jit
def expert_tile(
    start, at, joint_at, col, inside, valid, shift, scale, inverse, sharp2, present, adjusted,
    COUPLING: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(z, beta, beta z + delta, what the coupling compares, its slope in z) of the columns `col`; with SUM the last two are the sum of the
    experts' logits and its slope, adjusted by the tables' last row."""
    mask = valid[:, None] & inside[None, :]
    z = tl.load(start[:, None] + col[None, :], mask=mask, other=0.0).to(REAL)
    beta = table_tile(scale, at, col, mask & has(present, SCALE), 1.0, REAL)
    x = beta * z + table_tile(shift, at, col, mask & has(present, SHIFT), 0.0, REAL)
    if COUPLING == SUM:
        slope = table_tile(scale, joint_at, col, mask & has(present, SCALE), 1.0, REAL)
        u = slope * tile_over_experts(z, valid) + table_tile(
            shift, joint_at, col, mask & has(present, SHIFT), 0.0, REAL
        )
    else:
        by = tl.load(inverse + col, mask=inside & has(present, TABLE), other=1.0).to(REAL)
        slope = tl.where(adjusted != 0, beta, tl.broadcast_to(by[None, :], beta.shape[0], beta.shape[1])) * sharp2
        u = tl.where(adjusted != 0, x, z * by[None, :]) * sharp2
        u = tl.where(mask, u, -float("inf"))
    return z, beta, x, u, slope


@triton.jit
def fold_loss(
    top, others, smooth_a, total_weight, x, y, sigma2, at, col, inside, valid, weight, present, REAL: tl.constexpr
):
    """Folds a tile into the sums of the cross-entropies."""
    mask = valid[:, None] & inside[None, :]
    counts = mask & (col[None, :] != y[:, None])
    a = tl.where(counts, x * sigma2[:, None], -float("inf"))
    w = table_tile(weight, at, col, mask & has(present, WEIGHT), 1.0, REAL)
    smooth_a += tl.sum(tl.where(counts, w * a, 0.0), 1)
    total_weight += tl.sum(tl.where(mask, w, 0.0), 1)
    top, others, _e = online(top, others, a, counts)
    return top, others, smooth_a, total_weight


@triton.jit
def loss_gradient(
    x, beta, y, sigma2, highest, k, c, own_gradient, by, at, col, inside, valid, weight, present, REAL: tl.constexpr
):
    """The gradient of the cross-entropies in a tile, times `by`; `k`, `c` and `own_gradient` are those of dL/dz."""
    mask = valid[:, None] & inside[None, :]
    e = tl.where(mask, exp2(x * sigma2[:, None] - highest[:, None]), 0.0)
    w = table_tile(weight, at, col, mask & has(present, WEIGHT), 1.0, REAL)
    g = (by * k)[:, None] * e - (by * c)[:, None] * w
    return tl.where(col[None, :] == y[:, None], (by * own_gradient)[:, None], g * beta)


@triton.jit
def fold_coupling(top, total, top_mean, total_mean, dot, u, valid, experts, COUPLING: tl.constexpr):
    """Folds a tile into maximum and sum of every expert's u and of their mean, and into the dot product of the KL: of the weights, the
    mean's or the expert's own, and of what is `apart`, all relative to the maxima."""
    new = tl.maximum(top, tl.max(u, 1))
    above = u - origin(new)[:, None]
    e = exp2(above)
    moved = origin(top) - origin(new)
    if COUPLING == MEAN_KL:
        mean = tile_over_experts(u, valid) / experts
        new_mean = tl.maximum(top_mean, tl.max(mean, 1))
        mean -= origin(new_mean)[:, None]
        w = exp2(mean)
        apart = mean - above
        by = tl.exp2(top_mean - origin(new_mean))
        dot = by * (dot + total_mean * (origin(top_mean) - origin(new_mean) - moved))
        total_mean = total_mean * by + tl.sum(w, 1)
        top_mean = new_mean
    else:
        w = e
        apart = experts * above - tile_over_experts(above, valid)
        dot = tl.exp2(top - origin(new)) * (dot + total * (experts * moved - over_experts(moved, valid)))
    dot += tl.sum(tl.where(w != 0.0, w * apart, 0.0), 1)
    return new, total * tl.exp2(top - origin(new)) + tl.sum(e, 1), top_mean, total_mean, dot


@triton.jit
def coupling_gradient(u, top, total, top_mean, total_mean, of, valid, experts, COUPLING: tl.constexpr):
    """dK/du of a tile; `of` are the summands A_e of the mutual KL, in base 2."""
    above = u - origin(top)[:, None]
    p = exp2(above) / total[:, None]
    if COUPLING == MEAN_KL:
        mean = tile_over_experts(u, valid) / experts
        return p - exp2(mean - origin(top_mean)[:, None]) / total_mean[:, None]
    log_p = above - tl.log2(total)[:, None]
    apart = experts * log_p - tile_over_experts(log_p, valid) - of[:, None]
    own = tl.where(p != 0.0, p * (experts + LN_2 * apart), 0.0)
    return (own - tile_over_experts(p, valid)) / tl.maximum(experts - 1.0, 1.0)


@kernel
def expert_rows(
    z, o1: tl.int64, o2: tl.int64, o3: tl.int64, o4: tl.int64, o5: tl.int64, o6: tl.int64, o7: tl.int64,
    z_stride: tl.int64, out, row_loss, target, shift, scale, margin, row_scale, weight, label_scale, inverse, row_weight,
    row_coef, n: tl.int64, classes: tl.int32, experts: tl.int32, ignore_index: tl.int64, present: tl.int32,
    adjusted: tl.int32, need_grad: tl.int32, focal_gamma: tl.float64, label_smoothing: tl.float64, sharpness: tl.float64,
    COUPLING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Losses of the experts and of their coupling, (experts + 1, n), each times its row's weight, and the experts' gradients, (experts, n,
    classes). o1 to o7: where the experts after the first begin, from it."""
    gamma, eps = tl.full((), focal_gamma, REAL), tl.full((), label_smoothing, REAL)
    sharp2 = tl.full((), sharpness, REAL) * LOG2_E
    many = experts.to(REAL)
    expert = tl.arange(0, R)
    there = expert < experts
    # What the tile has beyond the experts counts as past the last row.
    row = tl.where(there, tl.program_id(0).to(tl.int64), n)
    y, _yb, _share, valid, bad = labels(target, target, row_loss, row, n, classes, ignore_index, False, REAL)
    offset = tl.where(expert == 1, o1, 0) + tl.where(expert == 2, o2, 0) + tl.where(expert == 3, o3, 0)
    offset += tl.where(expert == 4, o4, 0) + tl.where(expert == 5, o5, 0)
    offset += tl.where(expert == 6, o6, 0) + tl.where(expert == 7, o7, 0)
    start = z + offset + row * z_stride
    own = tl.load(start + y, mask=valid, other=0.0).to(REAL)
    at = tl.where(there, expert, 0) * classes
    joint_at = at * 0 + experts * classes
    beta_y = label_factor(scale, label_scale, at + y, present, REAL)
    delta_y = gather(shift, at + y, has(present, SHIFT), 0.0, REAL)
    sigma, sigma2, label_a, _own_slope, alpha = label_data(
        own, y + at, margin, row_scale, weight, beta_y, delta_y, present, 0.0, 0.0, 0.0, 0.0, 0, REAL
    )
    nothing = tl.zeros([R], REAL)
    top, others, smooth_a, total_weight = nothing - float("inf"), nothing, nothing, nothing
    # Of the coupling: the sums of a KL, or those of the cross-entropy of the sum.
    c_top, c_total, c_dot, c_weight = nothing - float("inf"), nothing, nothing, nothing
    m_top, m_total = nothing - float("inf"), nothing
    c_sigma, c_sigma2, c_label_a, c_alpha, c_beta_y = nothing, nothing, nothing, nothing, nothing
    if COUPLING == SUM:
        c_beta_y = label_factor(scale, label_scale, joint_at + y, present, REAL)
        c_delta_y = gather(shift, joint_at + y, has(present, SHIFT), 0.0, REAL)
        c_sigma, c_sigma2, c_label_a, _own_slope, c_alpha = label_data(
            over_experts(own, valid), joint_at + y, margin, row_scale, weight, c_beta_y, c_delta_y, present, 0.0, 0.0, 0.0,
            0.0, 0, REAL,
        )  # fmt: skip
    for first in range(0, classes, C):
        col = first + tl.arange(0, C)
        inside = col < classes
        _z, _beta, x, u, _slope = expert_tile(
            start, at, joint_at, col, inside, valid, shift, scale, inverse, sharp2, present, adjusted, COUPLING, REAL,
        )  # fmt: skip
        top, others, smooth_a, total_weight = fold_loss(
            top, others, smooth_a, total_weight, x, y, sigma2, at, col, inside, valid, weight, present, REAL
        )
        if COUPLING == SUM:
            c_top, c_total, c_dot, c_weight = fold_loss(
                c_top, c_total, c_dot, c_weight, u, y, c_sigma2, joint_at, col, inside, valid, weight, present, REAL
            )
        else:
            c_top, c_total, m_top, m_total, c_dot = fold_coupling(
                c_top, c_total, m_top, m_total, c_dot, u, valid, many, COUPLING
            )
    loss, highest, k, c, own_gradient = finish(
        top, others, smooth_a, total_weight, label_a, alpha, 1.0, gamma, eps, classes, True
    )
    c_highest, c_k, c_c, c_own_gradient, of = nothing, nothing, nothing, nothing, nothing
    if COUPLING == SUM:
        coupling, c_highest, c_k, c_c, c_own_gradient = finish(
            c_top, c_total, c_dot, c_weight, c_label_a, c_alpha, 1.0, gamma, eps, classes, True
        )
    elif COUPLING == MEAN_KL:
        each = c_dot / m_total - tl.log2(m_total) + tl.log2(c_total)
        coupling = LN_2 * over_experts(each, valid)
    else:
        logs = tl.log2(c_total)
        of = c_dot / c_total - (many * logs - over_experts(logs, valid))
        coupling = LN_2 * over_experts(of, valid) / tl.maximum(many - 1.0, 1.0)
    index, last = expert * n + row, experts * n + row
    whole = (experts + 1) * n
    by = gather(row_weight, index, valid, 0.0, REAL)
    c_by = gather(row_weight, last, valid, 0.0, REAL)
    store_loss(row_loss + expert * n, by * loss, row, n, valid, bad)
    store_loss(row_loss + experts * n, c_by * coupling, tl.where(expert == 0, row, n), n, valid, bad)
    if need_grad != 0:
        by *= upstream_of(index, whole, row_coef, row_coef, 0, present, REAL)
        c_by *= upstream_of(last, whole, row_coef, row_coef, 0, present, REAL)
        for first in range(0, classes, C):
            col = first + tl.arange(0, C)
            inside = col < classes
            _z, beta, x, u, slope = expert_tile(
                start, at, joint_at, col, inside, valid, shift, scale, inverse, sharp2, present, adjusted, COUPLING, REAL,
            )  # fmt: skip
            g = loss_gradient(
                x, beta, y, sigma2, highest, k * sigma, c * sigma, own_gradient * sigma * beta_y, by, at, col, inside,
                valid, weight, present, REAL,
            )  # fmt: skip
            if COUPLING == SUM:
                g += loss_gradient(
                    u, slope, y, c_sigma2, c_highest, c_k * c_sigma, c_c * c_sigma, c_own_gradient * c_sigma * c_beta_y,
                    c_by, joint_at, col, inside, valid, weight, present, REAL,
                )  # fmt: skip
            else:
                h = coupling_gradient(u, c_top, c_total, m_top, m_total, of, valid, many, COUPLING)
                g += (c_by * LN_2)[:, None] * slope * h
            store_tile(out + expert * n * classes, g, row, classes, col, inside, n, valid, bad, False)


# Experts, rounded up, and classes of a tile. Of some thirty numbers an expert a thread keeps those of the experts it has logits of: two
# here, one of float64. Where warps lay along the classes alone, all experts', that spilled half a KB (Triton 3.9, sm_90).
_TILES = (Tile(4, 64, 4), Tile(8, 64, 8))
_DOUBLE = (Tile(4, 32, 4), Tile(8, 32, 8))


def specialisation(dtype: torch.dtype, experts: int, coupling: int) -> Specialisation:
    tile = next(tile for tile in (_DOUBLE if dtype == torch.float64 else _TILES) if experts <= tile.rows)
    return _configs._make(expert_rows, dtype, tile, COUPLING=coupling, R=tile.rows, C=tile.columns)


def every() -> Iterator[Specialisation]:
    """All that can be launched."""
    found = [
        specialisation(dtype, tile.rows, coupling)
        for dtype in FLOATING
        for tile in _TILES
        for coupling in (MEAN_KL.value, MUTUAL_KL.value, SUM.value)
    ]
    return iter(dict.fromkeys(found))


def experts(inputs: Inputs, call: Experts, request: Request) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    """The kernel of `ltkernels.losses._experts`, for one focal factor."""
    whole = inputs[0]
    assert whole is not None
    together = whole.dim() == 3
    logits = list(whole.unbind(0)) if together else [each for each in inputs if each is not None]
    first = logits[0]
    rows, classes = first.shape
    real, device, count = real_dtype(first.dtype), first.device, len(logits)
    like = {"dtype": real, "device": device}
    if any(z.stride(1) != 1 or z.stride(0) != first.stride(0) for z in logits):
        logits = [z.contiguous() for z in logits]
        first = logits[0]
    offsets = [(z.data_ptr() - first.data_ptr()) // first.element_size() for z in logits[1:]]
    tables = [None if t is None else t.to(real).contiguous() for t in call.tables()]
    *five, label_scale = tables
    inverse = None if call.inverse_temperature is None else call.inverse_temperature.to(real).contiguous()
    coef, one = _second.upstream(request, real)
    row_loss = torch.empty((count + 1, rows), **like)
    grad = torch.empty((count, rows, classes), **like) if any(request.needs) else None
    weights, nothing = _weights(call, count, rows, like)
    if rows:
        present = _present(*five, coef, inverse, None, None, label_scale) | one
        _launch(
            specialisation(first.dtype, count, call.coupling), (rows,),
            first, *offsets, *(0,) * (7 - len(offsets)), first.stride(0), _or(grad, row_loss), row_loss, call.target,
            *(_or(t, row_loss) for t in (*five, label_scale, inverse)), weights,
            _or(coef, row_loss), rows, classes, count, call.ignore_index, present, int(call.adjusted),
            int(grad is not None), call.focal_gamma[0], call.label_smoothing, call.sharpness,
        )  # fmt: skip
    loss = _second.reduced(row_loss, call.reduction) + nothing
    if grad is None:
        return (loss,), [None] * len(inputs)
    found: list[Tensor | None] = [grad] if together else list(grad.unbind(0))
    found += [None] * (len(inputs) - len(found))
    return (loss,), [g if need else None for g, need in zip(found, request.needs, strict=True)]


def _weights(call: Experts, count: int, rows: int, like: dict[str, object]) -> tuple[Tensor, Tensor]:
    """(experts + 1, N): each loss' factor and the sample weights, over the denominator of its mean; and 0 over the last denominator, which
    is NaN where no row counts."""
    joint = call.coupling == SUM.value
    plain = call.of(0)._replace(weight=None)
    own = [call.of(e) if call.weight is not None else plain for e in range(count)]
    own.append(call.of(count) if joint and call.weight is not None else plain)
    weights = torch.empty((count + 1, rows), **like)  # type: ignore[call-overload]
    weights.fill_(1.0) if call.sample_weight is None else weights.copy_(call.sample_weight.expand(count + 1, rows))
    over: dict[int, Tensor] = {}
    for e, (each, factor) in enumerate(zip(own, call.factors, strict=True)):
        if id(each) not in over:
            over[id(each)] = denominator_of(each)
        weights[e].mul_((factor / over[id(each)]).to(weights.dtype))
    return weights, (0 / over[id(own[-1])]).to(weights.dtype)
