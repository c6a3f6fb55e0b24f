"""The general sigmoid loss through Triton: labels or multi-label targets, loss, gradient and sums of gradients by class in one pass.

The twin of csrc/cpu/sigmoid_ce.inl. An entry that is neither 0 nor 1 nor ignored makes its row's loss and its own gradient NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import BATCH_MEAN, MEAN, Call, denominator_of
from .._checks import FLOATING, real_dtype
from .._fused import Inputs, Outputs, Request
from . import _configs, _second
from ._configs import Specialisation, Tile
from ._kernels import labels, load_tile, store_loss, store_tile, upstream_of, weight_of
from ._row import WEIGHT, gather, has, kernel, softplus, stream
from .adjusted_ce import _launch, _or, _present

if TYPE_CHECKING:
    from ..losses._sigmoid_reference import SigmoidCall

# Bits of `present` beside those of _row.py.
POSITIVE = tl.constexpr(1 << 14)
NEGATIVE = tl.constexpr(1 << 15)
REBALANCE = tl.constexpr(1 << 16)
THRESHOLD = tl.constexpr(1 << 17)
# csrc/cpu/sigmoid_ce.h: enum Hot
LABELS, BYTES, FLOATS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_PROGRAMS = 256  # that keep sums of gradients by class, each of its own rows


@triton.jit
def entries(hot8, hot32, row, stride, col, mask, ignore_index, HOT: tl.constexpr):
    """(positive, negative, of which something is said) of the entries of multi-label targets."""
    at = (row * stride)[:, None] + col[None, :]
    if HOT == BYTES:
        hot = tl.load(hot8 + at, mask=mask, other=0).to(tl.int32)
        said = hot != ignore_index
    else:
        hot = tl.load(hot32 + at, mask=mask, other=0.0)
        said = (hot != -1.0) & (hot != ignore_index.to(tl.float32))
    return mask & said & (hot == 1), mask & said & (hot == 0), mask & said


@triton.jit
def which(hot8, hot32, hot_stride, row, y, col, inside, valid, ignore_index, HOT: tl.constexpr):
    """The same of labels too."""
    mask = valid[:, None] & inside[None, :]
    if HOT == LABELS:
        own = col[None, :] == y[:, None]
        return mask & own, mask & (own == 0), mask
    return entries(hot8, hot32, row, hot_stride, col, mask, ignore_index, HOT)


@kernel
def known_rows(
    counts, hot8, hot32, hot_stride: tl.int64, classes: tl.int32, ignore_index: tl.int64,
    HOT: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """1 for a row of multi-label targets that says anything, which its first entries nearly always do; one row a program."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    found, first = tl.zeros([1], tl.int32), 0
    while (tl.sum(found, 0) == 0) & (first < classes):
        col = first + tl.arange(0, C)
        _positive, _negative, said = entries(
            hot8, hot32, row, hot_stride, col, (row >= 0)[:, None] & (col < classes)[None, :], ignore_index, HOT
        )
        found = tl.max(said.to(tl.int32), 1)
        first += C
    tl.store(counts + row, found.to(REAL))


