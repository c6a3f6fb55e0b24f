"""`linear_logsumexp`: the operator of `_rows` for research, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backends, _checks
from .._backends import Explanation
from .._call import NONE
from .._errors import ArgumentError, DTypeError
from .._head import EPS
from .._watch import watched
from ._rows import LOGSUMEXP, Rows, chunk_rows_of

SUM = _checks.REDUCTION_CODES["sum"]


def readable(*tensors: Tensor | None) -> bool:
    """Whether what the tensors hold may be looked at: nobody traces, and no device has to be waited for."""
    return not watched() and all(each is None or (each.is_cpu and not each.is_neg()) for each in tensors)


def matrix(name: str, value: Tensor, like: Tensor | None = None, like_name: str = "features") -> Tensor:
    """A (rows, D) floating-point tensor that fits another in width, dtype and device."""
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor")
    if value.dtype not in _checks.FLOATING:
        raise DTypeError(f"{name} has dtype {value.dtype}; it must be float32, float64, bfloat16 or float16")
    if value.layout is not torch.strided:
        raise DTypeError(f"{name} has layout {value.layout}; it must be strided")
    if value.dim() != 2:
        raise ArgumentError(f"{name} has shape {tuple(value.shape)}; it must be two-dimensional")
    if like is not None:
        if value.shape[1] != like.shape[-1]:
            raise ArgumentError(f"{name} has width {value.shape[1]}, {like_name} {like.shape[-1]}; they must agree")
        if value.dtype != like.dtype:
            raise DTypeError(f"{name} has dtype {value.dtype}, {like_name} {like.dtype}; they must agree")
        if value.device != like.device:
            raise ArgumentError(f"{name} is on {value.device}, {like_name} on {like.device}")
    return value


def indices(name: str, value: Tensor, rows: int, device: torch.device) -> Tensor:
    """A (rows,) tensor of integers, as int64."""
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise DTypeError(f"{name} has dtype {value.dtype}; it must hold integers")
    if value.shape != (rows,):
        raise ArgumentError(f"{name} has shape {tuple(value.shape)}; it must be {(rows,)}")
    if value.device != device:
        raise ArgumentError(f"{name} is on {value.device}, not on {device} with the rest")
    return value.to(torch.int64)


def within(name: str, value: Tensor, low: int, high: int, also: int | None = None) -> None:
    """Refuses the first entry outside [low, high) that is not `also`; does not look at what may not be read."""
    if not readable(value):
        return
    bad = (value < low) | (value >= high)
    if also is not None:
        bad &= value != also
    if bad.any():
        at = int(bad.nonzero()[0])
        beside = "" if also is None else f" or be {also}"
        raise ArgumentError(f"{name} is {int(value[at])} in row {at}; it must lie in [{low}, {high}){beside}")


def chunk(value: int | None) -> int:
    if value is None:
        return 0
    if _checks.integer("chunk_rows", value) < 1:
        raise ArgumentError(f"chunk_rows is {value}; it must be at least 1")
    return int(value)


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in the working dtype: the similarities are not rounded to 16 bits."""
    return F.normalize(x.to(_checks.real_dtype(x.dtype)), dim=-1, eps=EPS)


