"""The kernel for whatever `_kernels.rows` does not do: rows too long for registers, smoothing, mixed labels, closed forms, float64, the
loss alone. And what the head shares with it: a tile's gradient.

A row goes by in tiles: maximum and sum, then the gradient, whose tiles come out of the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._kernels import VECTOR, gradient_tile, labels, load_tile, store_loss, store_tile, upstream_of, weight_of
from ._row import (
    CLOUD,
    LN_2,
    LOG2_E,
    SCALE,
    SEESAW,
    SHIFT,
    SIGMOID,
    SMOOTHING,
    TABLE,
    VMF,
    WEIGHT,
    adjusted,
    cloud_size,
    exp2,
    finish,
    gather,
    has,
    kernel,
    label_data,
    label_factor,
    online,
    smoothing_sums,
    softplus,
    stream,
    true,
    vmf,
)


@triton.jit
def tile_gradient(
    z, x, y, sigma2, highest, k, c, own_gradient, reference, upstream, row, col, inside, beta, weight, table, seed,
    gamma, present, o0, o1,
    FORM: tl.constexpr, SMOOTH: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Gradient of one label's loss in a tile, from the row's statistics."""
    if FORM == SIGMOID:
        _, slope = softplus(x, gamma, REAL)
        negative = stream(table, col, inside[None, :] & has(present, TABLE), 1.0, R, ALIGNED, REAL)
        g = (upstream * k)[:, None] * tl.where(x < o0, 0.0, negative) * slope * beta
        return tl.where(col[None, :] == y[:, None], (upstream * own_gradient)[:, None], g)
    a, counts = adjusted(z, x, y, sigma2, reference, row, col, inside, table, seed, o0, o1, FORM, R, ALIGNED, REAL)
    e = tl.where(counts, exp2(a - highest[:, None]), 0.0)
    return gradient_tile(
        e, k, c, upstream, beta, col, inside, y, upstream * own_gradient, weight, present, SMOOTH, R, ALIGNED, REAL
    )


