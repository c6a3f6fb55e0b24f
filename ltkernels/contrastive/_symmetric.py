"""A batch against itself, every row but its own column, on the CPU: the similarities are symmetric, which saves a third of the products.

The row sums need the upper part of the matrix alone, half a product. Their gradient, with ``P_ij = c_i e_ij``, is ``(P + P^T) A``: that
part once more, with ``c_i + c_j`` on it, and one product. So two in all, where rows against columns of their own take three, and one and
a half where the exponentials are kept.

All else, the unit rows, the mean of the positives, the losses and the way of the gradient back to the features, is in
csrc/cpu/self_contrast.h: of 256 rows the products are a few tens of microseconds each, and as many small operations of torch were several
times that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._call import BATCH_MEAN, MEAN, NONE
from .._checks import real_dtype
from .._fused import Fused, Inputs, Outputs, Request
from .._head import EPS
from .._native import _C
from .._watch import address
from ._logsumexp import unit
from ._rows import RANGE, Rows, chunk_rows_of, loss_reference

# Rows of a chunk: enough for a fast product, few enough that little of the lower part is computed with the upper. And how many
# exponentials are kept for the gradient, 16 MiB of float32, where the caller does not say how large a chunk is to be.
_ROWS, _HELD = 256, 1 << 22


class SelfContrast(NamedTuple):
    """What stands beside features (N, D), base and linear (N,) and the inverse temperature (): row i has the loss ``weight_i
    (log(e^base_i + gamma sum_j e^s_ij) - (beta linear_i + alpha sum_p s_ip) / (beta + alpha m_i))`` with its m_i positives p, and 0 where
    that divides by 0.

    labels: (N,) int64, contiguous; positives are the other rows of one label.
    weight: (N,) float64; None is 1.
    ignore_index: label of rows that are neither rows nor columns.
    """

    labels: Tensor
    weight: Tensor | None
    ignore_index: int
    alpha: float
    beta: float
    gamma: float
    reduction: int
    chunk_rows: int


def serves(inverse_tau: float) -> bool:
    """Whether one reference serves all similarities of unit rows: none exceeds it, none is so far below that float32 would lose it."""
    return 2 * inverse_tau <= RANGE


def _doubles(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float64).contiguous()


def _chunks(rows: int, size: int, room: int, dtype: torch.dtype) -> list[tuple[int, Tensor, bool]]:
    """Where each chunk of the upper part begins, memory for its exponentials, and whether they are still there when the last is done.

    The first to fill `room` numbers have memory of their own; the others share one, of the size of the largest.
    """
    found: list[tuple[int, Tensor, bool]] = []
    shared: Tensor | None = None
    for begin in range(0, rows, size):
        shape = min(size, rows - begin), rows - begin
        count = shape[0] * shape[1]
        own = count <= room
        room -= count if own else 0
        if own or shared is None:
            memory = torch.empty(count, dtype=dtype)
            shared = shared if own else memory
        else:
            memory = shared[:count]
        found.append((begin, memory.view(shape), own or begin + shape[0] == rows))
    return found


def _compute(inputs: Inputs, call: SelfContrast, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    features, base, linear, inverse_tau = inputs
    assert features is not None
    assert inverse_tau is not None
    need_rows, need_base, need_linear, need_scale = request.needs
    (n, width), real = features.shape, real_dtype(features.dtype)
    dtype, threads, scale = _backends.DTYPE_CODES[real], torch.get_num_threads(), inverse_tau.item()
    x = features.to(real)
    x = x if x.stride(1) == 1 or width == 1 else x.contiguous()
    base, linear, weight = _doubles(base), _doubles(linear), call.weight
    upstream = None if request.upstream is None else _doubles(request.upstream[0].expand(n))

    a = torch.empty((n, width), dtype=real)
    order = torch.empty((3, n), dtype=torch.int64)
    inverse, positive, total, slope, along, loss, of_base, of_linear = torch.empty((8, n), dtype=torch.float64).unbind()
    factor, scratch = torch.empty(n, dtype=real), torch.empty(2 * threads * width, dtype=real)
    rows = a.data_ptr(), inverse.data_ptr(), order.data_ptr()
    kept = _C.self_contrast_start(
        dtype, address(x, "features"), x.stride(0), n, width, address(call.labels, "labels"), call.ignore_index, EPS,
        *rows, positive.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    a, factor = a[:kept], factor[:kept]
    size = chunk_rows_of(kept, kept, call.chunk_rows, "cpu")
    size, room = (size, 0) if call.chunk_rows else (min(size, _ROWS), _HELD if need_rows or need_scale else 0)
    chunks = _chunks(kept, size, room, real)

    def products_of(begin: int, out: Tensor, factor: Tensor | None, there: bool = False) -> None:
        """Exponentials of the rows from `begin` on, or the factors of the gradient's product; there: of exponentials that are there."""
        if not there:
            torch.mm(a[begin : begin + len(out)], a[begin:].t(), out=out)
        of = 0 if factor is None else factor[begin:].data_ptr()
        _C.self_contrast_products(
            dtype, out.data_ptr(), out.stride(0), *out.shape, scale, total[begin:].data_ptr(), of, there, threads
        )

    before = torch.zeros(kept, dtype=torch.float64)  # what the rows above gave to a row's sum
    for begin, products, _ in chunks:
        end = begin + len(products)
        products_of(begin, products, None)
        total[begin:end] += before[begin:end]
        if end < kept:
            before[end:] += products[:, len(products) :].sum(dim=0)
    value = _C.self_contrast_losses(
        dtype, kept, n, order.data_ptr(), scale, call.alpha, call.beta, call.gamma, positive.data_ptr(), total.data_ptr(),
        address(weight, "weight"), address(upstream, "the upstream gradient"), address(base, "base"), address(linear, "linear"),
        loss.data_ptr(), of_base.data_ptr() if need_base else 0, of_linear.data_ptr() if need_linear else 0, factor.data_ptr(),
        slope.data_ptr(), call.reduction,
    )  # fmt: skip
    out = loss.to(real) if call.reduction == NONE else torch.full((), value, dtype=real)
    found = [None, of_base.to(real) if need_base else None, of_linear.to(real) if need_linear else None, None]
    if not (need_rows or need_scale):
        return (out,), found

    gradient = torch.empty_like(a)
    for begin, products, there in reversed(chunks):  # the last one is there whatever its memory
        products_of(begin, products, factor, there)
        end = begin + len(products)
        torch.mm(products, a[begin:], out=gradient[begin:end])
        if end < kept:
            gradient[end:].addmm_(products[:, len(products) :].t(), a[begin:end])
    of_rows = torch.empty((n, width), dtype=real)
    of_scale = _C.self_contrast_gradient(
        dtype, kept, n, width, *rows, scale, slope.data_ptr(), gradient.data_ptr(), along.data_ptr(), of_rows.data_ptr(),
        scratch.data_ptr(), threads,
    )  # fmt: skip
    found[0] = of_rows if need_rows else None
    found[3] = torch.full(inverse_tau.shape, of_scale, dtype=real) if need_scale else None
    return (out,), found


