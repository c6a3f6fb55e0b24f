"""Which backend serves a call, and the calls into the compiled module.

A backend is ``cpu`` (the compiled module; its full name says the instruction set, as in ``cpu-avx512``), ``cuda`` (its CUDA part),
``triton`` (`ltkernels.triton`, for GPUs where there is no CUDA part) or ``torch`` (the plain reference of
`ltkernels.losses._reference`, which serves what no kernel does). `explain` tells which one a call would get.
"""

from __future__ import annotations

import functools
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from ._checks import real_dtype

# enum DType of csrc/cpu/kernels.h
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
TABLES = ("shift", "scale", "margin", "row_scale", "weight")
BACKENDS = ("cpu", "cuda", "triton", "torch")
ON_DEVICE = ("cuda", "triton")  # whose kernels run beside the host


class Explanation(NamedTuple):
    """The backend that serves a call, and why."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def choose(backend: str | None, device: torch.device, needs_torch: str = "") -> str:
    """The backend of a loss on `device`; `needs_torch` says why no kernel can serve it, empty when one can.

    Raises ValueError where `backend` is unknown or cannot serve the call: a forced backend is never replaced.
    """
    if backend is None:
        if needs_torch:
            return "torch"
        return "cpu" if device.type == "cpu" else _accelerator(device.type)[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be None or one of {', '.join(map(repr, BACKENDS))}")
    problem = "" if backend == "torch" else needs_torch or _cannot_serve(backend, device.type)
    if problem:
        raise ValueError(f"backend={backend!r} cannot serve this call: {problem}")
    return backend


def _cannot_serve(backend: str, kind: str) -> str:
    """Why a kernel backend cannot run on tensors of this kind of device; empty where it can."""
    if backend == "cpu":
        return "" if kind == "cpu" else f"the logits are on a {kind} device"
    if backend == "cuda":
        return cuda_problem() or ("" if kind == "cuda" else f"the logits are on a {kind} device")
    return triton_problem(kind)


@torch.compiler.assume_constant_result
def cuda_problem() -> str:
    """Why the CUDA kernels cannot run; empty where they can."""
    if not _C.info()["cuda"]:
        return "this build has no CUDA part (LTKERNELS_CUDA=ON at build time)"
    return "" if _C.info()["cuda_devices"] else "there is no CUDA device"


@torch.compiler.assume_constant_result
def triton_problem(kind: str) -> str:
    """Why the Triton kernels cannot run on this kind of device; empty where they can."""
    from . import triton

    usable, reason = triton.available()
    if not usable:
        return reason
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "cpu" and not interpreted:
        return "the logits are on a cpu device, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    return "" if kind in ("cpu", "cuda") else f"they have no {kind} target"


@torch.compiler.assume_constant_result
@functools.cache
def _accelerator(kind: str) -> tuple[str, str]:
    """The backend of an accelerator, and why it is not a better one. Falling to torch is said once, in a warning."""
    problem = cuda_problem() if kind == "cuda" else f"there is no compiled kernel for {kind} tensors"
    if not problem:
        return "cuda", ""
    triton = triton_problem(kind)
    if not triton:
        return "triton", problem
    problem = f"{problem}; {triton}"
    if kind != "meta":
        warnings.warn(f"ltkernels: torch serves {kind} tensors, several times slower: {problem}", stacklevel=2)
    return "torch", problem


def explain(backend: str | None, device: torch.device, needs_torch: str = "") -> Explanation:
    """What `choose` would choose, in words."""
    chosen = choose(backend, device, needs_torch)
    if chosen == "cpu":
        return Explanation(f"cpu-{_C.info()['isa']}", f"compiled kernel on {torch.get_num_threads()} thread(s)")
    tuned = "; tiles are timed (LTKERNELS_TRITON_AUTOTUNE=1)"
    tuned = tuned if chosen == "triton" and os.environ.get("LTKERNELS_TRITON_AUTOTUNE") == "1" else ""
    if needs_torch or backend is not None:
        return Explanation(chosen, (needs_torch or "asked for") + tuned)
    why = _accelerator(device.type)[1]
    if chosen == "torch":
        return Explanation(chosen, f"this build has no kernel for {device.type} tensors: {why}")
    return Explanation(chosen, f"Triton kernel: {why}{tuned}" if chosen == "triton" else "compiled CUDA kernel")


@functools.cache
def kernel(backend: str) -> Callable[..., None]:
    """The function behind a backend's ``adjusted_ce``, in the signature of `cpu_adjusted_ce`."""
    if backend == "cuda":
        from ._cuda import adjusted_ce

        return adjusted_ce
    if backend == "triton":
        from .triton.adjusted_ce import adjusted_ce

        return adjusted_ce
    return cpu_adjusted_ce


