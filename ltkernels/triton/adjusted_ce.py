"""The losses on logits through Triton: the twin of csrc/cpu/adjusted_ce.cpp.

At most three launches, none waits for the host: the denominator of the reduction (``mean`` and ``batch_mean``), one
read of the logits and one write of the gradient, the sum of the row losses. Nothing is atomic, and every sum has an
order that depends on the shape alone. What differs from the CPU kernel: a label out of range makes its row NaN instead
of raising, and tables are not checked, because both would wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._call import Call, Out
from .._checks import real_dtype
from . import _autotune, _configs, _row
from ._configs import FP_FUSION, Specialisation
from ._kernels import MAX_PARTS, VECTOR

_NONE, _MEAN, _BATCH_MEAN = 0, 1, 2
_BITS = (
    _row.SHIFT, _row.SCALE, _row.MARGIN, _row.ROW_SCALE, _row.WEIGHT, _row.ROW_COEF, _row.TABLE, _row.SAMPLE_WEIGHT,
    _row.SMOOTHING, _row.LABEL_SCALE,
)  # fmt: skip
_BITS = tuple(bit.value for bit in _BITS)
_BYTES = 16  # of an access


def _launch(specialisation: Specialisation, grid: tuple[int, ...], *arguments: object) -> None:
    specialisation.kernel[grid](
        *arguments, **dict(specialisation.constants), **specialisation.options, enable_fp_fusion=FP_FUSION
    )


def _aligned(classes: int, *tensors: Tensor | None) -> bool:
    """Whether 16-byte accesses are possible: sizes and strides are multiples of VECTOR elements, addresses of 16 bytes."""
    return classes % VECTOR.value == 0 and all(
        t is None or (t.data_ptr() % _BYTES == 0 and (t.dim() == 1 or t.stride(0) % VECTOR.value == 0)) for t in tensors
    )


def _options(call: Call) -> tuple[float, float, float, float]:
    """Four numbers of a closed form: `o0..o3` of `_row`."""
    if not call.form:
        return 0.0, 0.0, 0.0, 0.0
    o0, o1, o2 = (float(value) for value in call.form_options)
    o3 = 0.0
    if call.form == _row.EQUALIZATION.value:
        o0 = float(round(o0 * 2**24))
    elif call.form == _row.SIGMOID.value:
        o0 = math.log(o0 / (1.0 - o0)) if o0 > 0.0 else -math.inf
    elif call.form == _row.ARCFACE.value:
        o3 = math.atan2(o1, o0) * o1
    return o0, o1, o2, o3


def _present(*tables: Tensor | None) -> int:
    return sum(bit for bit, table in zip(_BITS, tables) if table is not None)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer of the right type for a table that is not there and not read."""
    return stand_in if tensor is None else tensor


