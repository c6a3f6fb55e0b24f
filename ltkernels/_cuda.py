"""The CUDA kernels: from tensors to addresses. The same functions drive the host emulation in the tests, through `library`.

Every call goes to the current stream of the tensors' device, allocates its scratch from torch and never waits for the device, so
that it can be captured in a CUDA graph. A label outside [0, C) that is not `ignore_index` turns its row into NaN;
``LTKERNELS_CUDA_DEBUG=1`` looks at labels and tables first, which waits for the device, and raises.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from ._backends import LARGEST_LOG_DET
from ._checks import REDUCTIONS, real_dtype

library = _C  # has cuda_* functions where the module was built with LTKERNELS_CUDA=ON

PATHS = ("any", "registers", "cluster", "memory")  # enum Path of csrc/cuda/job.h
_DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}  # enum DType of csrc/cpu/kernels.h
_NONE, _SUM = REDUCTIONS.index("none"), REDUCTIONS.index("sum")


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


def adjusted_ce(
    logits: Tensor,
    loss: Tensor,
    grad: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    margin: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    row_coef: Tensor | None,
    focal_gamma: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    closed: tuple | None = None,
    *,
    path: str = "any",
) -> None:
    """Fills `loss` and, where it is given, `grad`; the arguments are those of ``_backends.cpu_adjusted_ce``.

    logits (N, C) with unit class stride, any row stride; grad likewise, may be the logits themselves. One launch for
    ``reduction="none"``, else two. `path` forces a kernel, for tests and benchmarks.

    Raises RuntimeError where CUDA refuses a launch; ValueError for labels and tables with ``LTKERNELS_CUDA_DEBUG=1``.
    """
    rows, classes = logits.shape
    if os.environ.get("LTKERNELS_CUDA_DEBUG") == "1":
        _check(classes, target, target_b, ignore_index, (shift, scale, margin, row_scale, weight))
    if rows == 0:
        if reduction != _NONE:
            loss.fill_(0.0 if reduction == _SUM else torch.nan)
        return
    scratch = None
    if reduction != _NONE:
        scratch = torch.empty(library.cuda_scratch(rows), dtype=torch.float64, device=logits.device)
    form, table, seed, options = (0, None, None, (0.0, 0.0, 0.0)) if closed is None else closed
    _raise(
        library.cuda_adjusted_ce(
            *current_stream(logits.device),
            PATHS.index(path),
            _DTYPE_CODES[logits.dtype],
            logits.data_ptr(),
            logits.stride(0),
            rows,
            classes,
            target.data_ptr(),
            *map(_address, (target_b, lam, shift, scale, margin, row_scale, weight, row_coef)),
            focal_gamma,
            label_smoothing,
            ignore_index,
            reduction,
            loss.data_ptr(),
            _address(grad),
            0 if grad is None else grad.stride(0),
            _address(scratch),
            form,
            _address(table),
            _address(seed),
            *options,
        )
    )


def row_statistics(
    logits: Tensor,
    target: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    ignore_index: int = -100,
    first_class: int = 0,
    all_classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One read of a shard of the logits: (N,) maximum m of the adjusted logits but the label's, sum of exp(a - m) over them, and the
    label's adjusted logit (-inf where another shard holds it).

    logits (N, C_local), column j being class ``first_class + j``; labels and tables are for all `all_classes` classes. Shards combine
    to ``m = max m_k, s = sum s_k exp(m_k - m), t = max t_k``. Ignored rows have (-inf, 0, -inf), rows with a bad label the sum NaN.
    """
    real = real_dtype(logits.dtype)
    out = tuple(torch.empty(logits.shape[0], dtype=real, device=logits.device) for _ in range(3))
    tables = (shift, scale, margin, row_scale, None, None)
    _statistics(True, logits, target, tables, 0.0, ignore_index, first_class, all_classes, out, None, None)
    return out


