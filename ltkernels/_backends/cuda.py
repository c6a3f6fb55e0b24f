"""The CUDA kernels: from tensors to addresses. The same functions drive the host emulation in the tests, through `library`.

Every call goes to the current stream of the tensors' device, allocates its scratch from torch and never waits for the device, so
that it can be captured in a CUDA graph. A label outside [0, C) that is not `ignore_index` turns its row into NaN;
``LTKERNELS_CUDA_DEBUG=1`` looks at labels and tables first, which waits for the device, and raises.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._call import BATCH_MEAN, MEAN, NONE, SUM, TABLES, Call, Out
from .._checks import real_dtype
from .._native import _C
from .._watch import address
from ._shared import DTYPE_CODES, LARGEST_LOG_DET, ClassPart, find_bad_label, find_bad_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._fused import Inputs, Request
    from ..contrastive._rows import Part
    from ..losses._soft import SoftTargets

library = _C  # has cuda_* functions where the module was built with LTKERNELS_CUDA=ON

PATHS = ("any", "registers", "cluster", "memory")  # enum Path of csrc/cuda/job.h


class Plan(NamedTuple):
    """How a row is worked on: `threads` in each of `cluster` blocks of `block` threads; `path` as in `PATHS`."""

    path: str
    threads: int
    block: int
    cluster: int


def available() -> tuple[bool, str]:
    """Whether the CUDA kernels can run here, and why not."""
    if not hasattr(library, "cuda_adjusted_ce"):
        return False, "this build has no CUDA kernels (LTKERNELS_CUDA=ON at build time)"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    if _C.info()["cuda_devices"] == 0:
        return False, "the CUDA runtime of this build sees no device (is the driver older than the runtime?)"
    return True, f"CUDA runtime {_C.info()['cuda']}"


def current_stream(device: torch.device) -> tuple[int, int]:
    """(device index, address of its current stream). The one place that asks."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def adjusted_ce(logits: Tensor, call: Call, out: Out, *, path: str = "any") -> None:
    """Fills `out`, without gradients of tables.

    logits (N, C) with unit class stride, any row stride; the gradient likewise. Two launches; one for ``reduction="none"``, unless C is
    odd and there are tables. `path` forces a kernel, for tests and benchmarks.

    Raises RuntimeError where CUDA refuses a launch; ValueError for labels and tables with ``LTKERNELS_CUDA_DEBUG=1``.
    """
    rows, classes = logits.shape
    if os.environ.get("LTKERNELS_CUDA_DEBUG") == "1":
        problem = find_bad_label(call, classes) or find_bad_table(call)
        if problem is not None:
            raise problem
    loss, grad = out.loss, out.grad
    if rows == 0:
        if call.reduction != NONE:
            loss.fill_(0.0 if call.reduction == SUM else torch.nan)
        return
    streamed = (
        address(call.shift, "shift"), address(call.scale, "scale"), address(call.weight, "weight"), address(call.table, "the loss' table"),
    )  # fmt: skip
    scratch = None
    if call.reduction != NONE or any(streamed):
        doubles = library.cuda_scratch(rows, classes, *streamed)
        scratch = torch.empty(doubles, dtype=torch.float64, device=logits.device)
    job = library.CudaLossCall()  # what is not said is 0
    job.device, job.stream = current_stream(logits.device)
    job.path, job.dtype = PATHS.index(path), DTYPE_CODES[logits.dtype]
    job.logits, job.logits_stride = address(logits, "logits"), logits.stride(0)
    job.rows, job.classes = rows, classes
    job.target, job.ignore_index = address(call.target, "target"), call.ignore_index
    job.target_b, job.lam = address(call.target_b, "target[1]"), address(call.lam, "lam")
    for name, table in zip(TABLES, call.tables(), strict=True):
        setattr(job, name, address(table, name))
    job.smoothing = address(call.smoothing, "label_smoothing")
    job.label_scale = address(call.label_scale, "label_scale")
    factor = call.factor(rows)
    if factor is not None:
        job.row_coef, job.row_coef_stride = address(factor, "grad_scale"), factor.stride(0)
    job.focal_gamma, job.label_smoothing = call.focal_gamma, call.label_smoothing
    job.reduction, job.loss = call.reduction, loss.data_ptr()
    if grad is not None:
        job.grad, job.grad_stride = address(grad, "the gradient"), grad.stride(0)
    job.scratch = address(scratch, "scratch")
    if call.form:
        job.form, job.form_table = call.form, address(call.table, "the loss' table")
        job.form_seed = address(call.seed, "seed")
        job.option0, job.option1, job.option2 = call.form_options
    _raise(library.cuda_adjusted_ce(job))


def row_statistics(part: ClassPart, smooth: bool, out: Tensor) -> None:
    """Fills `out` (N, 4) in one read of the logits."""
    stream = current_stream(part.logits.device)
    _raise(library.cuda_row_statistics(*stream, *part.addresses(), int(smooth), out.data_ptr()))


def gradient_from_statistics(part: ClassPart, terms: Tensor, grad: Tensor) -> None:
    """Fills `grad`, which may be the logits, in one read and one write."""
    to = (terms.data_ptr(), grad.data_ptr(), grad.stride(0))
    _raise(library.cuda_gradient_from_statistics(*current_stream(part.logits.device), *part.addresses(), *to))


