"""The kernels of the losses on logits. `adjusted_ce.py` launches them; csrc/cpu/adjusted_ce.h says what they compute.

A row that fits into registers is read once and its gradient written once (`rows`). Longer rows take two passes over
themselves within one program (`long_rows`): the second finds the row in the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._row import (
    LN_2,
    LOG2_E,
    ROW_COEF,
    SCALE,
    SEESAW,
    ROW_SCALE,
    SHIFT,
    SIGMOID,
    TABLE,
    WEIGHT,
    adjusted,
    finish,
    gather,
    has,
    kernel,
    label_data,
    online,
    smoothing_sums,
    softplus,
    true,
)

MAX_PARTS = tl.constexpr(128)  # programs of `denominator`; each program of a row kernel adds their sums


@kernel
def denominator(
    parts,
    target,
    target_b,
    lam,
    weight,
    rows: tl.int64,
    classes: tl.int32,
    ignore_index: tl.int64,
    mixed: tl.int32,
    weighted: tl.int32,
    steps: tl.int32,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts[program] = sum of the rows' weights (1 each unless `weighted`) over BLOCK * steps rows. A label out of
    range weighs nothing: its row is NaN anyway."""
    total = tl.zeros([BLOCK], REAL)
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK
    for step in range(steps):
        row = first + step * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(target + row, mask=row < rows, other=ignore_index)
        valid = (row < rows) & (y != ignore_index)
        known = valid & (y >= 0) & (y < classes) & true(weighted != 0)
        a = tl.load(weight + y, mask=known, other=0.0).to(REAL)
        yb = tl.load(target_b + row, mask=valid & true(mixed != 0), other=-1)
        known = (yb >= 0) & (yb < classes) & true(weighted != 0)
        b = tl.load(weight + yb, mask=known, other=0.0).to(REAL)
        share = tl.load(lam + row, mask=valid & true(mixed != 0), other=1.0).to(REAL)
        each = tl.where(weighted != 0, share * a + (1.0 - share) * b, 1.0)
        total += tl.where(valid, each, 0.0)
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
def scale_gradient(grad, upstream, classes: tl.int64, stride: tl.int64, blocks: tl.int64, BLOCK: tl.constexpr):
    """grad *= upstream, in place, rounded once; nothing is read where the factor is 1."""
    factor = tl.load(upstream)
    if factor != 1.0:
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
def upstream_of(row, n, row_coef, parts, count, present, REAL: tl.constexpr):
    """The factor on a row's gradient: its upstream gradient over the denominator of the reduction."""
    coefficient = tl.load(row_coef + row, mask=(row < n) & has(present, ROW_COEF), other=1.0).to(REAL)
    return coefficient / reduce_by(parts, count, REAL)


# ---- one label of a tile ---------------------------------------------------------------------------------------------


@triton.jit
def seesaw_floor(z, inside, log_eps):
    """lse + log eps of whole rows."""
    top = tl.max(tl.where(inside[None, :], z, -float("inf")), 1)
    total = tl.sum(tl.where(inside[None, :], tl.exp2((z - top[:, None]) * LOG2_E), 0.0), 1)
    return top + LN_2 * tl.log2(total) + log_eps


@triton.jit
def gradient_tile(e, factor, c, upstream, beta, col, inside, y, own_gradient, weight, present, REAL: tl.constexpr):
    """The gradient of a tile from its exponentials: the label's lane is `own_gradient`."""
    w = tl.load(weight + col, mask=inside & has(present, WEIGHT), other=1.0).to(REAL)
    g = (upstream * factor)[:, None] * e - (upstream * c)[:, None] * w[None, :]
    return tl.where(col[None, :] == y[:, None], own_gradient[:, None], g * beta[None, :])