@kernel
def sigmoid_rows(
    z, z_stride: tl.int64, target, hot8, hot32, hot_stride: tl.int64, out, row_loss, parts, count: tl.int32, sums,
    scale, shift, positive, negative, weight, rebalance, sample_weight, row_coef,
    n: tl.int64, classes: tl.int32, ignore_index: tl.int64, present: tl.int32, need_grad: tl.int32, need_sums: tl.int32,
    steps: tl.int32, focal_gamma: tl.float64, threshold: tl.float64, negative_scale: tl.float64, base: tl.float64,
    steepness: tl.float64, centre: tl.float64,
    HOT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of `steps` times R rows a program, and its sums (programs, 2, classes) of |dl / da|, of positives and of negatives;
    `threshold` is on the logits."""
    gamma, least = tl.full((), focal_gamma, REAL), tl.full((), threshold, REAL)
    lam = tl.full((), negative_scale, REAL)
    map0, map1, map2 = tl.full((), base, REAL), tl.full((), steepness, REAL), tl.full((), centre, REAL)
    program = tl.program_id(0).to(tl.int64)
    for step in range(steps):
        row = (program * steps + step) * R + tl.arange(0, R)
        valid, bad, y = row < n, row < 0, tl.zeros([R], tl.int32)
        if HOT == LABELS:
            y, _yb, _share, valid, bad = labels(target, target, row_loss, row, n, classes, ignore_index, False, REAL)
        alpha = gather(weight, y, valid & has(present, WEIGHT), 1.0, REAL)
        alpha *= weight_of(sample_weight, row, valid, present, REAL)
        upstream = upstream_of(row, n, row_coef, parts, count, present, REAL)
        nothing = tl.zeros([R], REAL)
        of_positives = nothing  # sum of the rebalancing weights q
        if (present & REBALANCE) != 0:
            for first in range(0, classes, C):
                col = first + tl.arange(0, C)
                hit, _miss, _said = which(hot8, hot32, hot_stride, row, y, col, col < classes, valid, ignore_index, HOT)
                q = stream(rebalance, col, (col < classes)[None, :], 1.0, R, False, REAL)
                of_positives += tl.sum(tl.where(hit, q, 0.0), 1)
        loss, anything = nothing, tl.zeros([R], tl.int32)
        for first in range(0, classes, C):
            col = first + tl.arange(0, C)
            inside = col < classes
            hit, miss, said = which(hot8, hot32, hot_stride, row, y, col, inside, valid, ignore_index, HOT)
            known = hit | miss
            _z, beta, a = load_tile(z + row * z_stride, col, inside, valid, shift, scale, present, True, R, False, REAL)
            each, slope = softplus(tl.where(hit, -a, lam * a), gamma, REAL)
            p = stream(positive, col, inside[None, :] & has(present, POSITIVE), 1.0, R, False, REAL)
            by = stream(negative, col, inside[None, :] & has(present, NEGATIVE), 1.0, R, False, REAL)
            by = tl.where(has(present, THRESHOLD) & (a < least), 0.0, by)
            by = tl.where(hit, p, by)
            if (present & REBALANCE) != 0:
                q = stream(rebalance, col, inside[None, :], 1.0, R, False, REAL)
                share = map1 * (q / of_positives[:, None] - map2)
                by *= map0 + 1.0 / (1.0 + tl.exp(-share))
            counts = known & (by != 0.0)
            loss += tl.sum(tl.where(counts, by * each, 0.0), 1)
            loss += tl.sum(tl.where(said & (known == 0), float("nan"), 0.0), 1)
            anything = tl.maximum(anything, tl.max(said.to(tl.int32), 1))
            size = tl.where(counts, by * tl.where(hit, slope, lam * slope), 0.0)
            if need_sums != 0:
                here = sums + program * 2 * classes + col
                again = inside & (step > 0)
                hits = tl.load(here, mask=again, other=0.0) + tl.sum(tl.where(hit, size, 0.0), 0)
                misses = tl.load(here + classes, mask=again, other=0.0) + tl.sum(tl.where(miss, size, 0.0), 0)
                tl.store(here, hits, mask=inside)
                tl.store(here + classes, misses, mask=inside)
            if need_grad != 0:
                g = (upstream * alpha)[:, None] * beta * tl.where(hit, -size, size)
                g = tl.where(known, g, tl.where(said, float("nan"), 0.0))
                store_tile(out, g, row, classes, col, inside, n, valid, bad, False)
        store_loss(row_loss, alpha * loss, row, n, valid & (anything != 0), bad)
        tl.debug_barrier()  # the next step reads the sums that this one wrote


# 4 logits a thread, beside which five tables' entries wait; nothing waits for a sum. float64 takes twice the registers.
_TILES = (Tile(4, 128, 4), Tile(2, 512, 8))
_DOUBLE = Tile(2, 128, 4)


def specialisation(dtype: torch.dtype, classes: int, hot: int) -> Specialisation:
    tile = _DOUBLE if dtype == torch.float64 else next((t for t in _TILES if classes <= t.columns), _TILES[1])
    return _configs._make(sigmoid_rows, dtype, tile, HOT=hot, R=tile.rows, C=tile.columns)


def known(dtype: torch.dtype, hot: int) -> Specialisation:
    return _configs._make(known_rows, real_dtype(dtype), Tile(1, 512, 4), HOT=hot, C=512)


def every() -> Iterator[Specialisation]:
    """All that can be launched."""
    found = []
    for dtype in FLOATING:
        for hot in (LABELS.value, BYTES.value, FLOATS.value):
            found += [specialisation(dtype, tile.columns, hot) for tile in _TILES]
            found += [known(dtype, hot)] if hot else []
    return iter(dict.fromkeys(found))


def sigmoid_ce(inputs: Inputs, call: SigmoidCall, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    """The kernel of `ltkernels.losses._sigmoid`."""
    logits, scale, shift, positive, negative, weight, own = inputs
    assert logits is not None
    z, target = _second.unit(logits), call.target
    rows, classes = z.shape
    real = real_dtype(z.dtype)
    like = {"dtype": real, "device": z.device}
    hot = LABELS.value if target.dim() == 1 else BYTES.value if target.dtype == torch.uint8 else FLOATS.value
    row_loss = torch.empty(rows, **like)
    # Pointers of the right types for what is not there and not read.
    hot8 = target if hot == BYTES.value else row_loss.view(torch.uint8)
    hot32 = target if hot == FLOATS.value else row_loss.view(torch.float32)
    entries_of = (hot8, hot32, target.stride(0))
    own = None if own is None else own.to(real).contiguous()
    denominator = None
    if call.reduction in (MEAN, BATCH_MEAN) and rows:
        if hot:
            counts = torch.empty(rows, **like)
            _launch(known(z.dtype, hot), (rows,), counts, *entries_of, classes, call.ignore_index)
            each = counts if own is None or call.reduction == BATCH_MEAN else torch.where(counts != 0, own, 0)
            denominator = each.sum().view(1)
        else:
            one_hot = Call(target, weight=weight, sample_weight=own, reduction=call.reduction)
            denominator = denominator_of(one_hot._replace(ignore_index=call.ignore_index)).to(real).view(1)
    coef, one = _second.upstream(request, real)
    grad = torch.empty((rows, classes), **like) if request.needs[0] else None
    chosen = specialisation(z.dtype, classes, hot)
    blocks = -(-rows // chosen.rows)
    steps = max(1, -(-blocks // _PROGRAMS)) if call.statistics else 1
    programs = -(-blocks // steps)
    sums = torch.empty((programs, 2, classes), **like) if call.statistics else None
    if rows:
        present = _present(shift, scale, None, None, weight, coef, None, own) | one
        bits = ((positive, POSITIVE), (negative, NEGATIVE), (call.rebalance, REBALANCE))
        present |= sum(bit.value for table, bit in bits if table is not None)
        theta = call.threshold
        present |= THRESHOLD.value if theta > 0.0 else 0
        tables = (scale, shift, positive, negative, weight, call.rebalance, own, coef)
        _launch(
            chosen, (programs,),
            z, z.stride(0), target if not hot else torch.empty(0, dtype=torch.int64, device=z.device), *entries_of,
            _or(grad, row_loss), row_loss, _or(denominator, row_loss), int(denominator is not None), _or(sums, row_loss),
            *(_or(each, row_loss) for each in tables),
            rows, classes, call.ignore_index, present, int(grad is not None), int(sums is not None), steps,
            call.focal_gamma, math.log(theta / (1 - theta)) if theta > 0.0 else 0.0, call.negative_scale,
            *call.rebalance_map,
        )  # fmt: skip
    statistics = torch.empty(0, **like) if sums is None else sums.sum(0, dtype=torch.float64).to(real)
    return (_second.reduced(row_loss, call.reduction, denominator), statistics), [grad, *[None] * 6]
