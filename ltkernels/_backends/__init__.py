"""Which backend serves a call.

A backend is ``cpu`` (the compiled module; its full name says the instruction set, as in ``cpu-avx512``), ``cuda`` (its CUDA part),
``triton`` (`ltkernels.triton`, for GPUs where there is no CUDA part, and for what that has no kernel for) or ``torch`` (the plain
reference of `ltkernels.losses._reference`, which serves what no kernel does). `explain` tells which one a call would get.
"""

from __future__ import annotations

import functools
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._call import NONE, Call, Out, denominator_of
from .._errors import ArgumentError
from .._native import _C
from . import cpu
from ._shared import DTYPE_CODES, LARGEST_LOG_DET, ClassPart, bad_label, bad_table, find_bad_beside, find_bad_label
from .cpu import plain_loss, row_maxima

BACKENDS = ("cpu", "cuda", "triton", "torch")
ON_DEVICE = ("cuda", "triton")  # whose kernels run beside the host


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _constant(function: _Function) -> _Function:
    """What `torch.compiler.assume_constant_result` does, which would import the whole compiler (850 modules) to do it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Explanation(NamedTuple):
    """The backend that serves a call, and why."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def choose(backend: str | None, device: torch.device, needs_torch: str = "", not_cuda: str = "") -> str:
    """The backend of a loss on `device`; `needs_torch` says why no kernel can serve it, empty when one can, and `not_cuda` why the CUDA
    kernels cannot, where Triton's can.

    Raises ValueError where `backend` is unknown or cannot serve the call: a forced backend is never replaced.
    """
    if backend is None:
        if needs_torch:
            return "torch"
        if device.type == "cpu":
            return "cpu"
        found = _accelerator(device.type)[0]
        if found == "cuda" and not_cuda:
            return "torch" if triton_problem(device.type) else "triton"
        return found
    if backend not in BACKENDS:
        raise ArgumentError(f"backend is {backend!r}; it must be None or one of {', '.join(map(repr, BACKENDS))}")
    problem = "" if backend == "torch" else needs_torch or (not_cuda if backend == "cuda" else "")
    problem = problem or ("" if backend == "torch" else _cannot_serve(backend, device.type))
    if problem:
        raise ArgumentError(f"backend={backend!r} cannot serve this call: {problem}")
    return backend


def _cannot_serve(backend: str, kind: str) -> str:
    """Why a kernel backend cannot run on tensors of this kind of device; empty where it can."""
    if backend == "cpu":
        return "" if kind == "cpu" else f"the logits are on a {kind} device"
    if backend == "cuda":
        return cuda_problem() or ("" if kind == "cuda" else f"the logits are on a {kind} device")
    return triton_problem(kind)


@_constant
def cuda_problem() -> str:
    """Why the CUDA kernels cannot run; empty where they can."""
    if not _C.info()["cuda"]:
        return "this build has no CUDA part (LTKERNELS_CUDA=ON at build time)"
    return "" if _C.info()["cuda_devices"] else "there is no CUDA device"


@_constant
def triton_problem(kind: str) -> str:
    """Why the Triton kernels cannot run on this kind of device; empty where they can."""
    from .. import triton

    usable, reason = triton.available()
    if not usable:
        return reason
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "cpu" and not interpreted:
        return "the logits are on a cpu device, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    return "" if kind in ("cpu", "cuda") else f"they have no {kind} target"


@_constant
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


def explain(backend: str | None, device: torch.device, needs_torch: str = "", not_cuda: str = "") -> Explanation:
    """What `choose` would choose, in words."""
    chosen = choose(backend, device, needs_torch, not_cuda)
    if chosen == "cpu":
        return Explanation(f"cpu-{_C.info()['isa']}", f"compiled kernel on {torch.get_num_threads()} thread(s)")
    tuned = "; tiles are timed (LTKERNELS_TRITON_AUTOTUNE=1)"
    tuned = tuned if chosen == "triton" and os.environ.get("LTKERNELS_TRITON_AUTOTUNE") == "1" else ""
    if needs_torch or backend is not None:
        return Explanation(chosen, (needs_torch or "asked for") + tuned)
    best, why = _accelerator(device.type)
    if best == "cuda" and not_cuda:
        why = f"{not_cuda}; {triton_problem(device.type)}".removesuffix("; ")
    if chosen == "torch":
        return Explanation(chosen, f"this build has no kernel for {device.type} tensors: {why}")
    return Explanation(chosen, f"Triton kernel: {why}{tuned}" if chosen == "triton" else "compiled CUDA kernel")