@functools.cache
def scale_kernel(backend: str) -> Callable[[Tensor, Tensor, Tensor | None], object]:
    """``scale_gradient(grad, upstream, expected)`` of a GPU backend: `grad` times upstream / expected, in place, and without a pass over
    it where they are equal. Both are numbers on the device that the host does not wait for; `expected` None is 1."""
    if backend == "cuda":
        from ._cuda import scale_gradient
    else:
        from .triton.adjusted_ce import scale_gradient
    return scale_gradient


def two_phase_kernels(device: torch.device) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """``row_statistics`` and ``gradient_from_statistics`` in the signatures of the `cpu_` functions below; None where torch serves the
    device's tensors."""
    if device.type == "cpu":
        return cpu_row_statistics, cpu_gradient_from_statistics
    if device.type != "cuda" or cuda_problem():
        return None
    from . import _cuda

    return _cuda.row_statistics, _cuda.gradient_from_statistics


LARGEST_LOG_DET = 64  # of the CUDA kernel, a warp a matrix


def log_det_kernel(matrices: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``logdet`` of (K, n, n) matrices for a batch (..., n, n); None where torch's Cholesky factors serve it: no batch, wide matrices, a
    gradient to keep, no CUDA part."""
    small = matrices.dim() > 2 and 1 <= matrices.shape[-1] <= LARGEST_LOG_DET and matrices.numel() > 0
    if not (matrices.is_cuda and small) or torch.compiler.is_compiling() or cuda_problem():
        return None
    if matrices.dtype not in (torch.float32, torch.float64) or (matrices.requires_grad and torch.is_grad_enabled()):
        return None
    from ._cuda import logdet

    return logdet


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cpu_adjusted_ce(
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
    grad_tables: Tensor | None = None,
    needs: Sequence[bool] = (),
) -> None:
    """Fills `loss` and, where they are given, `grad` and `grad_tables`, a row for each table that `needs` says; see ``adjusted_ce`` and
    ``learnable_ce`` in `ltkernels._ops`. `closed` is a closed form's (code, table, seed, options).

    Raises ValueError for a label out of range and for a table with an entry that is not finite; nothing is written then.
    """
    rows, classes = logits.shape
    dtype = logits.dtype
    threads = torch.get_num_threads()
    if row_coef is not None:
        row_coef = row_coef.contiguous()  # one number for all rows comes expanded
    # One allocation: the threads' scratch, then the row losses where the caller does not want them. Small calls live on the
    # kernel's own stack.
    per_thread = _C.adjusted_ce_scratch(classes)
    scratch_address = row_loss = 0
    if threads * per_thread + rows > _C.ADJUSTED_CE_STACK:
        scratch = torch.empty(threads * per_thread + rows, dtype=real_dtype(dtype))
        scratch_address = scratch.data_ptr()
        row_loss = scratch_address + threads * per_thread * scratch.element_size()
    if reduction == 0:
        row_loss = loss.data_ptr()
    vectors: tuple[int, ...] = ()
    if grad_tables is not None:
        if shift is None:  # their kernel has no instances without it
            shift = torch.zeros(classes, dtype=real_dtype(dtype))
        labels = 1 if target_b is None else 2
        doubles = _C.vector_gradients_scratch(rows, classes, needs[0] + needs[1], labels, dtype == torch.float64)
        sums = torch.empty(doubles, dtype=torch.float64)
        row, size, addresses = grad_tables.data_ptr(), classes * grad_tables.element_size(), [sums.data_ptr()]
        for need in needs:
            addresses.append(row if need else 0)
            row += size if need else 0
        vectors = tuple(addresses)
    status = _C.adjusted_ce(
        DTYPE_CODES[dtype],
        logits.data_ptr(),
        logits.stride(0),
        rows,
        classes,
        target.data_ptr(),
        0 if target_b is None else target_b.data_ptr(),
        0 if lam is None else lam.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if margin is None else margin.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if row_coef is None else row_coef.data_ptr(),
        focal_gamma,
        label_smoothing,
        ignore_index,
        reduction,
        row_loss,
        loss.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else grad.stride(0),
        scratch_address,
        threads,
        () if closed is None else (closed[0], _address(closed[1]), _address(closed[2]), *closed[3]),
        vectors,
    )
    if status == -1:
        return
    if status < -1:
        name = TABLES[-2 - status]
        table = (shift, scale, margin, row_scale, weight)[-2 - status]
        index = int(torch.isfinite(table).logical_not().nonzero()[0]) if name != "shift" else _bad_shift(table)
        allowed = "finite or -inf" if name == "shift" else "finite"
        raise ValueError(f"{name}[{index}] is {table[index].item()}; it must be {allowed}")
    label, name = int(target[status]), "target"
    if target_b is not None and 0 <= label < classes:
        label, name = int(target_b[status]), "the second target"
    raise ValueError(
        f"{name} has label {label} in row {status}; labels must lie in [0, {classes}) or equal ignore_index "
        f"({ignore_index})"
    )


def _bad_shift(table: Tensor) -> int:
    return int((torch.isnan(table) | (table == torch.inf)).nonzero()[0])


class ClassPart(NamedTuple):
    """A part of the classes of every row, as csrc/cpu/row_statistics.h has it; see `ltkernels.losses._two_phase`."""

    logits: Tensor
    labels: Tensor
    row_scale: Tensor
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        """As the entry points of the kernels take it."""
        rows = (self.logits.data_ptr(), self.logits.stride(0), *self.logits.shape, self.labels.data_ptr())
        tables = map(_address, (self.shift, self.scale, self.weight))
        return (DTYPE_CODES[self.logits.dtype], *rows, *tables, self.row_scale.data_ptr())


def cpu_row_statistics(part: ClassPart, smooth: bool, out: Tensor) -> None:
    """Fills `out` (N, 4)."""
    _C.row_statistics(*part.addresses(), smooth, out.data_ptr(), torch.get_num_threads())


def cpu_gradient_from_statistics(part: ClassPart, terms: Tensor, grad: Tensor) -> None:
    """Fills `grad`, which may be the logits."""
    to = (terms.data_ptr(), grad.data_ptr(), grad.stride(0))
    _C.gradient_from_statistics(*part.addresses(), *to, torch.get_num_threads())


def doctor_report() -> list[tuple[str, str]]:
    """What this build can do on this machine: (name, finding) pairs for ``ltkernels doctor``."""
    info = _C.info()
    rows = [("processor", platform.machine()), ("compiler", f"GCC/Clang {info['compiler']}")]
    for name, state in info["isas"].items():
        active = " (active; LTKERNELS_ISA overrides)" if name == info["isa"] else ""
        rows.append((f"cpu-{name}", state + active))
    rows.append(("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"))
    if info["cuda"]:
        rows.append(("cuda", f"runtime {info['cuda']}, {info['cuda_devices']} device(s)"))
    else:
        rows.append(("cuda", "not built (LTKERNELS_CUDA=ON at build time)"))
    from . import triton

    rows.append(("triton", triton.available()[1]))
    rows.append(("torch", torch.__version__))
    return rows
