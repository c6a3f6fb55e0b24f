"""The loss as an operator with gradients: one `torch.autograd.Function`, and two operators around the same kernels, out of place and in
place.

A scalar loss computes the gradient together with the loss, one exp a logit, for the upstream gradient that the caller expects
(`Call.grad_scale`; 1 where nothing is said); backward multiplies by the quotient of what came and what was expected, which nearly always
is 1 and costs nothing. The gradient is formed in backward instead, where the upstream gradient is known,

- for unreduced losses;
- for float16 logits where nothing was said of the factor: rounded to float16 before a loss scaler's factor, the small gradients would be
  the zeros that the scaler is there to prevent;
- where somebody packs what is saved (activation checkpointing, offloading): the logits are what they expect to find.

Calls that nobody watches go straight to the kernel: on the way through the dispatcher their operands cost 15 us, and a 128 x 10 loss
takes 5. All others are `adjusted_ce` and `adjusted_ce_` of ``torch.ops.ltkernels``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _ops
from .._call import NONE, Call, Out
from .._checks import real_dtype
from .._fused import differentiable
from .._watch import batched, direct, hooks_active, refuse_dtensors, transforms, wants_gradient, watched
from . import _reference

Below = Callable[..., Any]
Grads = tuple[Tensor | None, Tensor | None]  # of the logits; of the wanted tables, a row each

# Where the gradient is between forward and backward.
_LATER, _OWNED, _SAVED, _INPLACE = range(4)
_profiling = torch._C._autograd._profiler_enabled
_NO_TABLES = (False, False, False, False, False)
_LOGITS = (True, *_NO_TABLES, False, False, False)  # needs_input_grad where logits alone require one


def loss(logits: Tensor, call: Call, inplace: bool, direct: bool) -> Tensor:
    """The loss of a checked call that a kernel serves; differentiable in logits and tables. `direct`: see `_watch.direct`."""
    if direct:
        if (logits.requires_grad and torch.is_grad_enabled()) or wants_gradient(call[3:8]):
            found: Tensor = _apply(logits, *call[3:8], call, inplace, None)
            return found
        return run(logits, call)[0]
    refuse_dtensors(call)
    operands = as_operands(call)
    if inplace:
        result: Tensor = adjusted_ce_(logits, *operands, _NO_TABLES)[0]
    else:
        result = adjusted_ce(logits, *operands, False, _NO_TABLES)[0]
    return result


def as_operands(call: Call) -> Call:
    """For the dispatcher. A compiler makes Python's floats constants, and a graph for each of their values; a tensor that it computes from
    them is an operand. Not for other devices: a tensor on the CPU among its operands keeps an operator out of CUDA graphs."""
    if (
        torch.compiler.is_compiling()
        and call.target.is_cpu
        and (call.focal_gamma != 0.0 or call.label_smoothing != 0.0)
    ):
        one = torch.ones((), dtype=torch.float64, device="cpu")
        numbers = torch.stack([one * call.focal_gamma, one * call.label_smoothing])
        return call._replace(numbers=numbers, focal_gamma=0.0, label_smoothing=0.0)
    return call


# ---- below autograd ---------------------------------------------------------------------------------------------------


def _loss_like(logits: Tensor, reduction: int) -> Tensor:
    shape = (logits.shape[0],) if reduction == NONE else ()
    return torch.empty(shape, dtype=real_dtype(logits.dtype), device=logits.device)


def _grad_tables(logits: Tensor, needs: Sequence[bool]) -> Tensor:
    return torch.empty((sum(needs), logits.shape[1]), dtype=real_dtype(logits.dtype), device=logits.device)


def _consecutive(logits: Tensor) -> Tensor:
    """With unit class stride, as kernels take them."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def run(
    logits: Tensor, call: Call, need_grad: bool = False, needs: Sequence[bool] = ()
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, gradient and the wanted tables' gradients by the call's back end; None where not wanted."""
    if call.backend == "cpu" and True not in needs and not _profiling():
        found = _backends.plain_loss(logits, call, need_grad)
        if found is not None:
            return *found, None
    logits = _consecutive(logits)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if need_grad else None
    loss = _loss_like(logits, call.reduction)
    tables = _grad_tables(logits, needs) if True in needs else None
    _compute(logits, call, Out(loss, grad, tables, needs))
    return loss, grad, tables


def run_inplace(logits: Tensor, call: Call, needs: Sequence[bool] = ()) -> tuple[Tensor, Tensor | None]:
    """Loss and the wanted tables' gradients; the gradient replaces the logits."""
    grad = _consecutive(logits)
    tables = _grad_tables(logits, needs) if any(needs) else None
    out = Out(_loss_like(logits, call.reduction), grad, tables, needs)
    _compute(grad, call, out)
    if grad is not logits:
        logits.copy_(grad)
    return out.loss, tables