def kernel(backend: str) -> Callable[[Tensor, Call, Out], None]:
    """``adjusted_ce(logits, call, out)`` of a backend."""
    return cpu.adjusted_ce if backend == "cpu" else _device_kernel(backend)


@functools.cache
def _device_kernel(backend: str) -> Callable[[Tensor, Call, Out], None]:
    if backend == "cuda":
        from . import cuda

        return weighing_rows(cuda.adjusted_ce)
    from ..triton.adjusted_ce import adjusted_ce

    found: Callable[[Tensor, Call, Out], None] = adjusted_ce
    return found


def weighing_rows(kernel: Callable[[Tensor, Call, Out], None]) -> Callable[[Tensor, Call, Out], None]:
    """A kernel that knows no sample weights, with them: they are factors of the row losses, and of the rows' gradients, for which it has
    an operand. No pass over the logits more, and some launches for N numbers."""

    @functools.wraps(kernel)
    def adjusted_ce(logits: Tensor, call: Call, out: Out) -> None:
        own = call.sample_weight
        if own is None:
            kernel(logits, call, out)
            return
        denominator = denominator_of(call)
        factor = own if call.grad_scale is None else own * call.grad_scale
        factor = (factor / denominator).to(own.dtype)
        rows = out.loss if call.reduction == NONE else torch.empty_like(own)
        kernel(logits, call._replace(reduction=NONE, grad_scale=factor, sample_weight=None), out._replace(loss=rows))
        # What an ignored row's weight holds counts for nothing.
        rows.mul_(torch.where(call.target == call.ignore_index, 0, own))
        if call.reduction != NONE:
            out.loss.copy_(rows.double().sum() / denominator)

    return adjusted_ce


@functools.cache
def scale_kernel(backend: str) -> Callable[[Tensor, Tensor, Tensor | None], object]:
    """``scale_gradient(grad, upstream, expected)`` of a GPU backend: `grad` times upstream / expected, in place, and without a pass over
    it where they are equal. Both are numbers on the device that the host does not wait for; `expected` None is 1."""
    if backend == "cuda":
        from . import cuda

        return cuda.scale_gradient
    from ..triton import adjusted_ce

    found: Callable[[Tensor, Tensor, Tensor | None], object] = adjusted_ce.scale_gradient
    return found


def two_phase_kernels(device: torch.device) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """``row_statistics`` and ``gradient_from_statistics`` in the signatures of `_backends.cpu`; None where torch serves the device's
    tensors."""
    if device.type == "cpu":
        return cpu.row_statistics, cpu.gradient_from_statistics
    if device.type != "cuda" or cuda_problem():
        return None
    from . import cuda

    return cuda.row_statistics, cuda.gradient_from_statistics


def log_det_kernel(matrices: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``logdet`` of (K, n, n) matrices for a batch (..., n, n); None where torch's Cholesky factors serve it: no batch, wide matrices, a
    gradient to keep, no CUDA part, float32 on the CPU."""
    small = matrices.dim() > 2 and 1 <= matrices.shape[-1] <= LARGEST_LOG_DET and matrices.numel() > 0
    if not small or torch.compiler.is_compiling() or (matrices.requires_grad and torch.is_grad_enabled()):
        return None
    if not matrices.is_cuda:
        return cpu.logdet if matrices.dtype == torch.float64 and matrices.device.type == "cpu" else None
    if cuda_problem() or matrices.dtype not in (torch.float32, torch.float64):
        return None
    from .cuda import logdet

    return logdet


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
    from .. import triton

    rows.append(("triton", triton.available()[1]))
    rows.append(("torch", torch.__version__))
    return rows


__all__ = [
    "BACKENDS",
    "DTYPE_CODES",
    "ON_DEVICE",
    "ClassPart",
    "Explanation",
    "bad_label",
    "bad_table",
    "choose",
    "cuda_problem",
    "doctor_report",
    "explain",
    "find_bad_beside",
    "find_bad_label",
    "kernel",
    "log_det_kernel",
    "plain_loss",
    "row_maxima",
    "scale_kernel",
    "triton_problem",
    "two_phase_kernels",
]