@triton.jit
def one_label(
    z, own, y, share, upstream, row, col, inside, beta, x, shift, scale, margin, row_scale, weight, table, seed,
    gamma, smoothing, classes, present, o0, o1, o2, o3, floor,
    FORM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Loss and gradient (not used unless GRAD) of one label a row; the whole rows are in `z`."""
    if FORM == SIGMOID:
        alpha = gather(weight, y, has(present, WEIGHT), 1.0, REAL) * share
        negative = tl.load(table + col, mask=inside & has(present, TABLE), other=1.0).to(REAL)[None, :]
        each, slope = softplus(z, gamma, REAL)
        counts = inside[None, :] & (col[None, :] != y[:, None])
        label_loss, label_slope = softplus(-own, gamma, REAL)
        loss = alpha * (label_loss + tl.sum(tl.where(counts, negative * each, 0.0), 1))
        outer = (upstream * alpha)[:, None]
        g = tl.where(col[None, :] == y[:, None], -outer * label_slope[:, None], outer * negative * slope)
    else:
        beta_y = gather(scale, y, has(present, SCALE), 1.0, REAL)
        delta_y = gather(shift, y, has(present, SHIFT), 0.0, REAL)
        sigma, sigma2, label_a, slope, alpha = label_data(
            own, y, margin, row_scale, weight, beta_y, delta_y, present, o0, o1, o2, o3, FORM, REAL
        )
        reference = tl.maximum(own, floor)
        a, counts = adjusted(z, x, y, sigma2, reference, row, col, inside, table, seed, o0, o1, FORM, REAL)
        top = tl.zeros_like(own) - float("inf")
        top, others, e = online(top, tl.zeros_like(own), a, counts)
        smooth_a = tl.zeros_like(own)
        total_weight = tl.sum(smooth_a, 0)
        if smoothing != 0.0:
            smooth_a, total_weight = smoothing_sums(a, counts, weight, col, inside, present, REAL)
        loss, highest, k, c, own_gradient = finish(
            top, others, smooth_a, total_weight, label_a, alpha, share, gamma, smoothing, classes
        )
        outer = upstream * sigma
        factor = k * tl.exp2(top - highest)
        own_gradient = outer * beta_y * slope * own_gradient
        g = gradient_tile(e, factor, c, outer, beta, col, inside, y, own_gradient, weight, present, REAL)
    return loss, g


@kernel
def rows(
    z, z_stride: tl.int64, grad, grad_stride: tl.int64, row_loss, parts, count: tl.int32,
    target, target_b, lam, shift, scale, margin, row_scale, weight, row_coef, table, seed,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32,
    focal_gamma: tl.float64, label_smoothing: tl.float64,
    option0: tl.float64, option1: tl.float64, option2: tl.float64, option3: tl.float64,
    FORM: tl.constexpr, TABLES: tl.constexpr, MIXED: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """R whole rows a program, held in registers: at most C classes."""
    gamma = tl.full((), focal_gamma, REAL)
    smoothing = tl.full((), label_smoothing, REAL)
    o0, o1 = tl.full((), option0, REAL), tl.full((), option1, REAL)
    o2, o3 = tl.full((), option2, REAL), tl.full((), option3, REAL)
    if ALIGNED:  # what the compiler must know for 16-byte accesses
        classes = classes // 16 * 16
        z_stride = z_stride // 16 * 16
        grad_stride = grad_stride // 16 * 16
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    y, yb, share, valid, bad = labels(target, target_b, lam, row, n, classes, ignore_index, MIXED, REAL)
    upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
    start = z + row * z_stride
    # Before anything is written: the gradient may replace the logits.
    own = tl.load(start + y, mask=valid, other=0.0).to(REAL)
    own_b = own
    if MIXED:
        own_b = tl.load(start + yb, mask=valid, other=0.0).to(REAL)
    col, inside, zt, beta, x = load_tile(
        start, 0, tl.arange(0, C), classes, valid, shift, scale, present, TABLES, ALIGNED, REAL
    )
    floor = own
    if FORM == SEESAW:
        floor = seesaw_floor(zt, inside, o2)
    loss, g = one_label(
        zt, own, y, share, upstream, row, col, inside, beta, x, shift, scale, margin, row_scale, weight, table, seed,
        gamma, smoothing, classes, present, o0, o1, o2, o3, floor, FORM, GRAD, REAL,
    )  # fmt: skip
    if MIXED:
        loss_b, g_b = one_label(
            zt, own_b, yb, 1.0 - share, upstream, row, col, inside, beta, x, shift, scale, margin, row_scale, weight,
            table, seed, gamma, smoothing, classes, present, o0, o1, o2, o3, floor, FORM, GRAD, REAL,
        )  # fmt: skip
        loss += loss_b
        g += g_b
    loss = tl.where(bad, float("nan"), tl.where(valid, loss, 0.0))
    tl.store(row_loss + row, loss, mask=row < n)
    if GRAD:
        store_tile(grad, g, row, grad_stride, col, inside, n, valid, bad, ALIGNED)


# ---- rows that do not fit into registers, and gradients from saved statistics ----------------------------------------


@triton.jit
def load_tile(start, first, col, classes, valid, shift, scale, present, TABLES: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr):
    """(columns, which of them exist, z, beta, beta z + delta) of the tile that starts at column `first`."""
    at = first + col
    inside = at < classes
    address = start[:, None] + at[None, :]
    if ALIGNED:
        address = tl.multiple_of(address, (16, 16))
    z = tl.load(address, mask=valid[:, None] & inside[None, :], other=0.0).to(REAL)
    beta = tl.zeros_like(at).to(REAL) + 1.0
    x = z
    if TABLES:
        beta = tl.load(scale + at, mask=inside & has(present, SCALE), other=1.0).to(REAL)
        x = beta[None, :] * z + tl.load(shift + at, mask=inside & has(present, SHIFT), other=0.0).to(REAL)[None, :]
    return at, inside, z, beta, x


@triton.jit
def save(stats, index: tl.constexpr, row, n, highest, k, c, own_gradient, reference):
    """Statistics (label, 5, n) of one label."""
    at = stats + index * 5 * n + row
    tl.store(at, highest, mask=row < n)
    tl.store(at + n, k, mask=row < n)
    tl.store(at + 2 * n, c, mask=row < n)
    tl.store(at + 3 * n, own_gradient, mask=row < n)
    tl.store(at + 4 * n, reference, mask=row < n)


@triton.jit
def tile_gradient(
    z, x, y, sigma2, highest, k, c, own_gradient, reference, upstream, row, col, inside, beta, weight, table, seed,
    gamma, present, o0, o1, FORM: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Gradient of one label's loss in a tile, from the row's statistics."""
    if FORM == SIGMOID:
        _, slope = softplus(z, gamma, REAL)
        negative = tl.load(table + col, mask=inside & has(present, TABLE), other=1.0).to(REAL)
        g = (upstream * k)[:, None] * negative[None, :] * slope
        g = tl.where(col[None, :] == y[:, None], (upstream * own_gradient)[:, None], g)
    else:
        a, counts = adjusted(z, x, y, sigma2, reference, row, col, inside, table, seed, o0, o1, FORM, REAL)
        e = tl.where(counts, tl.exp2(a - highest[:, None]), 0.0)
        g = gradient_tile(e, k, c, upstream, beta, col, inside, y, upstream * own_gradient, weight, present, REAL)
    return g


@kernel
def long_rows(
    z, z_stride: tl.int64, grad, grad_stride: tl.int64, row_loss, stats, parts, count: tl.int32,
    target, target_b, lam, shift, scale, margin, row_scale, weight, row_coef, table, seed,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32,
    focal_gamma: tl.float64, label_smoothing: tl.float64,
    option0: tl.float64, option1: tl.float64, option2: tl.float64, option3: tl.float64,
    FORM: tl.constexpr, TABLES: tl.constexpr, MIXED: tl.constexpr, GRAD: tl.constexpr, STATS: tl.constexpr,
    ALIGNED: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """One row a program, C columns at a time: statistics, then (GRAD) the gradient; or (STATS) the statistics saved."""
    gamma = tl.full((), focal_gamma, REAL)
    smoothing = tl.full((), label_smoothing, REAL)
    o0, o1 = tl.full((), option0, REAL), tl.full((), option1, REAL)
    o2, o3 = tl.full((), option2, REAL), tl.full((), option3, REAL)
    if ALIGNED:
        classes = classes // 16 * 16
        z_stride = z_stride // 16 * 16
        grad_stride = grad_stride // 16 * 16
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    col = tl.arange(0, C)
    y, yb, share, valid, bad = labels(target, target_b, lam, row, n, classes, ignore_index, MIXED, REAL)
    upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
    start = z + row * z_stride
    own = tl.load(start + y, mask=valid, other=0.0).to(REAL)
    own_b = own
    if MIXED:
        own_b = tl.load(start + yb, mask=valid, other=0.0).to(REAL)
    nothing = tl.zeros([1], REAL)
    floor = nothing
    if FORM == SEESAW:
        top, others = nothing - float("inf"), nothing
        for first in range(0, classes, C):
            at, inside, zt, beta, x = load_tile(start, first, col, classes, valid, shift, scale, present, TABLES, ALIGNED, REAL)
            counts = inside[None, :] & valid[:, None]
            top, others, e = online(top, others, tl.where(counts, zt * LOG2_E, -float("inf")), counts)
        floor = LN_2 * (top + tl.log2(others)) + o2

    if FORM == SIGMOID:
        alpha = gather(weight, y, has(present, WEIGHT), 1.0, REAL) * share
        alpha_b = gather(weight, yb, has(present, WEIGHT), 1.0, REAL) * (1.0 - share)
        own_loss, own_slope = softplus(-own, gamma, REAL)
        own_loss_b, own_slope_b = softplus(-own_b, gamma, REAL)
        sigma2, highest, k, c, own_gradient = nothing, nothing, alpha, nothing, -alpha * own_slope
        sigma2_b, highest_b, k_b, c_b, own_gradient_b = nothing, nothing, alpha_b, nothing, -alpha_b * own_slope_b
        sum_a, sum_b = nothing, nothing
        for first in range(0, classes, C):
            at, inside, zt, beta, x = load_tile(start, first, col, classes, valid, shift, scale, present, TABLES, ALIGNED, REAL)
            each, slope = softplus(zt, gamma, REAL)
            each = each * tl.load(table + at, mask=inside & has(present, TABLE), other=1.0).to(REAL)[None, :]
            sum_a += tl.sum(tl.where(inside[None, :] & (at[None, :] != y[:, None]), each, 0.0), 1)
            if MIXED:
                sum_b += tl.sum(tl.where(inside[None, :] & (at[None, :] != yb[:, None]), each, 0.0), 1)
        loss = alpha * (own_loss + sum_a)
        if MIXED:
            loss += alpha_b * (own_loss_b + sum_b)
    else:
        beta_y, delta_y = gather(scale, y, has(present, SCALE), 1.0, REAL), gather(shift, y, has(present, SHIFT), 0.0, REAL)
        sigma, sigma2, label_a, own_slope, alpha = label_data(
            own, y, margin, row_scale, weight, beta_y, delta_y, present, o0, o1, o2, o3, FORM, REAL
        )
        beta_b, delta_b = gather(scale, yb, has(present, SCALE), 1.0, REAL), gather(shift, yb, has(present, SHIFT), 0.0, REAL)
        sigma_b, sigma2_b, label_b, own_slope_b, alpha_b = label_data(
            own_b, yb, margin, row_scale, weight, beta_b, delta_b, present, o0, o1, o2, o3, FORM, REAL
        )
        top, others, smooth, total_weight = nothing - float("inf"), nothing, nothing, tl.sum(nothing, 0)
        top_b, others_b, smooth_b = nothing - float("inf"), nothing, nothing
        for first in range(0, classes, C):
            at, inside, zt, beta, x = load_tile(start, first, col, classes, valid, shift, scale, present, TABLES, ALIGNED, REAL)
            a, counts = adjusted(zt, x, y, sigma2, tl.maximum(own, floor), row, at, inside, table, seed, o0, o1, FORM, REAL)
            top, others, e = online(top, others, a, counts)
            if smoothing != 0.0:
                each, part = smoothing_sums(a, counts, weight, at, inside, present, REAL)
                smooth += each
                total_weight += part
            if MIXED:
                a, counts = adjusted(zt, x, yb, sigma2_b, tl.maximum(own_b, floor), row, at, inside, table, seed, o0, o1, FORM, REAL)
                top_b, others_b, e = online(top_b, others_b, a, counts)
                if smoothing != 0.0:
                    each, part = smoothing_sums(a, counts, weight, at, inside, present, REAL)
                    smooth_b += each
        loss, highest, k, c, own_gradient = finish(
            top, others, smooth, total_weight, label_a, alpha, share, gamma, smoothing, classes
        )
        k, c, own_gradient = k * sigma, c * sigma, own_gradient * sigma * beta_y * own_slope
        highest_b, k_b, c_b, own_gradient_b = highest, k, c, own_gradient
        if MIXED:
            loss_b, highest_b, k_b, c_b, own_gradient_b = finish(
                top_b, others_b, smooth_b, total_weight, label_b, alpha_b, 1.0 - share, gamma, smoothing, classes
            )
            loss += loss_b
            k_b, c_b, own_gradient_b = k_b * sigma_b, c_b * sigma_b, own_gradient_b * sigma_b * beta_b * own_slope_b
    tl.store(row_loss + row, tl.where(bad, float("nan"), tl.where(valid, loss, 0.0)), mask=row < n)

    if STATS:
        save(stats, 0, row, n, highest, k, c, own_gradient, tl.maximum(own, floor))
        if MIXED:
            save(stats, 1, row, n, highest_b, k_b, c_b, own_gradient_b, tl.maximum(own_b, floor))
    if GRAD:
        for first in range(0, classes, C):
            at, inside, zt, beta, x = load_tile(start, first, col, classes, valid, shift, scale, present, TABLES, ALIGNED, REAL)
            g = tile_gradient(
                zt, x, y, sigma2, highest, k, c, own_gradient, tl.maximum(own, floor), upstream, row, at, inside, beta,
                weight, table, seed, gamma, present, o0, o1, FORM, REAL,
            )  # fmt: skip
            if MIXED:
                g += tile_gradient(
                    zt, x, yb, sigma2_b, highest_b, k_b, c_b, own_gradient_b, tl.maximum(own_b, floor), upstream, row, at,
                    inside, beta, weight, table, seed, gamma, present, o0, o1, FORM, REAL,
                )  # fmt: skip
            store_tile(grad, g, row, grad_stride, at, inside, n, valid, bad, ALIGNED)


@triton.jit
def store_tile(grad, g, row, stride, at, inside, n, valid, bad, ALIGNED: tl.constexpr):
    """Ignored rows get 0 and rows with a bad label NaN, whatever was computed."""
    g = tl.where(bad[:, None], float("nan"), tl.where(valid[:, None], g, 0.0))
    to = (grad + row * stride)[:, None] + at[None, :]
    if ALIGNED:
        to = tl.multiple_of(to, (16, 16))
    tl.store(to, g.to(grad.dtype.element_ty), mask=(row < n)[:, None] & inside[None, :])


@kernel
def gradient_from_statistics(
    z, z_stride: tl.int64, grad, grad_stride: tl.int64, stats, parts, count: tl.int32,
    target, target_b, lam, shift, scale, row_scale, weight, row_coef, table, seed,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32,
    focal_gamma: tl.float64, option0: tl.float64, option1: tl.float64,
    FORM: tl.constexpr, TABLES: tl.constexpr, MIXED: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """R rows by C columns a program: nothing is reduced, so rows of any length spread over the whole GPU."""
    gamma = tl.full((), focal_gamma, REAL)
    o0, o1 = tl.full((), option0, REAL), tl.full((), option1, REAL)
    if ALIGNED:
        classes = classes // 16 * 16
        z_stride = z_stride // 16 * 16
        grad_stride = grad_stride // 16 * 16
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    first = tl.program_id(1) * C
    y, yb, share, valid, bad = labels(target, target_b, lam, row, n, classes, ignore_index, MIXED, REAL)
    upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
    start = z + row * z_stride
    at, inside, zt, beta, x = load_tile(
        start, first, tl.arange(0, C), classes, valid, shift, scale, present, TABLES, ALIGNED, REAL
    )
    g = statistics_gradient(
        stats, zt, x, y, upstream, row, n, at, inside, beta, row_scale, weight, table, seed, gamma, present,
        o0, o1, FORM, REAL,
    )  # fmt: skip
    if MIXED:
        g += statistics_gradient(
            stats + 5 * n, zt, x, yb, upstream, row, n, at, inside, beta, row_scale, weight, table, seed,
            gamma, present, o0, o1, FORM, REAL,
        )  # fmt: skip
    store_tile(grad, g, row, grad_stride, at, inside, n, valid, bad, ALIGNED)


@triton.jit
def statistics_gradient(
    stats, z, x, y, upstream, row, n, at, inside, beta, row_scale, weight, table, seed, gamma, present,
    o0, o1, FORM: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    saved = stats + row
    highest = tl.load(saved, mask=row < n, other=0.0)
    k = tl.load(saved + n, mask=row < n, other=0.0)
    c = tl.load(saved + 2 * n, mask=row < n, other=0.0)
    own_gradient = tl.load(saved + 3 * n, mask=row < n, other=0.0)
    reference = tl.load(saved + 4 * n, mask=row < n, other=0.0)
    sigma2 = gather(row_scale, y, has(present, ROW_SCALE), 1.0, REAL) * LOG2_E
    return tile_gradient(
        z, x, y, sigma2, highest, k, c, own_gradient, reference, upstream, row, at, inside, beta, weight, table, seed,
        gamma, present, o0, o1, FORM, REAL,
    )  # fmt: skip
