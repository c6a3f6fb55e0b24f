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
from ._backends import DTYPE_CODES, LARGEST_LOG_DET, ClassPart
from ._checks import REDUCTIONS, real_dtype

library = _C  # has cuda_* functions where the module was built with LTKERNELS_CUDA=ON

PATHS = ("any", "registers", "cluster", "memory")  # enum Path of csrc/cuda/job.h
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

    logits (N, C) with unit class stride, any row stride; grad likewise, may be the logits themselves. row_coef (N,) may be one number,
    expanded. Two launches; one for ``reduction="none"``, unless C is odd and there are
    tables. `path` forces a kernel, for tests and benchmarks.

    Raises RuntimeError where CUDA refuses a launch; ValueError for labels and tables with ``LTKERNELS_CUDA_DEBUG=1``.
    """
    rows, classes = logits.shape
    if os.environ.get("LTKERNELS_CUDA_DEBUG") == "1":
        _check(classes, target, target_b, ignore_index, (shift, scale, margin, row_scale, weight))
    if rows == 0:
        if reduction != _NONE:
            loss.fill_(0.0 if reduction == _SUM else torch.nan)
        return
    form, table, seed, options = (0, None, None, (0.0, 0.0, 0.0)) if closed is None else closed
    streamed = [_address(each) for each in (shift, scale, weight, table)]
    scratch = None
    if reduction != _NONE or any(streamed):
        doubles = library.cuda_scratch(rows, classes, *streamed)
        scratch = torch.empty(doubles, dtype=torch.float64, device=logits.device)
    _raise(
        library.cuda_adjusted_ce(
            *current_stream(logits.device),
            PATHS.index(path),
            DTYPE_CODES[logits.dtype],
            logits.data_ptr(),
            logits.stride(0),
            rows,
            classes,
            target.data_ptr(),
            *map(_address, (target_b, lam, shift, scale, margin, row_scale, weight, row_coef)),
            0 if row_coef is None else row_coef.stride(0),
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


def row_statistics(part: ClassPart, smooth: bool, out: Tensor) -> None:
    """Fills `out` (N, 4) in one read of the logits."""
    stream = current_stream(part.logits.device)
    _raise(library.cuda_row_statistics(*stream, *part.addresses(), int(smooth), out.data_ptr()))


def gradient_from_statistics(part: ClassPart, terms: Tensor, grad: Tensor) -> None:
    """Fills `grad`, which may be the logits, in one read and one write."""
    to = (terms.data_ptr(), grad.data_ptr(), grad.stride(0))
    _raise(library.cuda_gradient_from_statistics(*current_stream(part.logits.device), *part.addresses(), *to))


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
            _address(expected),
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
