"""The only file that calls ``torch.library``: the operators' schemas, their kernels and their shapes for tracing.

The raw operators carry no gradient. Public functions reach them through the autograd functions of `ltkernels.losses._core`;
training through a raw operator would detach silently, so nothing public returns one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._checks import real_dtype

_library = torch.library.Library("ltkernels", "DEF")

_ARGUMENTS = (
    "Tensor target, Tensor? target_b, Tensor? lam, Tensor? shift, Tensor? scale, Tensor? margin, Tensor? row_scale, "
    "Tensor? weight, Tensor? row_coef, float focal_gamma, float label_smoothing, int ignore_index, int reduction"
)
# A closed form (`ltkernels.losses._terms`) beside them: its code, (C,) table, (1,) seed and three options.
_CLOSED_ARGUMENTS = _ARGUMENTS.replace("Tensor? row_coef", "Tensor? table, Tensor? seed, Tensor? row_coef") + (
    ", int form, float[] form_options"
)

_NONE = 0  # code of reduction="none"
_DEVICES = ("CPU", "CUDA")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an operator whose kernel, the same for every device, is written elsewhere in the package, and returns it."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in _DEVICES:
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"ltkernels::{name}", fake, lib=_library)
    return getattr(torch.ops.ltkernels, name).default


def _loss_like(logits: Tensor, reduction: int) -> Tensor:
    shape = (logits.shape[0],) if reduction == _NONE else ()
    return logits.new_empty(shape, dtype=real_dtype(logits.dtype))


def _outputs(logits: Tensor, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Loss and gradient, not filled: the shapes for tracing and the memory for the kernel."""
    if need_grad and logits.is_contiguous():
        grad = torch.empty_like(logits)  # half the time of the line below
    else:
        grad = torch.empty(logits.shape if need_grad else (0,), dtype=logits.dtype, device=logits.device)
    return _loss_like(logits, reduction), grad


def _run(
    logits: Tensor, arguments: tuple[object, ...], need_grad: bool, backend: str, closed: tuple | None
) -> tuple[Tensor, Tensor]:
    if logits.stride(1) != 1 and logits.shape[1] != 1:
        logits = logits.contiguous()
    loss, grad = _outputs(logits, arguments[-1], need_grad)
    _backends.kernel(backend)(logits, loss, grad if need_grad else None, *arguments, closed)
    return loss, grad


def _run_inplace(logits: Tensor, arguments: tuple[object, ...], backend: str, closed: tuple | None) -> Tensor:
    loss = _loss_like(logits, arguments[-1])
    grad = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    _backends.kernel(backend)(grad, loss, grad, *arguments, closed)
    if grad is not logits:
        logits.copy_(grad)
    return loss


