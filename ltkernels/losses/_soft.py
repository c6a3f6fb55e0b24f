"""Cross-entropy against a row over the classes: class probabilities, or the softmax of a teacher's logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._call import BATCH_MEAN, MEAN, NONE, SUM, Call
from .._checks import real_dtype
from .._errors import ArgumentError
from .._fused import Fused, Inputs, Request, by_backend
from .._native import _C
from .._watch import address, direct, wants_gradient

INPUTS = ("logits", "target", "shift", "scale", "weight", "sample_weight")
_scratch = functools.cache(_C.adjusted_ce_scratch)


class SoftTargets(NamedTuple):
    """What stands beside logits (N, C), target (N, C), shift, scale and weight (C,), and sample_weight (N,).

    factor: of every row's loss.
    temperature: T above 0: the target holds a teacher's logits, and a row's loss is ``KL(softmax(target / T) || softmax(a / T))`` with
        ``a = scale * logits + shift``. 0: it holds q, and a row's loss is ``-sum_j weight_j q'_j log softmax(a)_j`` with
        ``q' = (1 - label_smoothing) q + label_smoothing / C``.
    backend: whose kernel computes it, of `ltkernels._backends.BACKENDS`.
    first_row: the number of the first row in messages: that of a chunk.
    """

    label_smoothing: float = 0.0
    factor: float = 1.0
    temperature: float = 0.0
    reduction: int = MEAN
    backend: str = "cpu"
    first_row: int = 0


def loss(logits: Tensor, call: Call) -> Tensor:
    """Of a checked call whose target holds class probabilities."""
    shift, scale, _, _, weight = call.tables()
    soft = SoftTargets(call.label_smoothing, reduction=call.reduction, backend=call.backend)
    return soft_targets(logits, call.target, shift, scale, weight, call.sample_weight, soft)


def soft_targets(
    logits: Tensor,
    target: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    soft: SoftTargets,
) -> Tensor:
    """Of checked arguments; see `SoftTargets`."""
    return _OPERATOR((logits, target, shift, scale, weight, sample_weight), soft)[0]


def in_place(logits: Tensor, call: Call, temperature: float, need_grad: bool, first_row: int) -> Tensor:
    """Row losses (N,) of a chunk of logits, consecutive, whose gradient times `Call.grad_scale` takes their place where it is needed; the
    call's target holds a teacher's logits unless the temperature is 0. Not differentiable."""
    soft = SoftTargets(
        call.label_smoothing, temperature**2 if temperature else 1.0, temperature, NONE, call.backend, first_row
    )
    inputs = (logits, call.target, call.shift, call.scale, call.weight, call.sample_weight)
    own = logits if logits.dtype == real_dtype(logits.dtype) else None  # else the gradient does not fit in
    upstream = None if call.grad_scale is None else (call.grad_scale,)
    (rows,), (grad, *_) = _OPERATOR.kernel(inputs, soft, Request((need_grad, *[False] * 5), upstream, own))
    if grad is not None and own is None:
        logits.copy_(grad)
    return rows


def learned(inputs: Inputs) -> str:
    """Names what beside the logits wants a gradient, which the kernel does not form; else empty."""
    for name, value in zip(INPUTS[1:], inputs[1:], strict=True):
        if wants_gradient((value,)):
            return name
    return ""


def reference(inputs: Inputs, call: SoftTargets) -> tuple[Tensor]:
    """In plain torch. What has no share adds nothing, whatever its logit."""
    logits, target, shift, scale, weight, own = inputs
    assert logits is not None
    assert target is not None
    real = real_dtype(logits.dtype)
    a = logits.to(real)
    a = a if scale is None else a * scale
    a = a if shift is None else a + shift
    if call.temperature:
        log_q = torch.log_softmax(target.to(real) / call.temperature, dim=1)
        share = log_q.exp()
        log_p = torch.log_softmax(a / call.temperature, dim=1)
        each = share * torch.where(share == 0, 0, log_q - log_p)
    else:
        share = target.to(real)
        if call.label_smoothing:
            share = share * (1 - call.label_smoothing) + call.label_smoothing / max(a.shape[1], 1)
        share = share if weight is None else share * weight
        # Of a logit that is -inf and has no share: neither it nor its slope counts.
        each = -share * torch.log_softmax(a, dim=1).masked_fill(share == 0, 0)
    row = call.factor * each.sum(dim=1)
    row = row if own is None else row * own
    if call.reduction == NONE:
        return (row,)
    if call.reduction == SUM:
        return (row.sum(),)
    rows = a.shape[0] if a.shape[1] else math.nan  # of no classes, as torch
    return (row.sum() / (rows if own is None or call.reduction == BATCH_MEAN else own.sum()),)


def _served(inputs: Inputs, call: SoftTargets) -> bool:
    logits = inputs[0]
    assert logits is not None
    return call.backend != "torch" and logits.shape[1] > 0 and not learned(inputs)


def _kernel(inputs: Inputs, call: SoftTargets, request: Request) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    logits, target, shift, scale, weight, own = inputs
    assert logits is not None
    assert target is not None
    rows, classes = logits.shape
    real = real_dtype(logits.dtype)
    if target.dtype not in (logits.dtype, real):
        target = target.to(real)
    logits, target = (each if each.stride(1) == 1 or classes == 1 else each.contiguous() for each in (logits, target))
    job = _C.SoftTargets(
        _backends.DTYPE_CODES[logits.dtype], address(logits, "logits"), logits.stride(0), rows, classes
    )
    real_target = target.dtype == real
    job.target(address(target, "target"), target.stride(0), real_target, call.temperature != 0)
    weights = None if weight is None else weight.to(real).contiguous()
    if scale is not None:  # the kernel has no instances with scale alone
        shift, scale = both(shift, scale, classes, real)
    elif shift is not None:
        shift = shift.to(real).contiguous()
    job.tables(address(shift, "shift"), address(scale, "scale"), address(weights, "weight"))
    eps = call.label_smoothing
    job.options(call.factor, 1 / call.temperature if call.temperature else 1.0, 1 - eps, eps / classes)
    coef = None
    if request.upstream is not None:
        coef = request.upstream[0].to(real).expand(rows).contiguous()
    own = None if own is None else own.to(real).contiguous()
    job.rows(address(own, "sample_weight"), address(coef, "the upstream gradient"))
    threads = torch.get_num_threads()
    scratch = logits.new_empty(threads * _scratch(classes) + rows, dtype=real)
    loss = logits.new_empty(rows if call.reduction == NONE else (), dtype=real)
    grad = request.gradient(logits, real)
    row_loss = loss if call.reduction == NONE else scratch[threads * _scratch(classes) :]
    status = job.run(
        call.reduction, row_loss.data_ptr(), loss.data_ptr(), 0 if grad is None else grad.data_ptr(), scratch.data_ptr(), threads
    )  # fmt: skip
    if status != -1:
        if status >= 0:
            raise bad_target(target[status], call.first_row + status)
        said = Call(target, shift=shift, scale=scale, weight=weight, sample_weight=own)
        raise _backends.bad_table(-2 - status, said)
    return (loss,), (grad, None, None, None, None, None)


def both(
    shift: Tensor | None, scale: Tensor | None, classes: int, real: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Neutral where one of the two is missing."""
    if shift is None and scale is None:
        return None, None
    found = [
        torch.full((classes,), neutral, dtype=real) if table is None else table.to(real).contiguous()
        for table, neutral in ((shift, 0.0), (scale, 1.0))
    ]
    return found[0], found[1]


def check_target(target: Tensor) -> None:
    """The kernel's check of class probabilities for the reference; on the CPU only, where nobody waits for it."""
    if torch.compiler.is_compiling() or not target.is_cpu or not direct((target,)):
        return
    bad = ~((target >= 0) & (target < torch.inf))
    if bad.any():
        row = int(bad.flatten(1).any(1).nonzero()[0])
        raise bad_target(target[row], row)


def bad_target(row: Tensor, number: int) -> ArgumentError:
    """What is wrong with a row of class probabilities."""
    at = int((~((row >= 0) & (row < torch.inf))).nonzero()[0])
    return ArgumentError(
        f"target has {row[at].item()} for class {at} in row {number}; class probabilities must be finite and not negative"
    )


_OPERATOR = Fused(
    "soft_targets",
    "Tensor logits, Tensor target, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? sample_weight",
    SoftTargets,
    1,
    by_backend(_kernel, triton="soft_targets.soft_targets", cuda="cuda.soft_targets"),
    lambda inputs, call: [(inputs[0].shape[0],) if call.reduction == NONE else ()],  # type: ignore[union-attr]
    reference,
    _served,
)