def _kernel(inputs: Inputs, call: SelfContrast, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _compute(inputs, call, request)


def _reference(inputs: Inputs, call: SelfContrast) -> Outputs:
    features, base, linear, inverse_tau = inputs
    assert features is not None
    assert inverse_tau is not None
    z, n, labels = unit(features), len(features), call.labels
    own_column = torch.arange(n)
    valid = labels != call.ignore_index
    positive = (labels[:, None] == labels) & (own_column[:, None] != own_column)
    share = call.beta + call.alpha * positive.sum(dim=1).to(z.dtype)
    with torch.autocast("cpu", enabled=False):
        mean = call.alpha * inverse_tau * (z @ z.t()).masked_fill(~positive, 0).sum(dim=1)
    if linear is not None:
        mean = mean + call.beta * linear
    shift = torch.where(valid, torch.full((), call.gamma, dtype=z.dtype).log(), -torch.inf)
    weight = torch.ones(n, dtype=torch.float64) if call.weight is None else call.weight
    weight = torch.where(valid & (share > 0), weight, 0.0)
    if call.reduction in (MEAN, BATCH_MEAN):
        size = weight.sum() if call.reduction == MEAN else valid.sum().to(torch.float64)
        weight = weight / torch.where(size > 0, size, 1.0)
    mean = mean / torch.where(share > 0, share, 1)
    made = Rows(None, None, None, own_column, weight, None, True, False, -1, call.reduction, call.chunk_rows, "cpu")
    return loss_reference((z, z, base, mean, inverse_tau.expand(n), shift), made)


CONTRAST_SELF = Fused(
    "self_contrast",
    "Tensor features, Tensor? base, Tensor? linear, Tensor inverse_tau",
    SelfContrast,
    1,
    _kernel,
    lambda inputs, call: [(len(inputs[0]),) if call.reduction == NONE else ()],  # type: ignore[arg-type]
    _reference,
)
"""The loss of `SelfContrast`, of features that it makes unit rows of."""