@triton.jit
def form_tile(
    start, col, inside, valid, shift, scale, table, classes, present, o0, o1,
    FORM: tl.constexpr, TABLES: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """`load_tile`; of the von Mises-Fisher form (cosine, slope of its logit, logit plus delta)."""
    z, beta, x = load_tile(start, col, inside, valid, shift, scale, present, TABLES, 1, ALIGNED, REAL)
    if FORM == VMF:
        wanted = inside[None, :]
        kappa = stream(table, col, wanted, 0.0, 1, ALIGNED, REAL)
        root = stream(table + classes, col, wanted, 1.0, 1, ALIGNED, REAL)
        log_series = stream(table + 2 * classes, col, wanted, 0.0, 1, ALIGNED, REAL)
        x, beta = vmf(z, kappa, root, log_series, o0, o1)
        x += stream(shift, col, wanted & has(present, SHIFT), 0.0, 1, ALIGNED, REAL)
    return z, beta, x


@triton.jit
def softmax_statistics(
    start, own, y, share, row, valid, reference, shift, scale, margin, row_scale, weight, smoothing, label_scale, table,
    seed, classes, present, gamma, eps, o0, o1, o2, o3,
    FORM: tl.constexpr, TABLES: tl.constexpr, SMOOTH: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """(loss, highest, k, c, own gradient, sigma log2 e) of one label; k, c and the own gradient are those of dL/dz."""
    beta_y = label_factor(scale, label_scale, y, present, REAL)
    value, own_slope = own, tl.zeros_like(own) + 1.0
    if FORM == VMF:
        log_series = gather(table + 2 * classes, y, y >= 0, 0.0, REAL)
        root = gather(table + classes, y, y >= 0, 1.0, REAL)
        value, own_slope = vmf(own, gather(table, y, y >= 0, 0.0, REAL), root, log_series, o0, o1)
    if FORM == CLOUD:
        value -= gather(table, y, y >= 0, 0.0, REAL) * cloud_size(seed, row, y, REAL)
    delta_y = gather(shift, y, has(present, SHIFT), 0.0, REAL)
    sigma, sigma2, label_a, slope, alpha = label_data(
        value, y, margin, row_scale, weight, beta_y, delta_y, present, o0, o1, o2, o3, FORM, REAL
    )
    top, others = tl.zeros_like(own) - float("inf"), tl.zeros_like(own)
    smooth_a, total_weight = tl.zeros_like(own), tl.zeros_like(own)
    for first in range(0, classes, C):
        col = first + tl.arange(0, C)
        inside = col < classes
        z, _beta, x = form_tile(
            start, col, inside, valid, shift, scale, table, classes, present, o0, o1, FORM, TABLES, ALIGNED, REAL
        )
        a, counts = adjusted(z, x, y, sigma2, reference, row, col, inside, table, seed, o0, o1, FORM, 1, ALIGNED, REAL)
        if SMOOTH:
            sum_a, sum_weight = smoothing_sums(a, counts, weight, col, inside, present, 1, ALIGNED, REAL)
            smooth_a += sum_a
            total_weight += sum_weight
        top, others, _e = online(top, others, a, counts)
    eps_y = gather(smoothing, y, has(present, SMOOTHING), eps, REAL)
    loss, highest, k, c, own_gradient = finish(
        top, others, smooth_a, total_weight, label_a, alpha, share, gamma, eps_y, classes, SMOOTH
    )
    return loss, highest, k * sigma, c * sigma, own_gradient * sigma * beta_y * slope * own_slope, sigma2


@triton.jit
def sigmoid_statistics(
    start, own, y, share, valid, shift, scale, weight, table, classes, present, gamma, least, both,
    ALIGNED: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The same of the sigmoid family, whose gradient needs the factor k alone. Negatives count from the logit `least` on; `both`: the
    table has a second row, of the positives."""
    alpha = gather(weight, y, has(present, WEIGHT), 1.0, REAL) * share
    beta_y = gather(scale, y, has(present, SCALE), 1.0, REAL)
    positive = gather(table + classes, y, true(both != 0.0), 1.0, REAL)
    own_loss, own_slope = softplus(-(beta_y * own + gather(shift, y, has(present, SHIFT), 0.0, REAL)), gamma, REAL)
    own_loss, own_slope = positive * own_loss, positive * beta_y * own_slope
    others = tl.zeros_like(own)
    for first in range(0, classes, C):
        col = first + tl.arange(0, C)
        inside = col < classes
        _z, _beta, x = load_tile(start, col, inside, valid, shift, scale, present, True, 1, ALIGNED, REAL)
        each, _slope = softplus(x, gamma, REAL)
        negative = stream(table, col, inside[None, :] & has(present, TABLE), 1.0, 1, ALIGNED, REAL)
        each = tl.where(x < least, 0.0, each * negative)
        others += tl.sum(tl.where(inside[None, :] & (col[None, :] != y[:, None]), each, 0.0), 1)
    nothing = tl.zeros_like(own)
    return alpha * (own_loss + others), nothing, alpha, nothing, -alpha * own_slope, nothing


@triton.jit
def statistics(
    start, own, y, share, row, valid, reference, shift, scale, margin, row_scale, weight, smoothing, label_scale, table,
    seed, classes, present, gamma, eps, o0, o1, o2, o3,
    FORM: tl.constexpr, TABLES: tl.constexpr, SMOOTH: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    if FORM == SIGMOID:
        return sigmoid_statistics(
            start, own, y, share, valid, shift, scale, weight, table, classes, present, gamma, o0, o1, ALIGNED, C, REAL
        )
    return softmax_statistics(
        start, own, y, share, row, valid, reference, shift, scale, margin, row_scale, weight, smoothing, label_scale,
        table, seed, classes, present, gamma, eps, o0, o1, o2, o3, FORM, TABLES, SMOOTH, ALIGNED, C, REAL,
    )  # fmt: skip


@kernel
def long_rows(
    z, z_stride: tl.int64, grad, grad_stride: tl.int64, row_loss, parts, count: tl.int32,
    target, target_b, lam, shift, scale, margin, row_scale, weight, row_coef, table, sample_weight, smoothing,
    label_scale, seed,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32, need_grad: tl.int32,
    focal_gamma: tl.float64, label_smoothing: tl.float64,
    option0: tl.float64, option1: tl.float64, option2: tl.float64, option3: tl.float64,
    FORM: tl.constexpr, TABLES: tl.constexpr, SMOOTH: tl.constexpr, MIXED: tl.constexpr, ALIGNED: tl.constexpr,
    C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Loss of one row a program, C columns at a time; then its gradient, where it is needed."""
    gamma = tl.full((), focal_gamma, REAL)
    eps = tl.full((), label_smoothing, REAL)
    o0, o1 = tl.full((), option0, REAL), tl.full((), option1, REAL)
    o2, o3 = tl.full((), option2, REAL), tl.full((), option3, REAL)
    if ALIGNED:
        classes = classes // VECTOR * VECTOR
        z_stride = z_stride // VECTOR * VECTOR
        grad_stride = grad_stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    y, yb, share, valid, bad = labels(target, target_b, lam, row, n, classes, ignore_index, MIXED, REAL)
    own_weight = weight_of(sample_weight, row, valid, present, REAL)
    start = z + row * z_stride
    # Before anything is written: the gradient may replace the logits.
    own = tl.load(start + y, mask=valid, other=0.0).to(REAL)
    reference = own
    own_b = own
    if MIXED:
        own_b = tl.load(start + yb, mask=valid, other=0.0).to(REAL)
    reference_b = own_b
    if FORM == SEESAW:
        top, others = tl.zeros_like(own) - float("inf"), tl.zeros_like(own)
        for first in range(0, classes, C):
            col = first + tl.arange(0, C)
            inside = col < classes
            zt, beta, x = load_tile(start, col, inside, valid, shift, scale, present, False, 1, ALIGNED, REAL)
            whole = inside[None, :] & valid[:, None]
            top, others, _e = online(top, others, tl.where(whole, zt * LOG2_E, -float("inf")), whole)
        floor = LN_2 * (top + tl.log2(others)) + o2
        reference, reference_b = tl.maximum(own, floor), tl.maximum(own_b, floor)

    loss, highest, k, c, own_gradient, sigma2 = statistics(
        start, own, y, share * own_weight, row, valid, reference, shift, scale, margin, row_scale, weight, smoothing, label_scale,
        table, seed, classes, present, gamma, eps, o0, o1, o2, o3, FORM, TABLES, SMOOTH, ALIGNED, C, REAL,
    )  # fmt: skip
    if MIXED:
        loss_b, highest_b, k_b, c_b, own_gradient_b, sigma2_b = statistics(
            start, own_b, yb, (1.0 - share) * own_weight, row, valid, reference_b, shift, scale, margin, row_scale, weight, smoothing,
            label_scale, table, seed, classes, present, gamma, eps, o0, o1, o2, o3, FORM, TABLES, SMOOTH, ALIGNED, C,
            REAL,
        )  # fmt: skip
        loss += loss_b
    store_loss(row_loss, loss, row, n, valid, bad)

    if need_grad != 0:
        upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
        for first in range(0, classes, C):
            col = first + tl.arange(0, C)
            inside = col < classes
            zt, beta, x = form_tile(
                start, col, inside, valid, shift, scale, table, classes, present, o0, o1, FORM, TABLES, ALIGNED, REAL
            )
            g = tile_gradient(
                zt, x, y, sigma2, highest, k, c, own_gradient, reference, upstream, row, col, inside, beta, weight, table,
                seed, gamma, present, o0, o1, FORM, SMOOTH, 1, ALIGNED, REAL,
            )  # fmt: skip
            if MIXED:
                g += tile_gradient(
                    zt, x, yb, sigma2_b, highest_b, k_b, c_b, own_gradient_b, reference_b, upstream, row, col, inside,
                    beta, weight, table, seed, gamma, present, o0, o1, FORM, SMOOTH, 1, ALIGNED, REAL,
                )  # fmt: skip
            store_tile(grad, g, row, grad_stride, col, inside, n, valid, bad, ALIGNED)
