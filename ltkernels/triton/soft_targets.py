"""Soft targets and distillation through Triton: logits and a row over the classes beside them, loss and gradient in one pass.

The twin of csrc/cpu/soft_targets.inl. Rows of up to 1 024 classes stay in registers; longer ones go by in tiles, and their gradient's
come out of the cache. Entries of the target are not looked at, which would wait for the device: what is not finite makes its row NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import BATCH_MEAN, MEAN
from .._checks import FLOATING, real_dtype
from .._fused import Inputs, Request
from . import _configs, _second
from ._configs import Specialisation, Tile
from ._kernels import VECTOR, load_tile, store_loss, store_tile, upstream_of, weight_of
from ._row import LN_2, LOG2_E, WEIGHT, exp2, has, kernel, online, origin, stream
from .adjusted_ce import _aligned, _launch, _or, _present

if TYPE_CHECKING:
    from ..losses._soft import SoftTargets


@triton.jit
def soft_tile(
    start, target, col, inside, valid, shift, scale, weight, sharp2, keep, floor, present,
    TEACHER: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(beta, logits in base 2, shares) of the columns `col`; TEACHER's logits in base 2 in place of the shares."""
    mask = valid[:, None] & inside[None, :]
    _z, beta, x = load_tile(start, col, inside, valid, shift, scale, present, True, R, ALIGNED, REAL)
    address = target[:, None] + col[None, :]
    if ALIGNED:
        address = tl.multiple_of(address, (16, 16))
    q = tl.load(address, mask=mask, other=0.0).to(REAL)
    if TEACHER:
        q = tl.where(mask, q * sharp2, -float("inf"))
    else:
        w = stream(weight, col, inside[None, :] & has(present, WEIGHT), 1.0, R, ALIGNED, REAL)
        q = tl.where(mask, (keep * q + floor) * w, 0.0)
    return beta, tl.where(mask, x * sharp2, -float("inf")), q


@triton.jit
def shares(q, top_q, TEACHER: tl.constexpr):
    """The target's shares; TEACHER's are not divided by their sum."""
    return exp2(q - origin(top_q)[:, None]) if TEACHER else q


@triton.jit
def fold_soft(top, others, top_q, entropy, total, dot, a, q, TEACHER: tl.constexpr):
    """Folds a tile into the row's sums: maximum and sum of the logits; the target's maximum, sum of share times its own logit (TEACHER),
    sum of shares, and of share times logit, all relative to the maxima. What has no share adds nothing."""
    new_q = top_q
    if TEACHER:
        new_q = tl.maximum(top_q, tl.max(q, 1))
        by = tl.exp2(top_q - origin(new_q))
        entropy = by * (entropy + total * (origin(top_q) - origin(new_q)))
        total *= by
        dot *= by
    t = shares(q, new_q, TEACHER)
    if TEACHER:
        entropy += tl.sum(tl.where(t != 0.0, t * (q - origin(new_q)[:, None]), 0.0), 1)
    new, others, _e = online(top, others, a, a != -float("inf"))
    dot += total * (origin(top) - origin(new))
    dot += tl.sum(tl.where(t != 0.0, t * (a - origin(new)[:, None]), 0.0), 1)
    return new, others, new_q, entropy, total + tl.sum(t, 1), dot


@triton.jit
def soft_gradient(a, q, beta, top, others, top_q, total, by, TEACHER: tl.constexpr):
    t = shares(q, top_q, TEACHER)
    e = exp2(a - origin(top)[:, None])
    if TEACHER:
        return by[:, None] * beta * (e / others[:, None] - t / total[:, None])
    return by[:, None] * beta * (e * (total / others)[:, None] - t)


