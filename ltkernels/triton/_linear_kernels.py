"""Classifier and loss in tiles: R rows by C classes of logits are formed, used and dropped; nothing of size B x C exists.

Three steps: `tile_statistics` (maximum and sum of every row over a part of the classes), `combine` (the parts of a row,
in their order, to its loss and its statistics), `input_gradient` (forms the tiles again, turns them into their gradient
and multiplies that by the other input). A program owns the rows or classes of the gradient it adds to, and goes through
the tiles in their order: no atomics, the same bits each time. Nothing is skipped for being small. Width and strides of both inputs are
multiples of VECTOR elements, their addresses of 16 bytes; the launcher sees to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._kernels import VECTOR, labels, store_loss, upstream_of, weight_of
from ._long_rows import tile_gradient
from ._row import (
    BIAS,
    FEATURE_NORM,
    LOG2_E,
    ROW_SCALE,
    SCALE,
    SHIFT,
    SMOOTHING,
    WEIGHT_NORM,
    adjusted,
    finish,
    gather,
    has,
    kernel,
    label_data,
    label_factor,
    online,
    smoothing_sums,
    true,
)

EPS = tl.constexpr(1e-12)  # of both norms, as torch.nn.functional.normalize
STATISTICS = tl.constexpr(4)  # numbers of a row and label: highest, k, c, own gradient (`_row.finish`)
PARTS = tl.constexpr(5)  # numbers of a row, label and part: maximum, sum, smoothing sum, weights, the label's logit


@triton.jit
def inverse(norm):
    """1 / max(norm, eps), and 0 for a norm that is not finite: the cosine is then 0, or NaN where an entry is not."""
    return tl.where(norm < float("inf"), 1.0 / tl.maximum(norm, EPS), 0.0)


@kernel
def norms(norm, vectors, stride: tl.int64, width: tl.int32, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """Euclidean norm of one row of `vectors` a program."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], REAL)
    for first in range(0, width, BLOCK):
        k = first + tl.arange(0, BLOCK)
        v = tl.load(vectors + row * stride + k, mask=k < width, other=0.0).to(REAL)
        total += v * v
    tl.store(norm + row, tl.sqrt(tl.sum(total, 0)))


@triton.jit
def inverse_norms(norm, at, mask, wanted, REAL: tl.constexpr):
    return tl.where(wanted, inverse(tl.load(norm + at, mask=mask & wanted, other=1.0).to(REAL)), 1.0)