def grouped(column_group: Tensor, row_group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(order, sorted groups, begin, end)``: the columns sorted by group, and the range of each row's own group in that order."""
    held, order = torch.sort(column_group, stable=True)
    begin = torch.searchsorted(held, row_group.contiguous())
    return order, held, begin, torch.searchsorted(held, row_group.contiguous(), right=True)


def place_of(order: Tensor, index: Tensor) -> Tensor:
    """Where the columns of these numbers are in an order; -1 stays."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.where(index < 0, -1, place[index.clamp_min(0)]) if len(order) else torch.full_like(index, -1)


def linear_logsumexp(
    rows: Tensor,
    columns: Tensor,
    *,
    row_scale: Tensor | float | None = None,
    shift: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    own_index: Tensor | None = None,
    normalize: bool = False,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exps of the similarities of every row with the columns outside and inside its group, without the N x M similarities.

    .. math::
        s_{ij} = \sigma_i a_i \cdot b_j + \delta_j, \quad
        \mathrm{other}_i = \log \sum_{j: g_j \ne g_i} e^{s_{ij}}, \quad
        \mathrm{own}_i = \log \sum_{j: g_j = g_i, j \ne j_0(i)} e^{s_{ij}}

    What contrastive losses are made of; ``torch.logaddexp(other, own)`` is that over all columns. Its gradient computes the products a
    second time, for it cannot know it before; `contrastive` does all in one pass. Memory: one chunk of products beside the gradients.

    Args:
        rows: (N, D); float32, float64, bfloat16 or float16.
        columns: (M, D), in the rows' dtype.
        row_scale: sigma, (N,) or a number: inverse temperatures.
        shift: (M,) delta, added to every similarity with the column; -inf removes it.
        row_group, column_group: (N,) and (M,) integers, both or none. Without them every column is an `other`.
        own_index: (N,) the column that is absent from its row, whatever its group; -1 for none.
        normalize: takes the cosines. The largest similarity need not be looked for then, where scale and shift leave float32 its range
            (scales up to 43 without a shift); without it every row's maxima are.
        chunk_rows: rows of a chunk of products; by default 2^19 products (2^23 on a GPU), at least 128 rows.
        backend: None, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``, of the kernel between the products; see `ltkernels.explain`.

    Returns:
        ``(other, own)``, each (N,), float64 for float64 rows and float32 for all others; -inf where there is no column. Gradients with
        respect to rows, columns, row_scale and shift.

    Raises:
        ValueError: a shape, device or index that does not fit (argument, row and value).
        TypeError: a dtype that does not fit.

    The similarities are computed in float32 (float64 for float64 rows). On a GPU the kernel is CUDA's or Triton's, and without either
    the chunks are torch's operations. Second derivatives, forward mode and function transforms take the N x M similarities.

    Example:
        >>> other, own = ltk.functional.linear_logsumexp(torch.eye(2), torch.eye(2), own_index=torch.arange(2))
        >>> other.tolist(), own.tolist()
        ([0.0, 0.0], [-inf, -inf])
    """
    rows = matrix("rows", rows)
    columns = matrix("columns", columns, rows, "rows")
    real, (n, m) = _checks.real_dtype(rows.dtype), (len(rows), len(columns))
    served = _backends.choose(backend, rows.device)
    if row_scale is not None and not isinstance(row_scale, Tensor):
        row_scale = torch.full((n,), _checks.number("row_scale", row_scale), dtype=real, device=rows.device)
    if row_scale is not None:
        row_scale = _checks.rows("row_scale", row_scale, (n,), rows.device, real)
    if shift is not None:
        shift = _checks.rows("shift", shift, (m,), rows.device, real)
    if (row_group is None) != (column_group is None):
        raise ArgumentError("row_group and column_group must be given together")
    if own_index is not None:
        own_index = indices("own_index", own_index, n, rows.device)
        within("own_index", own_index, -1, m)
    order = begin = end = None
    if row_group is not None and column_group is not None:
        row_group = indices("row_group", row_group, n, rows.device)
        column_group = indices("column_group", column_group, m, rows.device)
        order, _, begin, end = grouped(column_group, row_group)
        own_index = None if own_index is None else place_of(order, own_index)
    if normalize:
        rows, columns = unit(rows), unit(columns)
    call = Rows(order, begin, end, own_index, None, None, bool(normalize), False, -1, NONE, chunk(chunk_rows), served)
    other, own = LOGSUMEXP((rows, columns, None, None, row_scale, shift), call)
    return other, own


def _explain(
    rows: Tensor,
    columns: Tensor,
    *_: object,
    chunk_rows: int | None = None,
    backend: str | None = None,
    **__: object,
) -> Explanation:
    return explained(rows, len(rows), len(columns), chunk_rows, backend)


def explained(like: Tensor, rows: int, columns: int, chunk_rows: int | None, backend: str | None) -> Explanation:
    served = _backends.choose(backend, like.device)
    if like.device.type not in ("cpu", "cuda"):
        return Explanation("torch", f"torch's operations on all {rows} x {columns} similarities")
    size = chunk_rows_of(rows, columns, chunk_rows or 0, served)
    held = f"chunks of {size} of {rows} rows x {columns} columns"
    if served == "torch":
        return Explanation("torch", f"torch's operations; {held}")
    kernel = {"cpu": "compiled", "cuda": "compiled CUDA", "triton": "Triton"}[served]
    name = _backends.explain(served, like.device).backend
    return Explanation(name, f"{kernel} kernel between matrix products; {held}")


linear_logsumexp.explain = _explain  # type: ignore[attr-defined]