@kernel
def soft_rows(
    z, z_stride: tl.int64, target_rows, target_stride: tl.int64, out, row_loss, parts, count: tl.int32,
    shift, scale, weight, row_coef, sample_weight,
    n: tl.int64, classes: tl.int32, present: tl.int32, need_grad: tl.int32, sharpness: tl.float64, kept: tl.float64,
    spread: tl.float64, row_factor: tl.float64,
    TEACHER: tl.constexpr, HELD: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of R rows a program; HELD: in registers. A share is ``kept * q + spread`` times its class weight."""
    sharp, factor = tl.full((), sharpness, REAL), tl.full((), row_factor, REAL)
    keep, floor = tl.full((), kept, REAL), tl.full((), spread, REAL)
    sharp2 = sharp * LOG2_E
    if ALIGNED:  # what the compiler must know for 16-byte accesses
        classes = classes // VECTOR * VECTOR
        z_stride = z_stride // VECTOR * VECTOR
        target_stride = target_stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = row < n
    start, target = z + row * z_stride, target_rows + row * target_stride
    nothing = tl.zeros([R], REAL)
    top, others, top_q = nothing - float("inf"), nothing, nothing - float("inf")
    entropy, total, dot = nothing, nothing, nothing
    if HELD:
        col = tl.arange(0, C)
        inside = col < classes
        beta, a, q = soft_tile(
            start, target, col, inside, valid, shift, scale, weight, sharp2, keep, floor, present, TEACHER, R, ALIGNED, REAL,
        )  # fmt: skip
        top, others, top_q, entropy, total, dot = fold_soft(top, others, top_q, entropy, total, dot, a, q, TEACHER)
    else:
        for first in range(0, classes, C):
            col = first + tl.arange(0, C)
            inside = col < classes
            beta, a, q = soft_tile(
                start, target, col, inside, valid, shift, scale, weight, sharp2, keep, floor, present, TEACHER, R, ALIGNED,
                REAL,
            )  # fmt: skip
            top, others, top_q, entropy, total, dot = fold_soft(top, others, top_q, entropy, total, dot, a, q, TEACHER)
    if TEACHER:
        loss = LN_2 * ((entropy - dot) / total - tl.log2(total) + tl.log2(others))
    else:
        loss = LN_2 * (total * tl.log2(others) - dot)
    factor = factor * weight_of(sample_weight, row, valid, present, REAL)
    nobody = row < 0
    store_loss(row_loss, factor * loss, row, n, valid, nobody)
    if need_grad != 0:
        by = factor * sharp * upstream_of(row, n, row_coef, parts, count, present, REAL)
        if HELD:
            g = soft_gradient(a, q, beta, top, others, top_q, total, by, TEACHER)
            store_tile(out, g, row, classes, col, inside, n, valid, nobody, ALIGNED)
        else:
            for first in range(0, classes, C):
                col = first + tl.arange(0, C)
                inside = col < classes
                beta, a, q = soft_tile(
                    start, target, col, inside, valid, shift, scale, weight, sharp2, keep, floor, present, TEACHER, R,
                    ALIGNED, REAL,
                )  # fmt: skip
                g = soft_gradient(a, q, beta, top, others, top_q, total, by, TEACHER)
                store_tile(out, g, row, classes, col, inside, n, valid, nobody, ALIGNED)


# Two inputs and an exponential of each wait in registers: half of what `_configs._ROWS` gives a thread.
_HELD = (Tile(8, 128, 4), Tile(1, 1024, 4))
_STREAMED = Tile(1, 4096, 16)
_DOUBLE = Tile(1, 1024, 8)


def specialisation(dtype: torch.dtype, classes: int, teacher: bool, aligned: bool) -> Specialisation:
    held = None if dtype == torch.float64 else next((tile for tile in _HELD if classes <= tile.columns), None)
    tile = held or (_DOUBLE if dtype == torch.float64 else _STREAMED)
    # Class probabilities come in float32, a teacher's logits in the student's dtype.
    constants = {"TEACHER": teacher, "HELD": held is not None, "ALIGNED": aligned and dtype != torch.float64}
    return _configs._make(soft_rows, dtype, tile, **constants, R=tile.rows, C=tile.columns)


def every() -> Iterator[Specialisation]:
    """All that can be launched."""
    widths = [*(tile.columns for tile in _HELD), _STREAMED.columns]
    found = [
        specialisation(dtype, classes, teacher, aligned)
        for dtype in FLOATING
        for classes in widths
        for teacher in (False, True)
        for aligned in (False, True)
    ]
    return iter(dict.fromkeys(found))


def soft_targets(
    inputs: Inputs, call: SoftTargets, request: Request
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The kernel of `ltkernels.losses._soft`, in the signature of `ltkernels._fused`."""
    logits, target, shift, scale, weight, own = inputs
    assert logits is not None
    assert target is not None
    real, teacher = real_dtype(logits.dtype), call.temperature != 0
    if teacher and target.dtype != logits.dtype:  # rare, and not compiled: float32 holds both
        logits = logits.to(real)
    logits, target = _second.unit(logits), _second.unit(target.to(logits.dtype if teacher else real))
    shift, scale, weight, own = (x if x is None else x.to(real).contiguous() for x in (shift, scale, weight, own))
    rows, classes = logits.shape
    weighted = own is not None and call.reduction == MEAN
    denominator = own.sum().view(1) if weighted else None  # type: ignore[union-attr]
    factor = call.factor / (rows if not weighted and call.reduction in (MEAN, BATCH_MEAN) and rows else 1)
    coef, one = _second.upstream(request, real)
    row_loss = torch.empty(rows, dtype=real, device=logits.device)
    grad = request.gradient(logits, real)
    if rows:
        aligned = _aligned(classes, logits, target, grad, shift, scale, weight)
        chosen = specialisation(logits.dtype, classes, teacher, aligned)
        present = _present(shift, scale, None, None, weight, coef, None, own) | one
        sharpness = 1 / call.temperature if teacher else 1.0
        eps = call.label_smoothing
        _launch(
            chosen, (-(-rows // chosen.rows),),
            logits, logits.stride(0), target, target.stride(0), _or(grad, row_loss), row_loss,
            _or(denominator, row_loss), int(weighted), *(_or(x, row_loss) for x in (shift, scale, weight, coef, own)),
            rows, classes, present, int(grad is not None), sharpness, 1 - eps, eps / classes, factor,
        )  # fmt: skip
    return (_second.reduced(row_loss, call.reduction, denominator),), (grad, None, None, None, None, None)