@triton.jit
def logit_tile(
    features, features_stride, weight_matrix, weight_stride, bias, feature_norm, weight_norm, shift, scale,
    row, col, n, classes, width, present,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(z, beta z + delta, beta, 1 / |x|, 1 / |w|) of the rows `row` and classes `col`; z = x . w / (|x| |w|) + bias."""
    z = tl.zeros([R, C], REAL)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        at = tl.multiple_of(features + (row * features_stride)[:, None] + k[None, :], (16, 16))
        wt = tl.multiple_of(weight_matrix + (col * weight_stride)[None, :] + k[:, None], (16, 16))
        x = tl.load(at, mask=(row < n)[:, None] & (k < width)[None, :], other=0.0)
        w = tl.load(wt, mask=(col < classes)[None, :] & (k < width)[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision=PRECISION, out_dtype=REAL)
    inside = col < classes
    by_row = inverse_norms(feature_norm, row, row < n, has(present, FEATURE_NORM), REAL)
    by_class = inverse_norms(weight_norm, col, inside, has(present, WEIGHT_NORM), REAL)
    z = z * by_row[:, None] * by_class[None, :]
    z += tl.load(bias + col, mask=inside & has(present, BIAS), other=0.0).to(REAL)[None, :]
    beta = tl.load(scale + col, mask=inside & has(present, SCALE), other=1.0).to(REAL)[None, :]
    x = beta * z + tl.load(shift + col, mask=inside & has(present, SHIFT), other=0.0).to(REAL)[None, :]
    return z, x, beta, by_row, by_class


@triton.jit
def fold(
    top, others, smooth_a, total_weight, own, z, x, y, sigma2, row, col, inside, weight, present,
    R: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Adds a tile to a label's running sums. Those of smoothing too, whether it is wanted or not: the products take longer."""
    a, counts = adjusted(z, x, y, sigma2, own, row, col, inside, weight, weight, 0.0, 0.0, 0, R, False, REAL)
    own += tl.sum(tl.where(inside[None, :] & (col[None, :] == y[:, None]), z, 0.0), 1)
    sum_a, sum_weight = smoothing_sums(a, counts, weight, col, inside, present, 1, False, REAL)
    smooth_a += sum_a
    total_weight += sum_weight
    top, others, _e = online(top, others, a, counts)
    return top, others, smooth_a, total_weight, own


@triton.jit
def save_part(parts, index, part, count, row, n, top, others, smooth_a, total_weight, own):
    at = parts + (index * count + part) * PARTS * n + row
    tl.store(at, top, mask=row < n)
    tl.store(at + n, others, mask=row < n)
    tl.store(at + 2 * n, smooth_a, mask=row < n)
    tl.store(at + 3 * n, total_weight, mask=row < n)
    tl.store(at + 4 * n, own, mask=row < n)


@kernel
def tile_statistics(
    parts, features, features_stride: tl.int64, weight_matrix, weight_stride: tl.int64, bias, feature_norm, weight_norm,
    target, target_b, lam, shift, scale, row_scale, weight,
    n: tl.int64, classes: tl.int32, width: tl.int32, ignore_index: tl.int64, present: tl.int32, steps: tl.int32,
    MIXED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Sums of R rows over `steps` tiles of C classes: (labels, parts, PARTS, n)."""
    width = width // VECTOR * VECTOR  # what the compiler must know for 16-byte accesses
    features_stride = features_stride // VECTOR * VECTOR
    weight_stride = weight_stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    part = tl.program_id(1).to(tl.int64)
    count = tl.num_programs(1)
    y, yb, _share, _valid, _bad = labels(target, target_b, lam, row, n, classes, ignore_index, MIXED, REAL)
    sigma2 = gather(row_scale, y, has(present, ROW_SCALE), 1.0, REAL) * LOG2_E
    sigma2_b = gather(row_scale, yb, has(present, ROW_SCALE), 1.0, REAL) * LOG2_E
    nothing = tl.zeros([R], REAL)
    top, others, smooth_a, total_weight, own = nothing - float("inf"), nothing, nothing, nothing, nothing
    top_b, others_b, smooth_b, total_b, own_b = nothing - float("inf"), nothing, nothing, nothing, nothing
    for step in range(steps):
        col = (part * steps + step) * C + tl.arange(0, C)
        inside = col < classes
        z, x, _beta, _by_row, _by_class = logit_tile(
            features, features_stride, weight_matrix, weight_stride, bias, feature_norm, weight_norm, shift, scale, row,
            col, n, classes, width, present, R, C, K, PRECISION, REAL,
        )  # fmt: skip
        top, others, smooth_a, total_weight, own = fold(
            top, others, smooth_a, total_weight, own, z, x, y, sigma2, row, col, inside, weight, present, R, REAL,
        )  # fmt: skip
        if MIXED:
            top_b, others_b, smooth_b, total_b, own_b = fold(
                top_b, others_b, smooth_b, total_b, own_b, z, x, yb, sigma2_b, row, col, inside, weight, present, R,
                REAL,
            )  # fmt: skip
    save_part(parts, 0, part, count, row, n, top, others, smooth_a, total_weight, own)
    if MIXED:
        save_part(parts, 1, part, count, row, n, top_b, others_b, smooth_b, total_b, own_b)


@triton.jit
def combine_label(
    stats, parts, index, count, row, n, y, share, shift, scale, margin, row_scale, weight, smoothing, label_scale, gamma,
    eps, classes, present, R: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Loss of one label a row; its statistics go to `stats`."""
    nothing = tl.zeros([R], REAL)
    top, others, smooth_a, total_weight, own = nothing - float("inf"), nothing, nothing, nothing, nothing
    for part in range(count):
        at = parts + (index * count + part) * PARTS * n + row
        here = tl.load(at, mask=row < n, other=0.0)
        new = tl.maximum(top, here)
        reference = tl.where(new == -float("inf"), 0.0, new)
        others *= tl.exp2(top - reference)
        others += tl.load(at + n, mask=row < n, other=0.0) * tl.exp2(here - reference)
        smooth_a += tl.load(at + 2 * n, mask=row < n, other=0.0)
        total_weight += tl.load(at + 3 * n, mask=row < n, other=0.0)
        own += tl.load(at + 4 * n, mask=row < n, other=0.0)
        top = new
    beta_y = label_factor(scale, label_scale, y, present, REAL)
    delta_y = gather(shift, y, has(present, SHIFT), 0.0, REAL)
    sigma, _sigma2, label_a, _slope, alpha = label_data(
        own, y, margin, row_scale, weight, beta_y, delta_y, present, 0.0, 0.0, 0.0, 0.0, 0, REAL
    )
    eps_y = gather(smoothing, y, has(present, SMOOTHING), eps, REAL)
    loss, highest, k, c, own_gradient = finish(
        top, others, smooth_a, total_weight, label_a, alpha, share, gamma, eps_y, classes, True
    )
    at = stats + index * STATISTICS * n + row
    tl.store(at, highest, mask=row < n)
    tl.store(at + n, k * sigma, mask=row < n)
    tl.store(at + 2 * n, c * sigma, mask=row < n)
    tl.store(at + 3 * n, own_gradient * sigma * beta_y, mask=row < n)
    return loss


@kernel
def combine(
    stats, row_loss, parts, count: tl.int32, target, target_b, lam, shift, scale, margin, row_scale, weight,
    sample_weight, smoothing, label_scale,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32, mixed: tl.int32,
    focal_gamma: tl.float64, label_smoothing: tl.float64, R: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    gamma = tl.full((), focal_gamma, REAL)
    eps = tl.full((), label_smoothing, REAL)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    y, yb, share, valid, bad = labels(target, target_b, lam, row, n, classes, ignore_index, mixed, REAL)
    own_weight = weight_of(sample_weight, row, valid, present, REAL)
    loss = combine_label(
        stats, parts, 0, count, row, n, y, share * own_weight, shift, scale, margin, row_scale, weight, smoothing, label_scale, gamma,
        eps, classes, present, R, REAL,
    )  # fmt: skip
    if mixed != 0:
        loss += combine_label(
            stats, parts, 1, count, row, n, yb, (1.0 - share) * own_weight, shift, scale, margin, row_scale, weight, smoothing,
            label_scale, gamma, eps, classes, present, R, REAL,
        )  # fmt: skip
    store_loss(row_loss, loss, row, n, valid, bad)


@triton.jit
def logit_gradient(
    stats, z, x, y, upstream, row, n, col, inside, beta, row_scale, weight, present, R: tl.constexpr, REAL: tl.constexpr
):
    """dL/dz of one label in a tile."""
    at = stats + row
    highest = tl.load(at, mask=row < n, other=0.0)
    k = tl.load(at + n, mask=row < n, other=0.0)
    c = tl.load(at + 2 * n, mask=row < n, other=0.0)
    own_gradient = tl.load(at + 3 * n, mask=row < n, other=0.0)
    sigma2 = gather(row_scale, y, has(present, ROW_SCALE), 1.0, REAL) * LOG2_E
    return tile_gradient(
        z, x, y, sigma2, highest, k, c, own_gradient, highest, upstream, row, col, inside, beta, weight, weight, weight,
        0.0, present, 0.0, 0.0, 0, True, 1, False, REAL,
    )  # fmt: skip


@kernel
def input_gradient(
    out, bias_out, stats, parts, count: tl.int32,
    features, features_stride: tl.int64, weight_matrix, weight_stride: tl.int64, bias, feature_norm, weight_norm,
    target, target_b, lam, shift, scale, row_scale, weight, row_coef,
    n: tl.int64, classes: tl.int32, width: tl.int32, ignore_index: tl.int64, present: tl.int32, steps: tl.int32,
    BY_CLASS: tl.constexpr, MIXED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Part of the gradient with respect to the features (a program owns R rows and goes through `steps` tiles of
    classes) or, BY_CLASS, to the weights and the bias (it owns C classes and goes through `steps` tiles of rows).

    out: (parts, n or classes, width), with the other input's norm divided out; bias_out: (parts, classes).
    """
    width = width // VECTOR * VECTOR
    features_stride = features_stride // VECTOR * VECTOR
    weight_stride = weight_stride // VECTOR * VECTOR
    owner = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    bias_sum = tl.zeros([C], REAL)
    for step in range(steps):
        other = part * steps + step
        row = (other if BY_CLASS else owner) * R + tl.arange(0, R)
        col = (owner if BY_CLASS else other) * C + tl.arange(0, C)
        inside = col < classes
        y, yb, _share, valid, bad = labels(target, target_b, lam, row, n, classes, ignore_index, MIXED, REAL)
        upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
        z, x, beta, by_row, by_class = logit_tile(
            features, features_stride, weight_matrix, weight_stride, bias, feature_norm, weight_norm, shift, scale, row,
            col, n, classes, width, present, R, C, K, PRECISION, REAL,
        )  # fmt: skip
        g = logit_gradient(stats, z, x, y, upstream, row, n, col, inside, beta, row_scale, weight, present, R, REAL)
        if MIXED:
            g += logit_gradient(
                stats + STATISTICS * n,
                z,
                x,
                yb,
                upstream,
                row,
                n,
                col,
                inside,
                beta,
                row_scale,
                weight,
                present,
                R,
                REAL,
            )
        g = tl.where(bad[:, None], float("nan"), tl.where(valid[:, None] & inside[None, :], g, 0.0))
        if BY_CLASS:
            bias_sum += tl.sum(g, 0)
            left = tl.trans((g * by_row[:, None]).to(OPERAND))
            # An ignored row may hold NaN: 0 times that would not be 0.
            at, limit, source_at, wanted = col, classes, row, valid
            vectors, stride, total = features, features_stride, classes.to(tl.int64)
        else:
            left = (g * by_class[None, :]).to(OPERAND)
            at, limit, source_at, wanted = row, n, col, inside
            vectors, stride, total = weight_matrix, weight_stride, n
        for first in range(0, width, K):
            k = first + tl.arange(0, K)
            source = tl.multiple_of(vectors + (source_at * stride)[:, None] + k[None, :], (16, 16))
            right = tl.load(source, mask=wanted[:, None] & (k < width)[None, :], other=0.0).to(OPERAND)
            to = tl.multiple_of(out + ((part * total + at) * width)[:, None] + k[None, :], (16, 16))
            mask = (at < limit)[:, None] & (k < width)[None, :]
            so_far = tl.load(to, mask=mask & true(step > 0), other=0.0)
            tl.store(to, tl.dot(left, right, so_far, input_precision=PRECISION, out_dtype=REAL), mask=mask)
        # The next step reads what this one wrote, possibly by other threads of the program.
        tl.debug_barrier()
    if BY_CLASS:
        col = owner * C + tl.arange(0, C)
        tl.store(bias_out + part * classes + col, bias_sum, mask=col < classes)


@kernel
def gather_parts(
    into, out, count: tl.int32, vectors, stride: tl.int64, norm, n: tl.int64, width: tl.int32, normalize: tl.int32,
    BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """into (n, width) = the parts (count, n, width) added in their order; with `normalize`, taken through the norm of
    `vectors`: without its part along the vector, over the norm. A norm below eps counts as constant. One row a
    program."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(norm + row, mask=normalize != 0, other=1.0).to(REAL)
    factor = inverse(length)
    along = tl.zeros([BLOCK], REAL)
    for first in range(0, width, BLOCK):
        k = first + tl.arange(0, BLOCK)
        g = tl.zeros([BLOCK], REAL)
        for part in range(count):
            g += tl.load(out + (part * n + row) * width + k, mask=k < width, other=0.0)
        v = tl.load(vectors + row * stride + k, mask=k < width, other=0.0).to(REAL)
        along += g * (v * factor)
        tl.store(into + row * width + k, g, mask=k < width)
    tl.debug_barrier()
    if normalize != 0:
        share = tl.where(length >= EPS, tl.sum(along, 0), 0.0)
        for first in range(0, width, BLOCK):
            k = first + tl.arange(0, BLOCK)
            v = tl.load(vectors + row * stride + k, mask=k < width, other=0.0).to(REAL)
            g = tl.load(into + row * width + k, mask=k < width, other=0.0)
            # The factor of a vector that is not finite is 0; an ignored one's gradient stays 0.
            g = tl.where(factor == 0.0, g, g - v * factor * share) * factor
            tl.store(into + row * width + k, g, mask=k < width)