def _compute(logits: Tensor, call: Call, out: Out) -> None:
    if call.numbers is not None:
        call = call.with_numbers()
    kernel = _backends.kernel(call.backend)
    if _profiling():  # a direct call would not be seen
        with torch.profiler.record_function("ltkernels::adjusted_ce"):
            kernel(logits, call, out)
    else:
        kernel(logits, call, out)


def _kernel(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need_grad, needs = arguments
    found, grad, tables = run(logits, Call(*operands), need_grad, needs)
    empty = logits.new_empty(0)
    return found, empty if grad is None else grad, _grad_tables(logits, _NO_TABLES) if tables is None else tables


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need_grad, needs = arguments
    grad = torch.empty(logits.shape if need_grad else (0,), dtype=logits.dtype, device=logits.device)
    return _loss_like(logits, Call(*operands).reduction), grad, _grad_tables(logits, needs)


def _kernel_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, needs = arguments
    found, tables = run_inplace(logits, Call(*operands), needs)
    return found, _grad_tables(logits, _NO_TABLES) if tables is None else tables


def _fake_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, needs = arguments
    return _loss_like(logits, Call(*operands).reduction), _grad_tables(logits, needs)


# ---- the Function -----------------------------------------------------------------------------------------------------


class _AdjustedCrossEntropy(torch.autograd.Function):
    """``(logits, *tables, call, inplace, below) -> loss``; `call` has the same tables. `below` is None for a direct call; else it is the
    operator below autograd, which a watched call must go through."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        margin: Tensor | None,
        row_scale: Tensor | None,
        weight: Tensor | None,
        call: Call,
        inplace: bool,
        below: Below | None,
    ) -> Any:
        needs = ctx.needs_input_grad
        ctx.call = call
        if needs == _LOGITS and below is None and not inplace and not in_backward(call, logits.dtype):
            # Nearly always; the steps below, without those that lead elsewhere.
            found = None if hooks_active() or _profiling() else _backends.plain_loss(logits, call, True)
            if found is not None:
                ctx.state, loss = _OWNED, found[0]
                own(ctx, (found[1], None), call)
                ctx.save_for_backward(logits, *call.held())
                return loss
        if inplace:
            return _forward_inplace(ctx, logits, call, below)
        if below is None:
            later = in_backward(call, logits.dtype) or hooks_active()
            ctx.state = _LATER if later else _OWNED
            loss, *grads = run(logits, call) if later else run(logits, call, needs[0], needs[1:6])
            own(ctx, grads, call)
            ctx.save_for_backward(logits, *call.held())
            return loss
        later = in_backward(call, logits.dtype)
        loss, *grads = below(logits, *call, not later and needs[0], _NO_TABLES if later else needs[1:6])
        ctx.state = _LATER if later else _SAVED
        ctx.saved = len(grads)
        ctx.save_for_backward(logits, *call.held(), *([] if later else grads))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, upstream), None, None, None
        state = ctx.state
        if state == _INPLACE:
            grad, tables = _given(ctx, upstream)
        elif state == _LATER:
            grad, tables = _recomputed(ctx, upstream)
        else:
            grad, tables = give(ctx, upstream, _recomputed)
        if tables is None:
            return grad, None, None, None, None, None, None, None, None
        needs = ctx.needs_input_grad
        return grad if needs[0] else None, *_ops.spread(tables, needs[1:6]), None, None, None


def _forward_inplace(ctx: Any, logits: Tensor, call: Call, below: Below | None) -> Any:
    needs = ctx.needs_input_grad[1:6]
    ctx.state, ctx.given, ctx.leaf = _INPLACE, False, _is_leaf(logits)
    # The operator writes through the address; autograd must see that anyone who saved the logits holds the wrong values.
    loss, tables = below(logits, *call, needs) if below else run_inplace(logits, call, needs)
    torch.autograd.graph.increment_version(logits)
    ctx.save_for_backward(logits, tables, call.grad_scale)
    if below is None:
        return loss
    ctx.mark_non_differentiable(tables)
    return loss, tables


# Function.apply unwraps function transforms first; without any, that is a tenth of a small loss' time.
_apply: Callable[..., Any] = super(torch.autograd.Function, _AdjustedCrossEntropy).apply


def _operands_of(ctx: Any) -> tuple[Tensor, Call]:
    """The logits and the call as they were saved."""
    logits, *held = ctx.saved_tensors  # and what forward formed
    return logits, ctx.call.holding(held)


def _recomputed(ctx: Any, upstream: Tensor | None) -> Grads:
    logits, call = _operands_of(ctx)
    need_tables = ctx.needs_input_grad[1:6]
    if transforms() or (upstream is not None and batched(upstream)):
        grads = _differentiable_gradients(ctx, upstream, False)
        wanted = [grad for grad in grads[1:] if grad is not None]
        return grads[0], torch.stack(wanted) if wanted else None
    if direct((logits, upstream)):
        return run(logits, call._replace(grad_scale=upstream), ctx.needs_input_grad[0], need_tables)[1:]
    found = adjusted_ce(logits, *call._replace(grad_scale=upstream), ctx.needs_input_grad[0], need_tables)
    return found[1], found[2] if any(need_tables) else None


def _differentiable_gradients(ctx: Any, upstream: Tensor | None, create_graph: bool = True) -> list[Tensor | None]:
    """The gradients as differentiable functions of all inputs, for backward(create_graph=True)."""
    if ctx.state == _INPLACE:
        raise RuntimeError(
            "double backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
    logits, call = _operands_of(ctx)

    def of_inputs(z: Tensor, *tables: Tensor | None) -> Tensor:
        return _reference.adjusted_cross_entropy(z, call.with_tables(tables))

    return differentiable(of_inputs, (logits, *call.tables()), ctx.needs_input_grad[:6], upstream, create_graph)


# ---- the upstream gradient --------------------------------------------------------------------------------------------


def in_backward(call: Call, dtype: torch.dtype) -> bool:
    """Whether the gradient has to wait for the upstream gradient."""
    return call.reduction == NONE or (dtype is torch.float16 and call.grad_scale is None)


def multiplied(grad: Tensor, upstream: Tensor, expected: Tensor | None) -> Tensor:
    """What was formed for `expected`, for `upstream`. In the loss' precision, rounded once: a 16-bit factor would be rounded itself."""
    factor = upstream if expected is None else upstream / expected
    return (grad.to(upstream.dtype) * factor).to(grad.dtype)


def multiply_(grad: Tensor, upstream: Tensor, backend: str, expected: Tensor | None = None) -> None:
    """In place; free where `upstream` is what was expected, without a wait for a GPU."""
    if backend in _backends.ON_DEVICE:
        if grad.numel() > 0:
            _backends.scale_kernel(backend)(grad, upstream, expected)
    elif not grad.is_cpu or upstream.item() != (1.0 if expected is None else expected.item()):
        # torch multiplies 16-bit numbers by a float32 scalar in float32
        grad.mul_(upstream if expected is None else upstream / expected)


def own(ctx: Any, grads: Sequence[Tensor | None], call: Call) -> None:
    """Keeps what forward formed, for `give`. Not among the saved tensors: those would be copied to be given away."""
    ctx.grads = grads
    ctx.saved = 0
    if call.grad_scale is not None:
        ctx.version = call.grad_scale._version


def give(ctx: Any, upstream: Tensor, form_again: Callable[[Any, Tensor | None], Any]) -> Any:
    """The gradients that forward formed, for the upstream gradient that came: the last `ctx.saved` of the saved tensors, or those of `own`,
    once; a second backward over a retained graph forms them again, with the same bits."""
    call = ctx.call
    expected: Tensor | None = call.grad_scale
    if ctx.saved:
        saved = ctx.saved_tensors
        return [multiplied(each, upstream, expected) for each in saved[len(saved) - ctx.saved :]]
    if not watched() and call.backend == "cpu" and expected is None and ctx.grads is not None:  # nearly always
        grads, ctx.grads = ctx.grads, None
        try:
            if upstream.item() == 1.0:
                return grads
        except RuntimeError:  # a batch of upstream gradients
            if not batched(upstream):
                raise
        ctx.grads = grads
    traced = watched() or batched(upstream)  # who sees no Python numbers and no memory
    if expected is not None and not traced and expected._version != ctx.version:
        raise RuntimeError("grad_scale was changed in place between the loss and its backward; pass a clone of it")
    grads = ctx.grads
    if grads is None:
        grads = form_again(ctx, expected)
    if traced:
        return [None if each is None else multiplied(each, upstream, expected) for each in grads]
    ctx.grads = None
    if call.backend == "cpu" and upstream.item() == (1.0 if expected is None else expected.item()):
        return grads
    for each in grads:
        if each is not None:
            multiply_(each, upstream, call.backend, expected)
    return grads


def _is_leaf(logits: Tensor) -> bool:
    """Whether autograd may keep a gradient that it is given for `logits`, as the ``.grad`` of them or of what they are a view of."""
    return logits.is_leaf or (logits._base is not None and logits._base.is_leaf)


def _given(ctx: Any, upstream: Tensor) -> Grads:
    """The gradient that lies in the logits' memory: that memory itself, once.

    Not where it would become the ``.grad`` of a leaf, whose memory it is; nor where a GPU's kernel, which multiplies consecutive
    elements, would meet gaps.
    """
    if ctx.given:
        raise RuntimeError(
            "a second backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
    traced = watched() or batched(upstream)
    ctx.given = not traced
    logits, tables, expected = ctx.saved_tensors
    backend = ctx.call.backend
    tables = None if tables is None or not any(ctx.needs_input_grad[1:6]) else multiplied(tables, upstream, expected)
    grad = logits.detach()
    if traced or ctx.leaf or (not grad.is_contiguous() and backend in _backends.ON_DEVICE):
        return multiplied(grad, upstream, expected), tables
    multiply_(grad, upstream, backend, expected)
    return grad, tables


# ---- the operators ----------------------------------------------------------------------------------------------------


def _autograd(below: Below, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need_grad, needs = arguments
    call = Call(*operands)
    if transforms():
        if need_grad or any(needs):
            raise RuntimeError(f"the gradients that ltkernels::adjusted_ce gives have no derivative for {transforms()}")
        return _reference.adjusted_cross_entropy(logits, call), logits.new_empty(0), _grad_tables(logits, _NO_TABLES)
    if not wants_gradient((logits, *call.tables())):
        unwatched: tuple[Tensor, Tensor, Tensor] = below(logits, *arguments)
        return unwatched
    found = _apply(logits, *call.tables(), call, False, below)
    if need_grad or any(needs):  # a graph that was traced with them in it is traced again under autograd
        return found, *below(logits, *arguments)[1:]
    return found, logits.new_empty(0), _grad_tables(logits, _NO_TABLES)


def _autograd_inplace(below: Below, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, needs = arguments
    call = Call(*operands)
    if transforms():
        raise RuntimeError("inplace=True is not possible: " + transforms() + " needs the logits as they were")
    if not wants_gradient((logits, *call.tables())):
        unwatched: tuple[Tensor, Tensor] = below(logits, *arguments)
        return unwatched
    loss, tables = _apply(logits, *call.tables(), call, True, below)
    return loss, tables if any(needs) else _grad_tables(logits, _NO_TABLES)


# Loss, gradient and gradients of tables: logits (N, C), and the fields of `Call`. A gradient that is not needed is an empty tensor; `needs`
# says which of the five tables, whose gradients are the rows of grad_tables. `backend` is one that serves the logits' device. The loss
# alone is differentiable, in logits and tables.
adjusted_ce = _ops.define(
    f"adjusted_ce(Tensor logits, {_ops.operands(Call)}, bool need_grad, bool[] needs) -> (Tensor loss, Tensor grad, Tensor grad_tables)",
    _kernel,
    _fake,
    _autograd,
)
# The same; the gradient replaces the logits.
adjusted_ce_ = _ops.define(
    f"adjusted_ce_(Tensor(a!) logits, {_ops.operands(Call)}, bool[] needs) -> (Tensor loss, Tensor grad_tables)",
    _kernel_inplace,
    _fake_inplace,
    _autograd_inplace,
)
