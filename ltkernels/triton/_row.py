"""What the kernels do to a row, as device functions: the twin of csrc/cpu/adjusted_ce.inl and closed_forms.inl.

A tile is R rows by C columns; what a row needs once is a vector of R. Adjusted logits `a` are kept in base 2 (times
log2 e, folded into the row scale), so that an exponential is one instruction. All arithmetic is in REAL: float32, or
float64 for float64 logits. The label is left out of maximum and sum, because a margin may put it anywhere.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# NVIDIA's exp2 of one instruction, whose denormal results are 0; `tl.exp2` spends three more on them.
FLUSHED = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")

# Bits of `present`: which optional tables a call has. One compiled kernel serves all of them: a load whose mask is
# false moves nothing.
SHIFT = tl.constexpr(1)
SCALE = tl.constexpr(2)
MARGIN = tl.constexpr(4)
ROW_SCALE = tl.constexpr(8)
WEIGHT = tl.constexpr(16)
ROW_COEF = tl.constexpr(32)
TABLE = tl.constexpr(64)
BIAS = tl.constexpr(128)
FEATURE_NORM = tl.constexpr(256)
WEIGHT_NORM = tl.constexpr(512)
ONE_COEF = tl.constexpr(1024)  # row_coef is one number for all rows
SAMPLE_WEIGHT = tl.constexpr(2048)
SMOOTHING = tl.constexpr(4096)  # by label, in place of one number
LABEL_SCALE = tl.constexpr(8192)

# csrc/cpu/adjusted_ce.h: enum Form
SEESAW = tl.constexpr(1)
EQUALIZATION = tl.constexpr(2)
ARCFACE = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
CLOUD = tl.constexpr(5)
VMF = tl.constexpr(6)


def kernel(fn: Callable) -> triton.JITFunction:
    """`triton.jit` that compiles nothing the table of `_configs` does not list: Triton would otherwise add variants by
    the value and alignment of every argument."""
    arguments = inspect.signature(fn).parameters.values()
    return triton.jit(fn, do_not_specialize=[a.name for a in arguments if "constexpr" not in str(a.annotation)])


@triton.jit
def gather(values, at, wanted, default, REAL: tl.constexpr):
    """values[at] where `wanted`, else `default`."""
    return tl.load(values + at, mask=wanted, other=default).to(REAL)


@triton.jit
def stream(values, col, mask, default, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr):
    """values[col] as an R x C tile. In the logits' shape, so that it is loaded in the logits' layout: a vector would be
    exchanged through shared memory."""
    at = tl.broadcast_to((values + col)[None, :], R, col.shape[0])
    if ALIGNED:
        at = tl.multiple_of(at, (16, 16))
    return tl.load(at, mask=mask, other=default).to(REAL)


@triton.jit
def exp2(x):
    """2^x of a tile; what would be denormal may be 0."""
    if FLUSHED and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def has(present, BIT: tl.constexpr):
    return true((present & BIT) != 0)


@triton.jit
def true(condition):
    """A scalar condition that a tile's mask can be combined with: the interpreter makes an integer of any other."""
    return tl.where(condition, True, False)


@triton.jit
def log1p(x):
    """log(1 + x) for finite x > -1 with the relative accuracy of `log`: the rounding of 1 + x cancels in the ratio."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def mix32(x):
    """lowbias32 of Chris Wellons' hash prospector."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def draws(seed, row, col):
    """32 random bits, a function of (seed, row, class); losses/_terms.py has its twin."""
    state = tl.load(seed)
    key = mix32(mix32(mix32(state.to(tl.uint32)) ^ (state >> 32).to(tl.uint32)) ^ row.to(tl.uint32))
    return mix32(mix32(col.to(tl.uint32) + 0x9E3779B9) ^ key)


@triton.jit
def equalization_mask(seed, row, col, probability24, REAL: tl.constexpr):
    """Which classes softmax equalization draws, by 24 bits."""
    return (draws(seed, row[:, None], col[None, :]) >> 8).to(tl.int32).to(REAL) < probability24


@triton.jit
def cloud_size(seed, row, col, REAL: tl.constexpr):
    """Size of a class' noise of Gaussian clouded logits, |normal number| / 3, at most 1; `losses._terms.cloud_sizes` says how it comes of
    the draw. The sine is its series, which needs no reduction of the angle and no memory."""
    first = draws(seed, row, col)
    second = mix32(first + 0x9E3779B9)
    u = ((first >> 8) + 1).to(tl.int32).to(REAL) * 5.9604644775390625e-08  # 2^-24
    v = (second >> 8).to(tl.int32).to(REAL) * (5.9604644775390625e-08 * 1.5707963267948966)
    w = v * v
    tail = tl.zeros_like(w)
    if u.dtype == tl.float64:  # to x^21; float32 has enough at x^11
        tail = 1.6059043836821613e-10 + w * (-7.647163731819816e-13 + w * 2.8114572543455206e-15)
        tail += w * w * w * (-8.22063524662433e-18 + w * 1.9572941063391263e-20)
    q = -1.6666666666666666e-01 + w * (8.333333333333333e-03 + w * -1.984126984126984e-04)
    q += w * w * w * (2.7557319223985893e-06 + w * (-2.505210838544172e-08 + w * tail))
    return tl.minimum(tl.sqrt((-2.0 / 9.0) * tl.log(u)) * (v + v * (w * q)), 1.0)


