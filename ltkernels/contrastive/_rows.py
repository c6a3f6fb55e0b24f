"""Two log-sum-exps a row without the rows x columns similarities: the operators beneath every loss of this folder.

With rows a_i, columns b_j, ``s_ij = sigma_i a_i . b_j + delta_j``, and the columns of a row's own group G_i (less its absent column):
``other_i`` is the log-sum-exp of s_ij over j outside G_i, ``own_i`` that over j in G_i. A chunk of rows sees all columns, so its products
are one GEMM into one buffer, the kernel puts the coefficients of the gradients in their place, and two more GEMMs make gradients of them:
forward does all the work of a loss, as `ltkernels._head` does.

The columns are sorted by group before, so a row's own group is one range of columns and no loop of the kernel has a mask in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._call import NONE
from .._checks import real_dtype
from .._fused import Fused, Inputs, Outputs, Request
from .._native import _C
from .._watch import address

# A chunk holds this many products (2 MiB of float32), but never fewer rows than a GEMM needs to be fast.
_CHUNK, _LEAST_ROWS = 1 << 19, 128
# On a GPU 32 MiB, which its second-level cache holds, and a few launches for it.
_DEVICE_CHUNK = 1 << 23
# exp(-86) is the least normal float32; products of unit vectors lie within [-1, 1].
RANGE = 86.0
_NOWHERE = -float("inf")


class Rows(NamedTuple):
    """What the operators know beside their inputs.

    order: (M,) int64, the columns sorted by group; None: as they are. All that follows counts in this order.
    own_begin, own_end: (N,) int64, the range of the row's own group; None: no column is in it.
    absent: (N,) int64, a column that counts nowhere, -1 for none.
    weight: (N,) float64, factors of the row losses; a row of weight 0 has no loss, whatever it holds.
    bonus: (N,) float64, added to `own`; -inf leaves it out.
    bounded: rows and columns have unit length, so that the largest similarity need not be looked for.
    minus_own: whether `own` is subtracted from the row's loss.
    live: how many of the columns, from the first on, get a gradient. -1: all.
    backend: one of `ltkernels._backends.BACKENDS`, of the kernel between the products.
    """

    order: Tensor | None
    own_begin: Tensor | None
    own_end: Tensor | None
    absent: Tensor | None
    weight: Tensor | None
    bonus: Tensor | None
    bounded: bool
    minus_own: bool
    live: int
    reduction: int
    chunk_rows: int
    backend: str


class Part(NamedTuple):
    """Some rows of a call for the kernel between the products; csrc/cpu/row_logsumexp.h says what its fields are. What counts rows is
    float64, `shift` has the products' dtype. `loss` or `other` and `own` are written."""

    row_scale: Tensor
    shift: Tensor | None = None
    reference: Tensor | None = None
    own_begin: Tensor | None = None
    own_end: Tensor | None = None
    absent: Tensor | None = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    base: Tensor | None = None
    bonus: Tensor | None = None
    grad_base: Tensor | None = None
    other: Tensor | None = None
    own: Tensor | None = None
    grad_other: Tensor | None = None
    grad_own: Tensor | None = None
    minus_own: bool = False
    coefficients: bool = False


