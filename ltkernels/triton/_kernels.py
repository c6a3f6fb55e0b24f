"""The kernels of a loss on logits whose rows fit into registers: each logit read once, each gradient written once. One label a row, no
closed form, no smoothing.

`adjusted_ce.py` launches them; csrc/cpu/adjusted_ce.h says what they compute; `_long_rows.py` has the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._row import (
    ONE_COEF,
    ROW_COEF,
    SAMPLE_WEIGHT,
    SCALE,
    SHIFT,
    WEIGHT,
    adjusted,
    finish,
    gather,
    has,
    kernel,
    label_data,
    label_factor,
    online,
    stream,
    true,
)

VECTOR = tl.constexpr(8)  # elements: ALIGNED rows are multiples of it, 16 bytes of the smallest dtype
MAX_PARTS = tl.constexpr(128)  # programs of `denominator`; each program of a row kernel adds their sums


@kernel
def denominator(
    parts,
    target,
    target_b,
    lam,
    weight,
    sample_weight,
    rows: tl.int64,
    classes: tl.int32,
    ignore_index: tl.int64,
    mixed: tl.int32,
    present: tl.int32,
    steps: tl.int32,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts[program] = sum of the rows' weights, as far as they are `present`, over BLOCK * steps rows. A label out of
    range weighs nothing: its row is NaN anyway."""
    weighted = has(present, WEIGHT)
    total = tl.zeros([BLOCK], REAL)
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK
    for step in range(steps):
        row = first + step * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(target + row, mask=row < rows, other=ignore_index)
        valid = (row < rows) & (y != ignore_index)
        known = valid & (y >= 0) & (y < classes) & weighted
        a = tl.load(weight + y, mask=known, other=0.0).to(REAL)
        yb = tl.load(target_b + row, mask=valid & true(mixed != 0), other=-1)
        known = (yb >= 0) & (yb < classes) & weighted
        b = tl.load(weight + yb, mask=known, other=0.0).to(REAL)
        share = tl.load(lam + row, mask=valid & true(mixed != 0), other=1.0).to(REAL)
        each = tl.where(weighted, share * a + (1.0 - share) * b, 1.0)
        total += tl.where(valid, each * weight_of(sample_weight, row, valid, present, REAL), 0.0)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))


@kernel
def loss_sum(loss, row_loss, parts, rows: tl.int64, count: tl.int32, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """loss = sum of the row losses / sum of the first `count` parts; one program, so that the order is one."""
    total = tl.zeros([BLOCK], REAL)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss + row, mask=row < rows, other=0.0)
    tl.store(loss, tl.sum(total, 0) / reduce_by(parts, count, REAL))


@triton.jit
def reduce_by(parts, count, REAL: tl.constexpr):
    """The denominator of the reduction; 1 where there is none."""
    index = tl.arange(0, MAX_PARTS)
    total = tl.sum(tl.load(parts + index, mask=index < count, other=0.0).to(REAL), 0)
    return tl.where(count > 0, total, 1.0)


