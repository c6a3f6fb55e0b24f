"""The compiled CPU kernels: from tensors to addresses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._call import Call, Out
from .._checks import REDUCTION_CODES
from .._native import _C
from .._watch import address
from ._shared import DTYPE_CODES, ClassPart, bad_label, bad_table

_C.plain_setup(
    Tensor.__dlpack_c_exchange_api__,  # torch's table of C functions that say what a tensor is
    Tensor,
    torch.nn.Parameter,
    Call(torch.empty(0, device="cpu")),
    REDUCTION_CODES,
    torch.empty_like,
    torch.empty((), dtype=torch.float32, device="cpu"),
    torch.empty((), dtype=torch.float64, device="cpu"),
)
_STACK: int = _C.ADJUSTED_CE_STACK
_scratch = functools.cache(_C.adjusted_ce_scratch)


def adjusted_ce(logits: Tensor, call: Call, out: Out) -> None:
    """Fills `out`. logits (N, C) with unit class stride, any row stride.

    Raises ValueError for a label out of range and for a table with an entry that is not finite; nothing is written then.
    """
    loss, grad, grad_tables, needs = out
    if grad_tables is None:
        status = _C.plain_run(logits, call, loss, grad, torch.get_num_threads())
        if status is not None:
            if status != -1:
                _refuse(status, call, logits.shape[1])
            return
    rows, classes = logits.shape
    dtype = logits.dtype
    target = call.target
    job = _C.AdjustedCe(
        DTYPE_CODES[dtype],
        logits.data_ptr() or address(logits, "logits"),
        logits.stride(0),
        rows,
        classes,
        target.data_ptr() or address(target, "target"),
        call.ignore_index,
    )
    if call.target_b is not None:
        job.mixed(address(call.target_b, "target[1]"), address(call.lam, "lam"))
    shift, scale, margin, row_scale, weight = call[3:8]
    if grad_tables is not None and shift is None:  # their kernel has no instances without it
        shift = torch.zeros(classes, dtype=loss.dtype, device=logits.device)
    if not (shift is scale is margin is row_scale is weight is None):
        job.tables(
            0 if shift is None else address(shift, "shift"),
            0 if scale is None else address(scale, "scale"),
            0 if margin is None else address(margin, "margin"),
            0 if row_scale is None else address(row_scale, "row_scale"),
            0 if weight is None else address(weight, "weight"),
        )
    own, smoothing, label_scale = call.beside()
    if not (own is smoothing is label_scale is None):
        job.inputs(
            0 if own is None else address(own, "sample_weight"),
            0 if smoothing is None else address(smoothing, "label_smoothing"),
            0 if label_scale is None else address(label_scale, "label_scale"),
        )
    if call.focal_gamma != 0.0 or call.label_smoothing != 0.0:
        job.options(call.focal_gamma, call.label_smoothing)
    if call.form:
        job.closed(call.form, address(call.table, "the loss' table"), address(call.seed, "seed"), *call.form_options)
    if grad is not None or grad_tables is not None:
        factor = None
        if call.grad_scale is not None:
            factor = call.grad_scale.expand(rows).contiguous()
        if grad is None:
            job.gradient(0, 0, address(factor, "grad_scale"))
        else:
            job.gradient(grad.data_ptr(), grad.stride(0), 0 if factor is None else address(factor, "grad_scale"))
    # One allocation: the threads' scratch, then the row losses where the caller does not want them. Small calls live on the
    # kernel's own stack.
    threads = torch.get_num_threads()
    per_thread = _scratch(classes)
    scratch_address = row_loss = 0
    if threads * per_thread + rows > _STACK:
        scratch = torch.empty(threads * per_thread + rows, dtype=loss.dtype, device=logits.device)
        scratch_address = scratch.data_ptr()
        row_loss = scratch_address + threads * per_thread * scratch.element_size()
    loss_address = loss.data_ptr()
    if call.reduction == 0:
        row_loss = loss_address
    if grad_tables is not None:
        labels = 1 if call.target_b is None else 2
        doubles = _C.vector_gradients_scratch(rows, classes, needs[0] + needs[1], labels, dtype == torch.float64)
        sums = torch.empty(doubles, dtype=torch.float64, device=logits.device)
        row, size, addresses = grad_tables.data_ptr(), classes * grad_tables.element_size(), []
        for need in needs:
            addresses.append(row if need else 0)
            row += size if need else 0
        job.gradients_of_tables(sums.data_ptr(), *addresses)
    status = job.run(call.reduction, row_loss, loss_address, scratch_address, threads)
    if status != -1:
        _refuse(status, call, classes)


def plain_loss(logits: Tensor, call: Call, need_grad: bool) -> tuple[Tensor, Tensor | None] | None:
    """Loss and gradient of a call that needs nothing said of its memory, in one step; None where it does."""
    found = _C.plain_loss(logits, call, need_grad, torch.get_num_threads())
    if type(found) is int:
        _refuse(found, call, logits.shape[1])
    return found  # type: ignore[no-any-return]


def _refuse(status: int, call: Call, classes: int) -> None:
    """Says what the kernel found: -2 - t, a bad entry of table t or of the sample weights; or the row of a bad label."""
    if status < -1:
        raise bad_table(-2 - status, call)
    label, name = int(call.target[status]), "target"
    if call.target_b is not None and 0 <= label < classes:
        label, name = int(call.target_b[status]), "the second target"
    raise bad_label(name, label, status, classes, call.ignore_index)


def row_statistics(part: ClassPart, smooth: bool, out: Tensor) -> None:
    """Fills `out` (N, 4)."""
    _C.row_statistics(*part.addresses(), smooth, out.data_ptr(), torch.get_num_threads())


def row_maxima(part: ClassPart) -> tuple[Tensor, Tensor]:
    """(N, 4) statistics whose reference is the row's largest other logit, and (N,) the class of that."""
    rows = len(part.logits)
    out = torch.empty(rows, 4, dtype=torch.float64)
    index = torch.empty(rows, dtype=torch.int64)
    _C.row_maxima(*part.addresses(), out.data_ptr(), index.data_ptr(), torch.get_num_threads())
    return out, index


def gradient_from_statistics(part: ClassPart, terms: Tensor, grad: Tensor) -> None:
    """Fills `grad`, which may be the logits."""
    to = (terms.data_ptr(), grad.data_ptr(), grad.stride(0))
    _C.gradient_from_statistics(*part.addresses(), *to, torch.get_num_threads())


def logdet(matrices: Tensor) -> Tensor:
    """(K,) log-determinants of (K, n, n) float64 symmetric positive definite matrices. Only the lower triangles are read. NaN where a
    matrix is not positive definite."""
    matrices = matrices.contiguous()
    count, size = matrices.shape[:2]
    threads = torch.get_num_threads()
    out = torch.empty(count, dtype=torch.float64)
    scratch = torch.empty(threads * _C.logdet_scratch(size), dtype=torch.float64)
    _C.logdet_batch(matrices.data_ptr(), count, size, scratch.data_ptr(), out.data_ptr(), threads)
    return out