def chunk_rows_of(rows: int, columns: int, asked: int, backend: str) -> int:
    products = _DEVICE_CHUNK if backend in _backends.ON_DEVICE else _CHUNK
    return max(1, min(asked or max(_LEAST_ROWS, products // max(columns, 1)), rows))


def fixed_reference(call: Rows, sigma: Tensor, shift: Tensor | None) -> Tensor | None:
    """(N,) numbers that no similarity exceeds, and none is so far below that float32 would lose it; None where there are none."""
    if not call.bounded or len(sigma) == 0:
        return None
    size = sigma.abs()
    high = spread = 0.0
    if shift is not None:
        finite = shift[shift != _NOWHERE]
        if len(finite):
            high = float(finite.max())
            spread = high - float(finite.min())
    fits = 2 * float(size.max()) + spread <= RANGE
    return size + high if fits else None


def device_reference(call: Rows, sigma: Tensor, shift: Tensor | None) -> Tensor | None:
    """`fixed_reference` without a wait for the device: +inf for a row that has none."""
    if not call.bounded:
        return None
    size = sigma.abs()
    highest, least = size, 2 * size
    if shift is not None and len(shift):
        finite = shift != _NOWHERE
        high = torch.where(finite, shift, _NOWHERE).amax().to(size.dtype)
        low = torch.where(finite, shift, torch.inf).amin()
        highest = size + torch.where(high == _NOWHERE, 0, high)
        least = 2 * size + (high - low)
    return torch.where(least <= RANGE, highest, torch.inf)


class _Step:
    """One call of the kernel on chunk after chunk of its products."""

    def __init__(self, inputs: Inputs, call: Rows, request: Request, loss: bool, coefficients: bool) -> None:
        rows, _, base, linear, row_scale, shift = inputs
        assert rows is not None
        self.call = call
        self.real = real_dtype(rows.dtype)
        n, device = len(rows), rows.device

        def doubles(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.float64, device=device)

        self.sigma = doubles(n) if row_scale is None else row_scale.to(torch.float64).contiguous()
        self.linear = linear
        shift = None if shift is None else shift.to(self.real)
        if shift is not None:
            shift = (shift if call.order is None else shift[call.order]).contiguous()
        reference = None
        if call.backend == "cpu":
            reference = fixed_reference(call, self.sigma, shift)
        elif call.backend in _backends.ON_DEVICE:
            reference = device_reference(call, self.sigma, shift)
        part = Part(self.sigma, shift, reference, call.own_begin, call.own_end, call.absent)
        part = part._replace(minus_own=call.minus_own, coefficients=coefficients)
        if loss:
            weight = doubles(n) if call.weight is None else call.weight
            if request.upstream is not None:
                weight = weight * request.upstream[0]
            self.part = part._replace(
                loss=doubles(n),
                weight=weight.contiguous(),
                base=None if base is None else base.to(torch.float64).contiguous(),
                bonus=call.bonus,
                grad_base=doubles(n) if request.needs[2] else None,
            )
            return
        upstream: list[Tensor | None] = [None, None]
        if coefficients:
            assert request.upstream is not None
            upstream = [each.to(torch.float64).contiguous() for each in request.upstream]
        self.part = part._replace(other=doubles(n), own=doubles(n), grad_other=upstream[0], grad_own=upstream[1])

    def run(self, dots: Tensor, begin: int) -> None:
        """The coefficients in place of the products of the rows from `begin` on."""
        at = slice(begin, begin + len(dots))
        rows = Part._make(each[at] if isinstance(each, Tensor) else each for each in self.part)
        _kernel_between(self.call.backend)(dots, rows._replace(shift=self.part.shift))


def _kernel_between(backend: str) -> Callable[[Tensor, Part], None]:
    """``(products, part)``: fills what `part` has to be filled and puts the coefficients in the place of the products."""
    if backend == "cuda":
        from .._backends.cuda import row_logsumexp

        return row_logsumexp
    if backend == "triton":
        from ..triton import row_logsumexp as module

        found: Callable[[Tensor, Part], None] = module.row_logsumexp
        return found
    return _cpu_kernel if backend == "cpu" else _torch_kernel


def _cpu_kernel(dots: Tensor, part: Part) -> None:
    def of(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    job = _C.RowLogsumexp(
        address(dots, "products"), dots.stride(0), *dots.shape, of(part.shift), of(part.row_scale), of(part.reference)
    )
    job.groups(of(part.own_begin), of(part.own_end), of(part.absent))
    if part.loss is not None:
        beside = of(part.base), of(part.bonus), part.minus_own, of(part.grad_base)
        job.loss(of(part.loss), of(part.weight), *beside)
    else:
        job.values(of(part.other), of(part.own), of(part.grad_other), of(part.grad_own))
    job.run(0 if dots.dtype == torch.float32 else 1, part.coefficients, torch.get_num_threads())


def _torch_kernel(dots: Tensor, part: Part) -> None:
    """The same in torch's operations, for devices without a kernel; a chunk of similarities and masks at a time."""
    own, absent = _masks(part.own_begin, part.own_end, part.absent, dots)
    s = dots * part.row_scale[:, None].to(dots.dtype)
    s = s if part.shift is None else s + part.shift
    sides = []
    for outside in (own | absent, ~own | absent):
        kept = s.masked_fill(outside, _NOWHERE)
        sides.append((kept, lse(kept).to(torch.float64)))
    (other_s, other), (own_s, own_lse) = sides
    if part.loss is None:
        assert part.other is not None
        assert part.own is not None
        part.other.copy_(other)
        part.own.copy_(own_lse)
        if part.coefficients:
            assert part.grad_other is not None
            assert part.grad_own is not None
            _put_coefficients(dots, [(other_s, other, part.grad_other), (own_s, own_lse, part.grad_own)])
        return
    weight = part.weight
    assert weight is not None
    raised = own_lse if part.bonus is None else own_lse + part.bonus
    base = torch.full_like(other, _NOWHERE) if part.base is None else part.base
    every = lse(torch.stack([base, other, raised], dim=1))
    counted = weight != 0
    part.loss.copy_(torch.where(counted, weight * (every - own_lse if part.minus_own else every), 0))

    def share(side: Tensor) -> Tensor:
        return torch.where(counted & (side != _NOWHERE), weight * torch.exp(side - every), 0)

    if part.grad_base is not None:
        part.grad_base.copy_(share(base))
    if part.coefficients:
        of_own = share(raised) - (weight if part.minus_own else 0)
        _put_coefficients(dots, [(other_s, other, share(other)), (own_s, own_lse, of_own)])


def _put_coefficients(dots: Tensor, sides: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    dots.zero_()
    for kept, total, factor in sides:
        usable = torch.where(total == _NOWHERE, 0, total)
        share = torch.exp(kept - usable[:, None].to(kept.dtype)) * factor[:, None].to(kept.dtype)
        dots.add_(torch.where((factor != 0)[:, None] & (kept != _NOWHERE), share, 0))


def _masks(
    own_begin: Tensor | None, own_end: Tensor | None, absent: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(rows, columns) bool: the columns of the row's own group, and its absent column."""
    position = torch.arange(like.shape[1], device=like.device)
    nothing = torch.zeros((), dtype=torch.bool, device=like.device).expand(like.shape)
    own = nothing
    if own_begin is not None and own_end is not None:
        own = (position >= own_begin[:, None]) & (position < own_end[:, None])
    return own, nothing if absent is None else position == absent[:, None]


def _compute(inputs: Inputs, call: Rows, request: Request, loss: bool) -> tuple[Outputs, list[Tensor | None]]:
    rows, columns, _, _, row_scale, _ = inputs
    assert rows is not None
    assert columns is not None
    need_rows, need_columns, _, need_linear, need_scale, need_shift = request.needs
    of_rows, coefficients = need_rows or need_scale, need_rows or need_columns or need_scale or need_shift
    step = _Step(inputs, call, request, loss, coefficients)
    real, sigma = step.real, step.sigma.to(step.real)
    (n, width), m, order = rows.shape, len(columns), call.order
    b = columns.to(real) if order is None else columns.to(real)[order]
    live = m if call.live < 0 or order is not None else call.live
    grad_rows = rows.new_empty((n, width), dtype=real) if need_rows else None
    grad_columns = rows.new_zeros((live, width), dtype=real) if need_columns else None
    grad_scale = rows.new_empty(n, dtype=real) if need_scale else None
    grad_shift = rows.new_zeros(m, dtype=real) if need_shift else None
    size = chunk_rows_of(n, m, call.chunk_rows, call.backend)
    chunk = rows.new_empty((size, m), dtype=real)
    for begin in range(0, n, size):
        at = slice(begin, min(begin + size, n))
        x = rows[at].to(real)
        dots = chunk[: len(x)]
        torch.mm(x, b.t(), out=dots)
        step.run(dots, begin)
        if of_rows:
            gradient = torch.empty_like(x) if grad_rows is None else grad_rows[at]
            torch.mm(dots, b, out=gradient)
            if grad_scale is not None:
                torch.sum(gradient * x, dim=1, out=grad_scale[at])
            if row_scale is not None:
                gradient.mul_(sigma[at, None])
        if grad_columns is not None:
            grad_columns.addmm_(dots[:, :live].t(), x if row_scale is None else x * sigma[at, None])
        if grad_shift is not None:
            grad_shift.add_(dots.sum(dim=0))
    if grad_columns is not None and (order is not None or live < m):
        sorted_columns, grad_columns = grad_columns, rows.new_zeros((m, width), dtype=real)
        grad_columns[slice(live) if order is None else order] = sorted_columns
    if grad_shift is not None and order is not None:
        grad_shift = torch.empty_like(grad_shift).index_copy_(0, order, grad_shift)
    if not loss:
        assert step.part.other is not None
        assert step.part.own is not None
        return (step.part.other.to(real), step.part.own.to(real)), [
            grad_rows,
            grad_columns,
            None,
            None,
            grad_scale,
            grad_shift,
        ]
    value, weight, of_base = step.part.loss, step.part.weight, step.part.grad_base
    assert value is not None
    assert weight is not None
    if step.linear is not None:
        value = torch.where(weight == 0, value, value - weight * step.linear)
    value = value if call.reduction == NONE else value.sum()
    grad_base = None if of_base is None else of_base.to(real)
    grad_linear = (-weight).to(real) if need_linear else None
    return (value.to(real),), [grad_rows, grad_columns, grad_base, grad_linear, grad_scale, grad_shift]


def _kernel(inputs: Inputs, call: Rows, request: Request, loss: bool) -> tuple[Outputs, list[Tensor | None]]:
    assert inputs[0] is not None
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return _compute(inputs, call, request, loss)


def general(inputs: Inputs, call: Rows, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    """The kernel of `CONTRAST`."""
    return _kernel(inputs, call, request, loss=True)


# ---- the definition ---------------------------------------------------------------------------------------------------


def lse(x: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension; of nothing, or of -inf alone, -inf with gradient 0."""
    if x.shape[-1] == 0:
        return x.sum(dim=-1) + _NOWHERE
    top = x.detach().amax(dim=-1, keepdim=True)
    total = torch.exp(x - torch.where(top == _NOWHERE, 0, top)).sum(dim=-1)
    empty = total == 0
    return torch.where(empty, _NOWHERE, torch.log(torch.where(empty, 1, total)) + top[..., 0])


def _sides(inputs: Inputs, call: Rows) -> tuple[Tensor, Tensor]:
    """Both log-sum-exps in torch's operations; all similarities at once."""
    rows, columns, _, _, row_scale, shift = inputs
    assert rows is not None
    assert columns is not None
    real = real_dtype(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        s = rows.to(real) @ columns.to(real).t()
    s = s if row_scale is None else s * row_scale.to(real)[:, None]
    s = s if shift is None else s + shift.to(real)
    s = s if call.order is None else s[:, call.order]
    own, absent = _masks(call.own_begin, call.own_end, call.absent, s)
    return lse(s.masked_fill(own | absent, _NOWHERE)), lse(s.masked_fill(~own | absent, _NOWHERE))


def loss_reference(inputs: Inputs, call: Rows) -> Outputs:
    """The definition of `CONTRAST`, all similarities at once."""
    other, own = _sides(inputs, call)
    base = torch.full_like(other, _NOWHERE) if inputs[2] is None else inputs[2].to(other.dtype)
    weight = torch.ones_like(other) if call.weight is None else call.weight.to(other.dtype)
    raised = own if call.bonus is None else own + call.bonus.to(own.dtype)
    loss = lse(torch.stack([base, other, raised], dim=-1))
    counted = weight != 0
    if call.minus_own:
        loss = loss - torch.where(counted, own, 0)
    if inputs[3] is not None:
        loss = loss - torch.where(counted, inputs[3].to(loss.dtype), 0)
    loss = torch.where(counted, weight * torch.where(counted, loss, 0), 0)
    return (loss if call.reduction == NONE else loss.sum(),)


def served(inputs: Inputs, call: Rows) -> bool:
    """By chunks; other devices by the definition."""
    return all(each is None or each.device.type in ("cpu", "cuda") for each in inputs)


_SCHEMA = "Tensor rows, Tensor columns, Tensor? base, Tensor? linear, Tensor? row_scale, Tensor? shift"
LOGSUMEXP = Fused(
    "row_logsumexp",
    _SCHEMA,
    Rows,
    2,
    lambda inputs, call, request: _kernel(inputs, call, request, loss=False),
    lambda inputs, call: [(len(inputs[0]),)] * 2,  # type: ignore[arg-type]
    _sides,
    served,
)
"""``(other, own)``, each (N,)."""

CONTRAST = Fused(
    "row_contrast",
    _SCHEMA,
    Rows,
    1,
    general,
    lambda inputs, call: [(len(inputs[0]),) if call.reduction == NONE else ()],  # type: ignore[arg-type]
    loss_reference,
    served,
)
"""The sum (with reduction "none" the rows) of weight_i (log(e^base + e^other + e^(own + bonus)) - [minus_own] own - linear_i)."""