def _denominator(real: Tensor, call: Call, classes: int) -> tuple[Tensor, int]:
    """Sums of row weights, one a program, and how many of them make the denominator; 0 where the reduction has none."""
    if call.reduction not in (_MEAN, _BATCH_MEAN):
        return real, 0
    rows = len(call.target)
    blocks = max(1, -(-rows // _configs.DENOMINATOR_BLOCK))
    steps = -(-blocks // MAX_PARTS.value)
    count = -(-blocks // steps)
    parts = torch.empty(count, dtype=real.dtype, device=real.device)
    weight, own = (call.weight, call.sample_weight) if call.reduction == _MEAN else (None, None)
    present = _row.WEIGHT.value if weight is not None else 0
    present |= _row.SAMPLE_WEIGHT.value if own is not None else 0
    _launch(
        _configs.denominator(real.dtype),
        (count,),
        parts,
        call.target,
        _or(call.target_b, call.target),
        _or(call.lam, real),
        _or(weight, real),
        _or(own, real),
        rows,
        classes,
        call.ignore_index,
        int(call.target_b is not None),
        present,
        steps,
    )
    return parts, count


def _reduce(loss: Tensor, row_loss: Tensor, parts: Tensor, count: int) -> None:
    _launch(_configs.loss_sum(loss.dtype), (1,), loss, row_loss, parts, len(row_loss), count)


def adjusted_ce(logits: Tensor, call: Call, out: Out) -> None:
    """Fills `out`, without gradients of tables; see `ltkernels._call` and csrc/cpu/adjusted_ce.h.

    logits and grad (N, C), classes contiguous. Arguments were checked by the caller.
    """
    rows, classes = logits.shape
    loss, grad, _, _ = out
    target, target_b, lam = call.target, call.target_b, call.lam
    shift, scale, margin, row_scale, weight = call.tables()
    table, seed, row_coef = call.table, call.seed, call.factor(rows)
    focal_gamma, label_smoothing, ignore_index, reduction = (
        call.focal_gamma, call.label_smoothing, call.ignore_index, call.reduction,
    )  # fmt: skip
    form, options = call.form, _options(call)
    real = loss if loss.dim() else loss.view(1)
    if form and target_b is not None and real.dtype != logits.dtype:  # rare, and not compiled for 16-bit dtypes
        wide = logits.to(real.dtype)
        adjusted_ce(wide, call, out._replace(grad=None if grad is None else wide))
        if grad is not None:
            grad.copy_(wide)
        return
    parts, count = _denominator(real, call, classes)
    row_loss = loss if reduction == _NONE else torch.empty(rows, dtype=loss.dtype, device=loss.device)
    if rows:
        tables = tuple(_or(each, real) for each in (shift, scale, margin, row_scale, weight, row_coef))
        own, smoothing, label_scale = (_or(each, real) for each in call.beside())
        present = _present(shift, scale, margin, row_scale, weight, row_coef, table, *call.beside())
        if row_coef is not None and row_coef.stride(0) == 0:
            present |= _row.ONE_COEF.value
        aligned = _aligned(classes, logits, grad, shift, scale, weight, table)
        mixed, smooth, streamed = target_b is not None, call.smooth(), shift is not None or scale is not None
        held = None
        if grad is not None and form == 0 and not mixed and not smooth:
            inputs = call.sample_weight is not None or call.label_scale is not None
            held = _configs.rows(logits.dtype, classes, streamed, aligned, inputs)
        first = (logits, logits.stride(0), _or(grad, logits), 0 if grad is None else grad.stride(0), row_loss)
        if held is not None:
            pointers = (parts, count, target, *tables, own, label_scale)
            numbers = (rows, classes, ignore_index, present, focal_gamma)

            def launch(chosen: Specialisation) -> None:
                _launch(chosen, (-(-rows // chosen.rows),), *first, *pointers, *numbers)

            if _autotune.enabled():
                held = _autotune.choose(held, logits.device, rows, grad.data_ptr() != logits.data_ptr(), launch)
            launch(held)
        else:
            _launch(
                _configs.long_rows(logits.dtype, classes, form, smooth, mixed, aligned),
                (rows,),
                *first,
                parts,
                count,
                target,
                _or(target_b, target),
                _or(lam, real),
                *tables,
                _or(table, real),
                own,
                smoothing,
                label_scale,
                _or(seed, target),
                rows,
                classes,
                ignore_index,
                present,
                int(grad is not None),
                focal_gamma,
                label_smoothing,
                *options,
            )
    if reduction != _NONE:
        _reduce(real, row_loss, parts, count)


def scale_gradient(grad: Tensor, upstream: Tensor, expected: Tensor | None = None) -> None:
    """`grad` (N, C) times upstream / expected (None: 1), one-element float32 or float64 tensors, in place, rounded once. Both are
    read on the device: where they are equal, the call costs a launch and no pass."""
    if grad.numel() == 0:
        return
    rows, classes = (1, grad.numel()) if grad.is_contiguous() else grad.shape
    upstream = upstream.to(real_dtype(grad.dtype))
    blocks = -(-classes // _configs.SCALE_BLOCK)
    known = upstream if expected is None else expected.to(upstream.dtype)
    _launch(
        _configs.scale_gradient(grad.dtype), (rows * blocks,),
        grad, upstream, known, int(expected is not None), classes, grad.stride(0), blocks,
    )  # fmt: skip
