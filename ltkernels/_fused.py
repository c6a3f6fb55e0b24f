"""An operator with gradients around a kernel that forms them together with its result; all functions beside the first family are such.

The author of one gives three functions of the same arguments: the kernel, the shapes of its results, and a plain reference in torch's own
operations. Everything that may look at a call (compilers, function transforms, forward mode, double backward, activation checkpointing,
dispatch modes, tensor subclasses) is answered here, once.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import _ops
from ._call import NONE
from ._checks import real_dtype
from ._errors import DTypeError
from ._watch import batched, direct, hooks_active, is_dtensor, transforms, wants_gradient

Inputs = tuple[Tensor | None, ...]
Outputs = tuple[Tensor, ...]
Record = TypeVar("Record", bound=NamedTuple)


class Request(NamedTuple):
    """What a kernel is asked for.

    needs: which inputs' gradients. Nothing else may be computed for those that are not needed.
    upstream: the gradients with respect to the outputs; None means that there is one output, a number, and 1.
    into: where the first input's gradient goes, which may be that input; None: memory of its own. `Fused` asks for nothing else.
    """

    needs: tuple[bool, ...]
    upstream: Outputs | None = None
    into: Tensor | None = None

    def gradient(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Memory for the first input's gradient, of the shape of `like`; None where it is not needed."""
        if not self.needs[0]:
            return None
        return like.new_empty(like.shape, dtype=dtype) if self.into is None else self.into