def soft_targets(
    inputs: Inputs, call: SoftTargets, request: Request
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The kernel of `ltkernels.losses._soft`, in the signature of `ltkernels._fused`; one launch, and some of torch for N numbers. Entries
    of the target are not looked at: what is not finite makes its row NaN."""
    logits, target, shift, scale, weight, own = inputs
    assert logits is not None
    assert target is not None
    rows, classes = logits.shape
    real, teacher = real_dtype(logits.dtype), call.temperature != 0
    if teacher and target.dtype != logits.dtype:  # rare: float32 holds both
        logits = logits.to(real)
    target = target.to(logits.dtype if teacher else real)
    logits, target = (x if x.stride(1) == 1 or classes == 1 else x.contiguous() for x in (logits, target))
    shift, scale, weight, own = (x if x is None else x.to(real).contiguous() for x in (shift, scale, weight, own))
    # The factor of each row's loss, and of its gradient.
    if call.reduction == MEAN and own is not None:
        factor = own * (call.factor / own.sum())
    else:
        divides = call.reduction in (MEAN, BATCH_MEAN) and rows > 0
        factor = torch.full((rows,), call.factor / (rows if divides else 1), dtype=real, device=logits.device)
        factor = factor if own is None else factor * own
    loss = torch.empty(rows, dtype=real, device=logits.device)
    grad = request.gradient(logits, real)
    coef = factor if request.upstream is None else factor * request.upstream[0].to(real)
    job = library.CudaSoftCall()  # what is not said is 0
    job.device, job.stream = current_stream(logits.device)
    job.dtype, job.teacher = DTYPE_CODES[logits.dtype], int(teacher)
    job.logits, job.logits_stride = address(logits, "logits"), logits.stride(0)
    job.target, job.target_stride = address(target, "target"), target.stride(0)
    job.rows, job.classes = rows, classes
    job.shift, job.scale, job.weight = address(shift, "shift"), address(scale, "scale"), address(weight, "weight")
    job.row_coef, job.row_loss, job.grad = coef.data_ptr(), loss.data_ptr(), 0 if grad is None else grad.data_ptr()
    job.sigma = 1 / call.temperature if teacher else 1.0
    job.keep, job.floor = 1 - call.label_smoothing, call.label_smoothing / classes
    _raise(library.cuda_soft_targets(job))
    loss *= factor
    if call.reduction != NONE:
        loss = loss.double().sum().to(real) if rows or call.reduction == SUM else loss.new_full((), torch.nan)
    return (loss,), (grad, None, None, None, None, None)


def row_logsumexp(products: Tensor, part: Part) -> None:
    """See `ltkernels.contrastive._rows.Part`. products (rows, columns) float32 or float64, columns contiguous; one launch."""
    job = library.CudaContrastCall()  # what is not said is 0
    job.device, job.stream = current_stream(products.device)
    job.dtype = DTYPE_CODES[products.dtype]
    job.dots, job.stride = address(products, "products"), products.stride(0)
    job.rows, job.columns = products.shape
    for name, value in zip(part._fields, part, strict=True):
        if value is not None:
            setattr(job, name, address(value, name) if isinstance(value, Tensor) else int(value))
    _raise(library.cuda_row_logsumexp(job))


def scale_gradient(grad: Tensor, upstream: Tensor, expected: Tensor | None = None) -> Tensor:
    """`grad` times upstream / expected (None: 1), in place, in the loss' precision. The numbers stay on the device; where they are equal,
    the launch reads nothing else. grad contiguous; upstream and expected one element, float64 for a float64 gradient, else float32."""
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {grad.stride()}; it must be contiguous")
    for name, value in (("upstream", upstream), ("expected", expected)):
        if value is not None and (value.numel() != 1 or value.dtype != real_dtype(grad.dtype)):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; it must be one {real_dtype(grad.dtype)}"
            )
    _raise(
        library.cuda_scale(
            *current_stream(grad.device),
            DTYPE_CODES[grad.dtype],
            grad.data_ptr(),
            grad.numel(),
            upstream.data_ptr(),
            address(expected, "expected"),
        )
    )
    return grad


def logdet(matrices: Tensor) -> Tensor:
    """(K,) log-determinants of (K, n, n) symmetric positive definite matrices, n <= 64, float64 or float32; one launch. Only the lower
    triangles are read. NaN where a matrix is not positive definite."""
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2] or not 1 <= matrices.shape[1] <= LARGEST_LOG_DET:
        raise ValueError(
            f"matrices has shape {tuple(matrices.shape)}; it must be (K, n, n) with n in [1, {LARGEST_LOG_DET}]"
        )
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrices has dtype {matrices.dtype}; it must be float32 or float64")
    matrices = matrices.contiguous()
    out = torch.empty(matrices.shape[0], dtype=matrices.dtype, device=matrices.device)
    _raise(
        library.cuda_logdet(
            *current_stream(matrices.device),
            DTYPE_CODES[matrices.dtype],
            matrices.data_ptr(),
            matrices.shape[0],
            matrices.shape[1],
            out.data_ptr(),
        )
    )
    return out


def plan(
    dtype: torch.dtype,
    classes: int,
    *,
    aligned: bool = True,
    closed: bool = False,
    path: str = "any",
    device: torch.device | None = None,
) -> Plan:
    """The plan for a row of `classes` logits on `device`; `aligned`: every row starts at a multiple of 16 bytes."""
    index = current_stream(torch.device("cuda") if device is None else device)[0]
    out = torch.zeros(4, dtype=torch.int64)
    code = DTYPE_CODES[dtype]
    _raise(library.cuda_plan(index, PATHS.index(path), code, classes, int(aligned), int(closed), out.data_ptr()))
    registers, threads, block, cluster = out.tolist()
    return Plan("memory" if not registers else "cluster" if cluster > 1 else "registers", threads, block, cluster)


def _raise(error: str | None) -> None:
    if error is not None:
        raise RuntimeError(f"ltkernels: a CUDA kernel was not launched: {error}")