def gradient_from_statistics(
    logits: Tensor,
    target: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    weight: Tensor | None = None,
    row_coef: Tensor | None = None,
    *,
    focal_gamma: float = 0.0,
    ignore_index: int = -100,
    first_class: int = 0,
    all_classes: int | None = None,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """The gradient of a shard from the statistics of the whole rows (`row_statistics`), each row times `row_coef` (N,). Fills `loss` (N,)
    where it is given, and `grad`, new where it is not; returns `grad`."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if grad is None else grad
    tables = (shift, scale, margin, row_scale, weight, row_coef)
    _statistics(
        False, logits, target, tables, focal_gamma, ignore_index, first_class, all_classes, statistics, loss, grad
    )
    return grad


def _statistics(
    write: bool,
    logits: Tensor,
    target: Tensor,
    tables: tuple[Tensor | None, ...],
    focal_gamma: float,
    ignore_index: int,
    first_class: int,
    all_classes: int | None,
    statistics: tuple[Tensor, ...],
    loss: Tensor | None,
    grad: Tensor | None,
) -> None:
    rows, classes = logits.shape
    _raise(
        library.cuda_row_statistics(
            *current_stream(logits.device),
            int(write),
            _DTYPE_CODES[logits.dtype],
            logits.data_ptr(),
            logits.stride(0),
            rows,
            classes,
            first_class,
            classes if all_classes is None else all_classes,
            target.data_ptr(),
            *map(_address, tables),
            focal_gamma,
            ignore_index,
            *map(_address, statistics),
            _address(loss),
            _address(grad),
            0 if grad is None else grad.stride(0),
        )
    )


def scale_gradient(grad: Tensor, upstream: Tensor) -> Tensor:
    """`grad` times the one number of `upstream`, in place, in the loss' precision. The number stays on the device; where it is 1, the
    launch reads nothing else. grad contiguous; upstream one element, float64 for a float64 gradient, else float32."""
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {grad.stride()}; it must be contiguous")
    if upstream.numel() != 1 or upstream.dtype != real_dtype(grad.dtype):
        raise ValueError(
            f"upstream has shape {tuple(upstream.shape)} and dtype {upstream.dtype}; it must be one {real_dtype(grad.dtype)}"
        )
    _raise(
        library.cuda_scale(
            *current_stream(grad.device),
            _DTYPE_CODES[grad.dtype],
            grad.data_ptr(),
            grad.numel(),
            upstream.data_ptr(),
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
            _DTYPE_CODES[matrices.dtype],
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
    code = _DTYPE_CODES[dtype]
    _raise(library.cuda_plan(index, PATHS.index(path), code, classes, int(aligned), int(closed), out.data_ptr()))
    registers, threads, block, cluster = out.tolist()
    return Plan("memory" if not registers else "cluster" if cluster > 1 else "registers", threads, block, cluster)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _raise(error: str | None) -> None:
    if error is not None:
        raise RuntimeError(f"ltkernels: a CUDA kernel was not launched: {error}")


def _check(
    classes: int, target: Tensor, target_b: Tensor | None, ignore_index: int, tables: tuple[Tensor | None, ...]
) -> None:
    """The checks of the CPU kernel, with its messages; waits for the device."""
    active = target != ignore_index
    for name, labels in (("target", target), ("the second target", target_b)):
        if labels is None:
            continue
        bad = active & ((labels < 0) | (labels >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} has label {int(labels[row])} in row {row}; labels must lie in [0, {classes}) or equal "
                f"ignore_index ({ignore_index})"
            )
    for name, table in zip(("shift", "scale", "margin", "row_scale", "weight"), tables, strict=True):
        if table is None:
            continue
        bad = ~torch.isfinite(table) if name != "shift" else torch.isnan(table) | (table == torch.inf)
        if bad.any():
            index = int(bad.nonzero()[0])
            allowed = "finite or -inf" if name == "shift" else "finite"
            raise ValueError(f"{name}[{index}] is {table[index].item()}; it must be {allowed}")