class Fused(Generic[Record]):
    """A differentiable function ``(inputs, call) -> outputs`` with a kernel of its own.

    Args:
        name: of the operator in ``torch.ops.ltkernels``.
        inputs: the tensors that may get a gradient, as a schema: ``"Tensor logits, Tensor? bias"``.
        record: NamedTuple of everything else, checked; its tensors get no gradient.
        outputs: how many tensors come out, real (float64 for float64 inputs, float32 for all others).
        beside: how many more come after them that have no gradient, such as sums that the pass leaves. A kernel is asked for nothing of
            them, and a single output with its upstream gradient stays one that need not wait.
        kernel: ``(inputs, call, request) -> (outputs and those beside, gradients)``, one gradient an input, in the outputs' dtype, None
            where not needed. They are rounded to the inputs' dtype after the upstream factor. The inputs may be strided in any way.
        shapes: ``(inputs, call) -> `` the shapes of all that comes out.
        reference: ``(inputs, call) -> `` the same in torch's operations, differentiable to any order.
        served: whether the kernel serves these inputs; the reference computes all others (by default it serves the CPU). Where several
            kernels do, the record's `backend` says whose.
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        record: type[Record],
        outputs: int,
        kernel: Callable[[Inputs, Record, Request], tuple[Sequence[Tensor], Sequence[Tensor | None]]],
        shapes: Callable[[Inputs, Record], Sequence[tuple[int, ...]]],
        reference: Callable[[Inputs, Record], Sequence[Tensor]],
        served: Callable[[Inputs, Record], bool] = lambda inputs, call: _on_cpu(inputs),
        beside: int = 0,
    ) -> None:
        self.names = re.findall(r"Tensor\??\s+(\w+)", inputs)
        self.record, self.outputs, self.results = record, outputs, outputs + beside
        self.kernel, self.shapes, self.reference, self.served = kernel, shapes, reference, served
        hints = get_type_hints(record)
        self.tensors = [at for at, kind in enumerate(hints.values()) if kind in (Tensor, Tensor | None)]
        upstream = ", ".join(f"Tensor? upstream{i}" for i in range(outputs))
        results = ", ".join([f"Tensor out{i}" for i in range(self.results)] + [f"Tensor grad_{x}" for x in self.names])
        self.operator = _ops.define(
            f"{name}({inputs}, {_ops.operands(record)}, {upstream}, bool[] needs) -> ({results})",
            self._kernel,
            self._fake,
            self._autograd,
        )

    def __call__(self, inputs: Inputs, call: Record) -> Outputs:
        """The outputs of checked arguments. Raises TypeError naming a DTensor among them."""
        held = [call[at] for at in self.tensors]
        if not direct((*inputs, *held)):
            self._refuse_dtensors(inputs, held)
            if not self.served(inputs, call):
                return tuple(self.reference(inputs, call))
            nothing = (None,) * self.outputs
            found: Outputs = self.operator(*inputs, *call, *nothing, (False,) * len(inputs))
            return found[: self.results]
        if not self.served(inputs, call):
            return tuple(self.reference(inputs, call))
        if wants_gradient(inputs):
            return _tuple(_apply(*inputs, self, call, None))
        return tuple(self.kernel(inputs, call, Request((False,) * len(inputs)))[0])

    def waits(self, call: Record) -> bool:
        """Whether the gradient has to wait for its upstream gradient."""
        return self.outputs > 1 or getattr(call, "reduction", None) == NONE

    def _refuse_dtensors(self, inputs: Inputs, held: Sequence[Tensor | None]) -> None:
        names = [*self.names, *(self.record._fields[at] for at in self.tensors)]
        for name, value in zip(names, (*inputs, *held), strict=True):
            if value is not None and type(value) is not Tensor and is_dtensor(value):
                raise DTypeError(f"{name} is a DTensor; give plain tensors, such as its to_local()")

    def _split(self, arguments: Sequence[Any]) -> tuple[Inputs, Record, Request]:
        """The flat arguments of the operator."""
        first, last = len(self.names), len(arguments) - self.outputs - 1
        upstream, needs = arguments[last:-1], tuple(arguments[-1])
        given = None if upstream[0] is None else tuple(upstream)
        return tuple(arguments[:first]), self.record(*arguments[first:last]), Request(needs, given)

    def _kernel(self, *arguments: Any) -> Outputs:
        inputs, call, request = self._split(arguments)
        outputs, grads = self.kernel(inputs, call, request)
        return *outputs, *(outputs[0].new_empty(0) if grad is None else grad for grad in grads)

    def _fake(self, *arguments: Any) -> Outputs:
        inputs, call, request = self._split(arguments)
        first = next(x for x in inputs if x is not None)
        real = real_dtype(first.dtype)
        outputs = [first.new_empty(shape, dtype=real) for shape in self.shapes(inputs, call)]
        grads = [
            first.new_empty(x.shape if need and x is not None else (0,), dtype=real)
            for x, need in zip(inputs, request.needs, strict=True)
        ]
        return *outputs, *grads

    def _autograd(self, below: Callable[..., Outputs], *arguments: Any) -> Outputs:
        inputs, call, request = self._split(arguments)
        if transforms():
            if any(request.needs):
                raise RuntimeError(f"the gradients of a fused operator have no derivative for {transforms()}")
            outputs = tuple(self.reference(inputs, call))
        elif wants_gradient(inputs):
            outputs = _tuple(_apply(*inputs, self, call, below))
            if any(request.needs):  # a graph that was traced with them in it is traced again under autograd
                return *outputs, *below(*arguments)[self.results :]
        else:
            return below(*arguments)
        return *outputs, *(outputs[0].new_empty(0) for _ in inputs)


def _times(grad: Tensor, factor: Tensor, call: Any) -> Tensor:
    """In place; a back end with a kernel for it reads the gradient only where the factor is not 1."""
    if getattr(call, "backend", "") == "triton":
        from ._backends import scale_kernel

        scale_kernel("triton")(grad, factor, None)
        return grad
    return grad.mul_(factor)


def by_backend(
    cpu: Callable[[Inputs, Any, Request], tuple[Sequence[Tensor], Sequence[Tensor | None]]],
    *,
    triton: str,
    cuda: str = "",
) -> Callable[[Inputs, Any, Request], tuple[Sequence[Tensor], Sequence[Tensor | None]]]:
    """The kernel of a record that has a `backend`: `cpu`, or ``module.function`` of `ltkernels.triton`, and of `ltkernels._backends`
    for CUDA where there is one, imported when it serves."""
    paths = {"triton": f"triton.{triton}", "cuda": f"_backends.{cuda}"}

    def kernel(inputs: Inputs, call: Any, request: Request) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        if call.backend not in paths:
            return cpu(inputs, call, request)
        module, _, name = paths[call.backend].rpartition(".")
        found = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return found(inputs, call, request)  # type: ignore[no-any-return]

    return kernel


def _on_cpu(inputs: Inputs) -> bool:
    return all(each is None or each.is_cpu for each in inputs)


def _tuple(found: Any) -> Outputs:
    return found if isinstance(found, tuple) else (found,)


class _Function(torch.autograd.Function):
    """``(*inputs, fused, call, below) -> outputs``. `below` is None for a direct call, else the operator below autograd."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, fused, call, below = arguments
        ctx.fused, ctx.call, ctx.below = fused, call, below is not None
        later = fused.waits(call) or (below is None and hooks_active())
        needs = tuple(ctx.needs_input_grad[: len(inputs)])
        ctx.needs = needs
        asked = (False,) * len(inputs) if later else needs
        if below is None:
            outputs, grads = map(tuple, fused.kernel(tuple(inputs), call, Request(asked)))
        else:
            found = below(*inputs, *call, *(None,) * fused.outputs, asked)
            outputs, grads = found[: fused.results], found[fused.results :]
        kept = [] if later or below is None else [g for g, need in zip(grads, needs, strict=True) if need]
        ctx.grads = None if later or below is not None else list(grads)
        ctx.saved = len(kept)
        ctx.save_for_backward(*inputs, *(call[at] for at in fused.tensors), *kept)
        if fused.results > fused.outputs:
            ctx.mark_non_differentiable(*outputs[fused.outputs :])
            ctx.set_materialize_grads(
                fused.outputs > 1
            )  # no zeros for what has no gradient; a single output's is there
        return outputs[0] if fused.results == 1 else outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        fused: Fused[Any] = ctx.fused
        upstream = upstream[: fused.outputs]
        inputs, call, kept = _operands_of(ctx)
        again = torch.is_grad_enabled()
        if again or transforms() or any(batched(each) for each in upstream):

            def of_inputs(*given: Tensor | None) -> Any:
                return tuple(fused.reference(given, call))[: fused.outputs]

            return *differentiable(of_inputs, inputs, ctx.needs, upstream, again), None, None, None  # type: ignore[arg-type]
        if ctx.saved:
            found = iter(kept)
            grads: list[Tensor | None] = [next(found) * upstream[0] if need else None for need in ctx.needs]
        elif ctx.grads is not None:
            # The memory of what forward formed is given away, once; a second backward forms it again, with the same bits.
            grads, ctx.grads = ctx.grads, None
            if not upstream[0].is_cpu or upstream[0].item() != 1.0:  # no wait for a device
                grads = [None if grad is None else _times(grad, upstream[0], call) for grad in grads]
        elif direct((*inputs, *upstream)):
            grads = list(fused.kernel(inputs, call, Request(ctx.needs, upstream))[1])
        else:
            grads = list(fused.operator(*inputs, *call, *upstream, ctx.needs)[fused.results :])
        rounded = [
            grad.to(x.dtype) if need and grad is not None and x is not None else None
            for grad, x, need in zip(grads, inputs, ctx.needs, strict=True)
        ]
        return *rounded, None, None, None


def differentiable(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Tensor | None,
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of a function of torch's operations with respect to those inputs that `needs` says."""
    with torch.enable_grad():
        # Views: the gradients stay connected to whatever the inputs came from.
        views = [
            given
            if given is None or not need
            else given.view_as(given)
            if given.requires_grad
            else given.detach().requires_grad_()
            for given, need in zip(inputs, needs, strict=True)
        ]
        wanted = [view for view, need in zip(views, needs, strict=True) if view is not None and need]
        found = iter(torch.autograd.grad(function(*views), wanted, upstream, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


_apply: Callable[..., Any] = super(torch.autograd.Function, _Function).apply


def _operands_of(ctx: Any) -> tuple[Inputs, Any, tuple[Tensor, ...]]:
    fused, saved = ctx.fused, ctx.saved_tensors
    first = len(fused.names)
    values = list(ctx.call)
    for at, tensor in zip(fused.tensors, saved[first:], strict=False):
        values[at] = tensor
    return saved[:first], fused.record(*values), saved[len(saved) - ctx.saved :] if ctx.saved else ()