@triton.jit
def arcface(c, cos_m, sin_m, straight, m_sin_m):
    """cos(theta + m) of a cosine and its slope; beyond theta + m = pi the line c - m sin m. 1 - c^2 as a product, which
    does not cancel near |c| = 1; sin theta counts as 1e-3 at least in the slope, as 1e-7 in float64."""
    square = (1.0 - c) * (1.0 + c)
    sine = tl.sqrt(tl.maximum(square, 0.0))
    floor: tl.constexpr = 1e-7 if c.dtype == tl.float64 else 1e-3
    beyond = c <= -cos_m
    value = tl.where(beyond, c - m_sin_m, c * cos_m - sine * sin_m)
    slope = tl.where(beyond | true(straight != 0), 1.0, cos_m + c / tl.maximum(sine, floor) * sin_m)
    return value, slope


@triton.jit
def vmf(c, kappa, root, log_series, features, tau):
    """ProCo's logit of a cosine and its slope; csrc/cpu/closed_forms.inl says what they are, and why nothing large cancels."""
    nu = 0.5 * features - 1.0
    inverse = 1.0 / nu
    per_kappa = inverse / tau
    d2 = per_kappa * (per_kappa + 2.0 * inverse * kappa * c)
    st = tl.sqrt(tl.maximum(root * root + d2, 1.0))
    ds = d2 / (st + root)
    t = 1.0 / st
    x = t * t
    u1 = (3.0 - 5.0 * x) / 24.0
    u2 = (81.0 + x * (-462.0 + x * 385.0)) / 1152.0
    u3 = (30375.0 + x * (-369603.0 + x * (765765.0 - x * 425425.0))) / 414720.0
    s = t * inverse * (u1 + t * inverse * (u2 + t * inverse * u3))
    value = nu * (ds - log1p(ds / (1.0 + root))) - 0.5 * log1p(ds / root) + (log1p(s) - log_series)
    du1 = (3.0 - 15.0 * x) / 24.0
    du2 = (162.0 + x * (-1848.0 + x * 2310.0)) / 1152.0
    du3 = (91125.0 + x * (-1848015.0 + x * (5360355.0 - x * 3828825.0))) / 414720.0
    ds_dt = inverse * (du1 + t * inverse * (du2 + t * inverse * du3))
    return value, per_kappa * kappa * (1.0 / (1.0 + st) - x * inverse * (0.5 + t * ds_dt / (1.0 + s)))


@triton.jit
def label_factor(scale, label_scale, y, present, REAL: tl.constexpr):
    """What multiplies the label's own logit: beta_y kappa_y."""
    beta_y = gather(scale, y, has(present, SCALE), 1.0, REAL)
    return beta_y * gather(label_scale, y, has(present, LABEL_SCALE), 1.0, REAL)


@triton.jit
def label_data(
    own, y, margin, row_scale, weight, beta_y, delta_y, present, o0, o1, o2, o3, FORM: tl.constexpr, REAL: tl.constexpr
):
    """Of a row's label: sigma, sigma log2 e, its adjusted logit (base 2, margin included), the slope of that in the
    logit, and its weight. `own` is the label's logit, `y` a label in range."""
    sigma = gather(row_scale, y, has(present, ROW_SCALE), 1.0, REAL)
    alpha = gather(weight, y, has(present, WEIGHT), 1.0, REAL)
    slope = tl.zeros_like(own) + 1.0
    value = own
    if FORM == ARCFACE:
        value, slope = arcface(own, o0, o1, o2, o3)
    value = beta_y * value + delta_y - gather(margin, y, has(present, MARGIN), 0.0, REAL)
    sigma2 = sigma * LOG2_E
    return sigma, sigma2, sigma2 * value, slope, alpha


