"""A batch against itself, every row but its own column: the similarities are symmetric, which saves a third of the products.

The row sums need the upper part of the matrix alone, half a product. Their gradient, with ``P_ij = c_i e_ij``, is ``(P + P^T) A``: that
part once more, with ``c_i + c_j`` on it, and one product. So two in all, where rows against columns of their own take three; a small batch
is one chunk, which is kept, and takes two whole products. It needs one reference for all similarities, which unit vectors have
(`_rows.fixed_reference`); `_rows` computes all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import NONE
from .._checks import real_dtype
from .._fused import Fused, Inputs, Outputs, Request
from .._native import _C
from .._watch import address
from ._rows import Rows, chunk_rows_of, fixed_reference, general, loss_reference, lse, served


def _exponentials(dots: Tensor, scale: float, reference: float, factor: Tensor | None, weight: Tensor | None) -> None:
    """In place, of the products of some rows with the columns from the first of them on; see csrc/cpu/row_logsumexp.h."""
    _C.symmetric_rows(
        0 if dots.dtype == torch.float32 else 1,
        address(dots, "products"),
        dots.stride(0),
        *dots.shape,
        scale,
        reference,
        0 if factor is None else factor.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        torch.get_num_threads(),
    )


def _compute(inputs: Inputs, call: Rows, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    rows, base, linear, inverse_tau, shift = inputs
    assert rows is not None
    assert inverse_tau is not None
    need_rows, need_base, need_linear, need_scale, need_shift = request.needs
    n, real = len(rows), real_dtype(rows.dtype)
    reference = None
    if call.backend == "cpu" and not need_shift and n:
        reference = fixed_reference(
            call, inverse_tau.to(torch.float64)[None], None if shift is None else shift.to(real)
        )
    if reference is None:
        needs = (need_rows, need_rows, need_base, need_linear, need_scale, need_shift)
        given = (rows, rows, base, linear, inverse_tau.expand(n), shift)
        outputs, grads = general(given, call, Request(needs, request.upstream))
        of_rows, of_columns, of_base, of_linear, of_scale, of_shift = grads
        both = None if of_rows is None or of_columns is None else of_rows.add_(of_columns)
        return outputs, [both, of_base, of_linear, None if of_scale is None else of_scale.sum(), of_shift]

    scale, top = float(inverse_tau), float(reference[0])
    a = rows.to(real).contiguous()
    weight = None if shift is None else torch.exp(shift.to(real)).contiguous()
    size = chunk_rows_of(n, n, call.chunk_rows, call.backend)
    chunk = torch.empty(size * n, dtype=real)

    def part(begin: int) -> Tensor:
        """Memory of the products of a chunk, and the products."""
        own = a[begin : begin + size]
        dots = chunk[: len(own) * (n - begin)].view(len(own), n - begin)
        return torch.mm(own, a[begin:].t(), out=dots)

    total = torch.zeros(n, dtype=torch.float64)
    for begin in range(0, n, size):
        dots = part(begin)
        _exponentials(dots, scale, top, None, None)
        end = begin + len(dots)
        total[begin:end] += dots.sum(dim=1) if weight is None else torch.mv(dots, weight[begin:])
        if end < n:
            right = dots[:, len(dots) :]
            total[end:] += right.sum(dim=0) if weight is None else torch.mv(right.t(), weight[begin:end])
    every = torch.log(total) + top
    counts = torch.ones_like(total) if call.weight is None else call.weight
    if request.upstream is not None:
        counts = counts * request.upstream[0]
    counted = counts != 0
    if base is not None:
        every = lse(torch.stack([every, base.to(torch.float64)], dim=1))
    rows_loss = every if linear is None else every - linear
    rows_loss = torch.where(counted, counts * rows_loss, 0)
    value = rows_loss if call.reduction == NONE else rows_loss.sum()
    grad_base = None
    if need_base and base is not None:
        grad_base = torch.where(counted, counts * torch.exp(base - every), 0).to(real)
    grad_linear = (-counts).to(real) if need_linear else None
    found: list[Tensor | None] = [None, grad_base, grad_linear, None, None]
    if not (need_rows or need_scale):
        return (value.to(real),), found

    factor = torch.where(counted & (total > 0), counts * torch.exp(top - every), 0).to(real)
    if size >= n:  # the one chunk still holds the exponentials
        both = factor[:, None] + factor if weight is None else torch.outer(factor, weight)
        gradient = torch.mm(dots.mul_(both if weight is None else both + both.t()), a)
    else:
        gradient = torch.zeros_like(a)
        for begin in range(0, n, size):
            dots = part(begin)
            _exponentials(dots, scale, top, factor[begin:], None if weight is None else weight[begin:])
            end = begin + len(dots)
            gradient[begin:end].addmm_(dots, a[begin:])
            gradient[end:].addmm_(dots[:, len(dots) :].t(), a[begin:end])
    if need_scale:
        found[3] = 0.5 * (gradient * a).sum().reshape(inverse_tau.shape)  # every pair is in it twice
    if need_rows:
        found[0] = gradient.mul_(scale)
    return (value.to(real),), found


def _kernel(inputs: Inputs, call: Rows, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    assert inputs[0] is not None
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return _compute(inputs, call, request)


def _reference(inputs: Inputs, call: Rows) -> Outputs:
    rows, base, linear, inverse_tau, shift = inputs
    assert rows is not None
    assert inverse_tau is not None
    return loss_reference((rows, rows, base, linear, inverse_tau.expand(len(rows)), shift), call)


CONTRAST_SELF = Fused(
    "self_contrast",
    "Tensor rows, Tensor? base, Tensor? linear, Tensor inverse_tau, Tensor? shift",
    Rows,
    1,
    _kernel,
    lambda inputs, call: [(len(inputs[0]),) if call.reduction == NONE else ()],  # type: ignore[arg-type]
    _reference,
    served,
)
"""`_rows.CONTRAST` of rows that are their own columns, each absent from its own row, without groups, at one temperature ()."""