@kernel
def scale_gradient(
    grad, upstream, expected, divides: tl.int32, classes: tl.int64, stride: tl.int64, blocks: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """grad *= upstream / expected (1 without `divides`), in place, rounded once; nothing is read where they are equal."""
    factor = tl.load(upstream)
    known = tl.where(divides != 0, tl.load(expected), 1.0)
    if factor != known:
        factor /= known
        row = tl.program_id(0).to(tl.int64) // blocks
        col = (tl.program_id(0) - row * blocks) * BLOCK + tl.arange(0, BLOCK)
        at = grad + row * stride + col
        g = tl.load(at, mask=col < classes)
        tl.store(at, (g.to(factor.dtype) * factor).to(grad.dtype.element_ty), mask=col < classes)


@triton.jit
def labels(target, target_b, lam, row, n, classes, ignore_index, MIXED: tl.constexpr, REAL: tl.constexpr):
    """Labels in range (0 where they are not), the first label's share, which rows count, and which have a bad label."""
    y = tl.load(target + row, mask=row < n, other=ignore_index)
    valid = (row < n) & (y != ignore_index)
    bad = valid & ((y < 0) | (y >= classes))
    yb = y
    share = tl.where(valid, 1.0, 0.0).to(REAL)
    if MIXED:
        yb = tl.load(target_b + row, mask=valid, other=0)
        bad = bad | (valid & ((yb < 0) | (yb >= classes)))
        share = tl.load(lam + row, mask=valid, other=0.0).to(REAL)
    good = valid & (bad == 0)
    return tl.where(good, y, 0).to(tl.int32), tl.where(good, yb, 0).to(tl.int32), share, valid, bad


@triton.jit
def weight_of(sample_weight, row, valid, present, REAL: tl.constexpr):
    """The factor of a row's loss and gradient. That of an ignored row is not looked at."""
    return gather(sample_weight, row, valid & has(present, SAMPLE_WEIGHT), 1.0, REAL)


@triton.jit
def upstream_of(row, n, row_coef, parts, count, present, REAL: tl.constexpr):
    """The factor on a row's gradient: its upstream gradient over the denominator of the reduction."""
    at = tl.where(has(present, ONE_COEF), 0, row)
    coefficient = tl.load(row_coef + at, mask=(row < n) & has(present, ROW_COEF), other=1.0).to(REAL)
    return coefficient / reduce_by(parts, count, REAL)


@triton.jit
def load_tile(
    start, col, inside, valid, shift, scale, present,
    TABLES: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(z, beta, beta z + delta) of the columns `col` of the rows that begin at `start`; beta 1 unless TABLES."""
    mask = valid[:, None] & inside[None, :]
    address = start[:, None] + col[None, :]
    if ALIGNED:
        address = tl.multiple_of(address, (16, 16))
    z = tl.load(address, mask=mask, other=0.0).to(REAL)
    beta = tl.zeros([1, 1], REAL) + 1.0
    x = z
    if TABLES:
        beta = stream(scale, col, inside[None, :] & has(present, SCALE), 1.0, R, ALIGNED, REAL)
        x = beta * z + stream(shift, col, inside[None, :] & has(present, SHIFT), 0.0, R, ALIGNED, REAL)
    return z, beta, x


@triton.jit
def store_tile(grad, g, row, stride, col, inside, n, valid, bad, ALIGNED: tl.constexpr):
    """Ignored rows get 0 and rows with a bad label NaN, whatever was computed."""
    g = tl.where(bad[:, None], float("nan"), tl.where(valid[:, None], g, 0.0))
    to = (grad + row * stride)[:, None] + col[None, :]
    if ALIGNED:
        to = tl.multiple_of(to, (16, 16))
    tl.store(to, g.to(grad.dtype.element_ty), mask=(row < n)[:, None] & inside[None, :])


@triton.jit
def store_loss(row_loss, loss, row, n, valid, bad):
    tl.store(row_loss + row, tl.where(bad, float("nan"), tl.where(valid, loss, 0.0)), mask=row < n)


@triton.jit
def gradient_tile(
    e, factor, c, upstream, beta, col, inside, y, own_gradient, weight, present,
    SMOOTH: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile from its exponentials; the label's lane is `own_gradient`."""
    g = (upstream * factor)[:, None] * e
    if SMOOTH:
        w = stream(weight, col, inside[None, :] & has(present, WEIGHT), 1.0, R, ALIGNED, REAL)
        g -= (upstream * c)[:, None] * w
    return tl.where(col[None, :] == y[:, None], own_gradient[:, None], g * beta)


@kernel
def rows(
    z, z_stride: tl.int64, grad, grad_stride: tl.int64, row_loss, parts, count: tl.int32,
    target, shift, scale, margin, row_scale, weight, row_coef, sample_weight, label_scale,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32, focal_gamma: tl.float64,
    TABLES: tl.constexpr, INPUTS: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of R whole rows a program; INPUTS: with sample weights and a label scale."""
    gamma = tl.full((), focal_gamma, REAL)
    if ALIGNED:  # what the compiler must know for 16-byte accesses
        classes = classes // VECTOR * VECTOR
        z_stride = z_stride // VECTOR * VECTOR
        grad_stride = grad_stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, C)
    inside = col < classes
    y, _yb, _share, valid, bad = labels(target, target, row_loss, row, n, classes, ignore_index, False, REAL)
    upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
    start = z + row * z_stride
    # Before anything is written: the gradient may replace the logits.
    own = tl.load(start + y, mask=valid, other=0.0).to(REAL)
    zt, beta, x = load_tile(start, col, inside, valid, shift, scale, present, TABLES, R, ALIGNED, REAL)
    nothing = tl.zeros([R], REAL)
    beta_y = gather(scale, y, has(present, SCALE), 1.0, REAL)
    own_weight = nothing + 1.0
    if INPUTS:
        beta_y = label_factor(scale, label_scale, y, present, REAL)
        own_weight = weight_of(sample_weight, row, valid, present, REAL)
    delta_y = gather(shift, y, has(present, SHIFT), 0.0, REAL)
    sigma, sigma2, label_a, _slope, alpha = label_data(
        own, y, margin, row_scale, weight, beta_y, delta_y, present, 0.0, 0.0, 0.0, 0.0, 0, REAL
    )
    a, counts = adjusted(zt, x, y, sigma2, own, row, col, inside, row_loss, target, 0.0, 0.0, 0, R, ALIGNED, REAL)
    top, others, e = online(nothing - float("inf"), nothing, a, counts)
    loss, highest, k, c, own_gradient = finish(
        top, others, nothing, nothing, label_a, alpha, own_weight, gamma, 0.0, classes, False
    )
    outer = upstream * sigma
    factor = k * tl.exp2(top - highest)
    own_gradient = outer * beta_y * own_gradient
    g = gradient_tile(e, factor, c, outer, beta, col, inside, y, own_gradient, weight, present, False, R, ALIGNED, REAL)
    store_loss(row_loss, loss, row, n, valid, bad)
    store_tile(grad, g, row, grad_stride, col, inside, n, valid, bad, ALIGNED)