@triton.jit
def adjusted(
    z, x, y, sigma2, reference, row, col, inside, table, seed, o0, o1,
    FORM: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Adjusted logits in base 2, and which of them count: columns of the row but the label's. `x` is beta z + delta;
    `reference` Seesaw's max(z_y, lse + log eps)."""
    counts = inside[None, :] & (col[None, :] != y[:, None])
    if FORM == SEESAW:
        log_counts = stream(table, col, inside[None, :], 0.0, R, ALIGNED, REAL)
        rarer = gather(table, y, y >= 0, 0.0, REAL)[:, None] - log_counts
        x = x - o0 * tl.maximum(rarer, 0.0) + o1 * tl.maximum(z - reference[:, None], 0.0)
    if FORM == EQUALIZATION:
        tail = stream(table, col, inside[None, :], 0.0, R, ALIGNED, REAL) != 0.0
        x = tl.where(equalization_mask(seed, row, col, o0, REAL) & tail, -float("inf"), x)
    if FORM == CLOUD:
        x -= stream(table, col, inside[None, :], 0.0, R, ALIGNED, REAL) * cloud_size(
            seed, row[:, None], col[None, :], REAL
        )
    return tl.where(counts, x * sigma2[:, None], -float("inf")), counts


@triton.jit
def origin(top):
    """What exponentials are relative to: the maximum, and 0 where all is -inf so far, which makes them 0 and not NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def online(top, others, a, counts):
    """Folds a tile into (maximum, sum of 2^(a - maximum)); also the tile's exponentials, relative to the new maximum."""
    new = tl.maximum(top, tl.max(a, 1))
    reference = origin(new)
    e = tl.where(counts, exp2(a - reference[:, None]), 0.0)
    return new, others * tl.exp2(top - reference) + tl.sum(e, 1), e


@triton.jit
def smoothing_sums(a, counts, weight, col, inside, present, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr):
    """Sum of weight * a over the columns that count, and of the weights over all columns of the tile."""
    w = stream(weight, col, inside[None, :] & has(present, WEIGHT), 1.0, R, ALIGNED, REAL)
    return tl.sum(tl.where(counts, w * a, 0.0), 1), tl.sum(tl.where(inside[None, :], w, 0.0), 1)


@triton.jit
def finish(top, others, smooth_a, total_weight, label_a, alpha, share, gamma, smoothing, classes, SMOOTH: tl.constexpr):
    """From a row's sums to its loss, times `share`, and to what its gradient needs: (loss, highest, k, c, g) with
    dL/da_j = k 2^(a_j - highest) - c weight_j and g the label's own dL/da, minus the sum of the others: P_y - 1 cancels
    to 0 on confident rows."""
    highest = tl.maximum(top, label_a)
    others = others * tl.exp2(top - highest)
    label_e = tl.exp2(label_a - highest)
    total = others + label_e
    below = label_a - highest
    p = label_e / total
    q = others / total
    # log1p next to the maximum keeps a small loss; log(total) - (a_y - max) elsewhere.
    nll = tl.where(below > -LOG2_E, log1p(others / label_e), LN_2 * (tl.log2(total) - below))
    # phi(l) = (1 - e^-l)^gamma l, and its derivative; 0 at l = 0 for every gamma > 0. A NaN stays.
    log_q = tl.log2(q)
    phi = tl.exp2(gamma * log_q) * nll
    tail = tl.where(p > 0.0, gamma * nll * p * tl.exp2((gamma - 1.0) * log_q), 0.0)
    slope = tl.exp2(gamma * log_q) + tail
    phi = tl.where(gamma == 0.0, nll, tl.where(q <= 0.0, 0.0, phi))
    slope = tl.where(gamma == 0.0, 1.0, tl.where(q <= 0.0, 0.0, slope))
    hard = alpha * share
    c = tl.zeros_like(top)
    if not SMOOTH:
        return hard * phi, highest, hard * slope / total, c, -hard * slope * q
    hard *= 1.0 - smoothing
    c += smoothing / classes * share
    # Infinite where a class is masked; without smoothing, it must not count.
    soft = (tl.log2(total) + highest) * total_weight - (smooth_a + alpha * label_a)
    soft = tl.where(smoothing == 0.0, 0.0, soft)
    k = hard * slope + c * total_weight
    own_gradient = c * total_weight * p - hard * slope * q - c * alpha
    return hard * phi + c * LN_2 * soft, highest, k / total, c, own_gradient


@triton.jit
def softplus(x, gamma, REAL: tl.constexpr):
    """phi(softplus(x)) with phi(l) = (1 - e^-l)^gamma l, and its derivative."""
    t = exp2(-tl.abs(x) * LOG2_E)
    log1p_t = log1p(t)
    loss = tl.maximum(x, 0.0) + log1p_t
    p = tl.where(x < 0.0, t, 1.0) / (1.0 + t)
    q = tl.where(x < 0.0, 1.0, t) / (1.0 + t)
    power = exp2(-gamma * LOG2_E * (tl.maximum(-x, 0.0) + log1p_t))
    focal = gamma != 0.0
    slope = tl.where(focal, power * (p + gamma * q * loss), p)
    # tl.maximum drops a NaN.
    loss = tl.where(x == x, tl.where(focal, power * loss, loss), x)
    return loss, tl.where(x == x, slope, x)
