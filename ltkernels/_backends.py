"""Which backend serves a call, and the calls into the compiled module.

A backend is ``cpu`` (the compiled module; its full name says the instruction set, as in ``cpu-avx512``) or ``torch`` (the plain
reference of `ltkernels.losses._reference`, which serves what no kernel does). `explain` tells which one a call would get.
"""

from __future__ import annotations

import platform
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from ._checks import real_dtype

# enum DType of csrc/cpu/kernels.h
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_TABLES = ("shift", "scale", "margin", "row_scale", "weight")
BACKENDS = ("cpu", "torch")


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
    if backend is None and not needs_torch and device.type == "cpu":
        return "cpu"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be None or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch" or needs_torch or device.type != "cpu":
        if backend == "cpu":
            raise ValueError(f"backend='cpu' cannot serve this call: {needs_torch or f'the logits are on {device}'}")
        return "torch"
    return "cpu"


def explain(backend: str | None, device: torch.device, needs_torch: str = "") -> Explanation:
    """What `choose` would choose, in words."""
    if choose(backend, device, needs_torch) == "cpu":
        return Explanation(f"cpu-{_C.info()['isa']}", f"compiled kernel on {torch.get_num_threads()} thread(s)")
    return Explanation(
        "torch", needs_torch or ("asked for" if backend else f"this build has no kernel for {device.type} tensors")
    )


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
) -> None:
    """Fills `loss` and, where it is given, `grad`; see ``adjusted_ce`` in `ltkernels._ops`. `closed` is a closed form's
    (code, table, seed, options).

    Raises ValueError for a label out of range and for a table with an entry that is not finite; nothing is written then.
    """
    rows, classes = logits.shape
    dtype = logits.dtype
    threads = torch.get_num_threads()
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
    status = _C.adjusted_ce(
        _DTYPE_CODES[dtype],
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
    )
    if status == -1:
        return
    if status < -1:
        name = _TABLES[-2 - status]
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


def doctor_report() -> list[tuple[str, str]]:
    """What this build can do on this machine: (name, finding) pairs for ``ltkernels doctor``."""
    info = _C.info()
    rows = [("processor", platform.machine()), ("compiler", f"GCC/Clang {info['compiler']}")]
    for name, state in info["isas"].items():
        active = " (active; LTKERNELS_ISA overrides)" if name == info["isa"] else ""
        rows.append((f"cpu-{name}", state + active))
    rows.append(("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"))
    if info["cuda"]:
        rows.append(
            ("cuda", f"runtime {info['cuda']}, {info['cuda_devices']} device(s); no CUDA kernel in this version")
        )
    else:
        rows.append(("cuda", "not built (LTKERNELS_CUDA=ON at build time); CUDA tensors are served by torch"))
    rows.append(("torch", torch.__version__))
    return rows