def _split_closed(arguments: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """The arguments of adjusted_ce, and (form, table, seed, options) beside them."""
    *rest, form, options = arguments
    return (*rest[:8], *rest[10:]), (form, rest[8], rest[9], options)


def _adjusted_ce(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _run(logits, arguments[:-2], *arguments[-2:], None)


def _adjusted_ce_inplace(logits: Tensor, *arguments: object) -> Tensor:
    return _run_inplace(logits, arguments[:-1], arguments[-1], None)


def _adjusted_ce_fake(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _outputs(logits, arguments[-3], arguments[-2])


def _adjusted_ce_inplace_fake(logits: Tensor, *arguments: object) -> Tensor:
    return _loss_like(logits, arguments[-2])


def _grad_tables(logits: Tensor, needs: list[bool]) -> Tensor:
    return torch.empty(sum(needs), logits.shape[1], dtype=real_dtype(logits.dtype), device=logits.device)


def spread(rows: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The (K, C) gradients of the K wanted tables as five, None where not wanted."""
    wanted = iter(rows.unbind())
    return tuple(next(wanted) if need else None for need in needs)


def _learnable_ce(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, need_grad, needs = arguments
    if logits.stride(1) != 1 and logits.shape[1] != 1:
        logits = logits.contiguous()
    loss, grad = _outputs(logits, arguments[-1], need_grad)
    grad_tables = _grad_tables(logits, needs)
    _backends.cpu_adjusted_ce(logits, loss, grad if need_grad else None, *arguments, None, grad_tables, needs)
    return loss, grad, grad_tables


def _learnable_ce_inplace(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    *arguments, needs = arguments
    loss, grad_tables = _loss_like(logits, arguments[-1]), _grad_tables(logits, needs)
    grad = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    _backends.cpu_adjusted_ce(grad, loss, grad, *arguments, None, grad_tables, needs)
    if grad is not logits:
        logits.copy_(grad)
    return loss, grad_tables


def _learnable_ce_fake(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    reduction, need_grad, needs = arguments[-3:]
    return *_outputs(logits, reduction, need_grad), _grad_tables(logits, needs)


def _learnable_ce_inplace_fake(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _loss_like(logits, arguments[-2]), _grad_tables(logits, arguments[-1])


def _closed_ce(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    plain, closed = _split_closed(arguments[:-2])
    return _run(logits, plain, *arguments[-2:], closed)


def _closed_ce_inplace(logits: Tensor, *arguments: object) -> Tensor:
    plain, closed = _split_closed(arguments[:-1])
    return _run_inplace(logits, plain, arguments[-1], closed)


def _closed_ce_fake(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _outputs(logits, _split_closed(arguments[:-2])[0][-1], arguments[-2])


def _closed_ce_inplace_fake(logits: Tensor, *arguments: object) -> Tensor:
    return _loss_like(logits, _split_closed(arguments[:-1])[0][-1])


# Loss and gradient. logits (N, C), target (N,) int64, tables (C,), lam and row_coef (N,); tables, lam, row_coef and the loss in
# float64 for float64 logits, else float32. Without need_grad the gradient is an empty tensor. `backend` is one that serves the
# logits' device.
adjusted_ce = define(
    f"adjusted_ce(Tensor logits, {_ARGUMENTS}, bool need_grad, str backend) -> (Tensor loss, Tensor grad)",
    _adjusted_ce,
    _adjusted_ce_fake,
)
# The same; the gradient replaces the logits.
adjusted_ce_ = define(
    f"adjusted_ce_(Tensor(a!) logits, {_ARGUMENTS}, str backend) -> Tensor loss",
    _adjusted_ce_inplace,
    _adjusted_ce_inplace_fake,
)
# The same two with a closed form.
closed_ce = define(
    f"closed_ce(Tensor logits, {_CLOSED_ARGUMENTS}, bool need_grad, str backend) -> (Tensor loss, Tensor grad)",
    _closed_ce,
    _closed_ce_fake,
)
closed_ce_ = define(
    f"closed_ce_(Tensor(a!) logits, {_CLOSED_ARGUMENTS}, str backend) -> Tensor loss",
    _closed_ce_inplace,
    _closed_ce_inplace_fake,
)


# adjusted_ce and adjusted_ce_ on the CPU with gradients of tables: a row for each table that `needs` says, in the order shift, scale,
# margin, row_scale, weight; the last without label smoothing.
learnable_ce = define(
    f"learnable_ce(Tensor logits, {_ARGUMENTS}, bool need_grad, bool[] needs) "
    "-> (Tensor loss, Tensor grad, Tensor grad_tables)",
    _learnable_ce,
    _learnable_ce_fake,
)
learnable_ce_ = define(
    f"learnable_ce_(Tensor(a!) logits, {_ARGUMENTS}, bool[] needs) -> (Tensor loss, Tensor grad_tables)",
    _learnable_ce_inplace,
    _learnable_ce_inplace_fake,
)


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transforms = torch._C._are_functorch_transforms_active
_jit_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled


def unwatched(tensor: Tensor) -> bool:
    """Whether nobody watches the dispatcher: no compilation, tracing, dispatch mode, tensor subclass, function transform or
    profiler."""
    return (
        not torch.compiler.is_compiling()
        and (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and _dispatch_modes() == 0
        and not _function_transforms()
        and _jit_tracing() is None
        and not _profiling()
    )


def run_adjusted_ce(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """`adjusted_ce`, straight to the kernel where nobody watches the dispatcher: on the way through it the 19 arguments cost 15 us,
    and a 128 x 10 loss takes 5."""
    if unwatched(logits):
        return _adjusted_ce(logits, *arguments)
    return adjusted_ce(logits, *arguments)


def run_learnable_ce(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """`learnable_ce`, straight to the kernel where nobody watches the dispatcher."""
    return (_learnable_ce if unwatched(logits) else learnable_ce)(logits, *arguments)
