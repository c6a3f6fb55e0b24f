"""Contrast between its matrix products: the twin of csrc/cpu/row_logsumexp.h, kernel, list and launcher.

One program a row of products, which goes by in tiles two or three times: for the maxima, where no fixed reference is given, for the
sums, and for the coefficients of the gradients, which take the products' place. A chunk stays in the second-level cache meanwhile. No
atomics, and every sum has an order that depends on the shape alone. The columns are sorted by group, so that a row's own group is a range.

Sums and the arithmetic of a row are in REAL, the products' dtype. What cancels is left out instead of subtracted: the loss less `own` is
log1p of the others' share, and the own columns' factor is minus the share of all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._configs import Specialisation, Tile
from ._kernels import VECTOR
from ._row import LN_2, LOG2_E, SHIFT, exp2, has, kernel, log1p, true
from .adjusted_ce import _aligned, _launch, _or

if TYPE_CHECKING:
    from ..contrastive._rows import Part

# Rows are short in a queue or a small batch, long in a large one. 8 products a thread: a program loads while few others run, for a chunk
# of long rows has 128 of them. Reasoned and not measured.
_SHORT, _LONG, _LONG_F64 = Tile(1, 1024, 4), Tile(1, 4096, 16), Tile(1, 2048, 16)

# Which operands there are, beside SHIFT.
ABSENT, BASE, BONUS = tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
GRAD_BASE, REFERENCE = tl.constexpr(16), tl.constexpr(32)


@triton.jit
def similarities(products, shift, col, inside, sigma2, present, ALIGNED: tl.constexpr, REAL: tl.constexpr):
    """Of a tile of one row, in base 2; 0 outside the row."""
    at, of_column = products + col, shift + col
    if ALIGNED:
        at, of_column = tl.multiple_of(at, 16), tl.multiple_of(of_column, 16)
    x = tl.load(at, mask=inside, other=0.0).to(REAL)
    return x * sigma2 + tl.load(of_column, mask=inside & has(present, SHIFT), other=0.0).to(REAL) * LOG2_E


@triton.jit
def sides(col, inside, begin, end, absent):
    """Which columns of a tile count for `other`, and which for `own`."""
    counts = inside & (col != absent)
    return counts & ((col < begin) | (col >= end)), counts & (col >= begin) & (col < end)


@triton.jit
def log_of(top, total):
    """The log-sum-exp of a side in base 2; of nothing -inf. An infinite similarity is an infinite sum."""
    return tl.where(top == float("inf"), float("inf"), top + tl.log2(total))


@kernel
def contrast_rows(
    products, stride: tl.int64, columns: tl.int32, shift,
    row_scale_f64, reference_f64, own_begin, own_end, absent,
    loss_f64, weight_f64, base_f64, bonus_f64, grad_base_f64, other_f64, own_f64, grad_other_f64, grad_own_f64,
    present: tl.int32, minus_own: tl.int32, is_loss: tl.int32, coefficients: tl.int32,
    GROUPS: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A row of csrc/cpu/row_logsumexp.h."""
    if ALIGNED:  # what the compiler must know for 16-byte accesses
        columns = columns // VECTOR * VECTOR
        stride = stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64)
    here = products + row * stride
    sigma2 = tl.load(row_scale_f64 + row).to(REAL) * LOG2_E
    begin, end = columns, columns
    if GROUPS:
        begin, end = tl.load(own_begin + row).to(tl.int32), tl.load(own_end + row).to(tl.int32)
    missing = tl.load(absent + row, mask=has(present, ABSENT), other=-1).to(tl.int32)
    nothing = tl.zeros([C], REAL)

    top_other = tl.load(reference_f64 + row, mask=has(present, REFERENCE), other=float("inf")).to(REAL) * LOG2_E
    top_own = top_other
    if top_other == float(
        "inf"
    ):  # each side has a maximum of its own: with one, a side far below the other would be lost
        most_other, most_own = nothing - float("inf"), nothing - float("inf")
        for start in range(0, columns, C):
            col = start + tl.arange(0, C)
            inside = col < columns
            a = similarities(here, shift, col, inside, sigma2, present, ALIGNED, REAL)
            of_other, of_own = sides(col, inside, begin, end, missing)
            most_other = tl.maximum(most_other, tl.where(of_other, a, -float("inf")))
            if GROUPS:
                most_own = tl.maximum(most_own, tl.where(of_own, a, -float("inf")))
        top_other, top_own = tl.max(most_other, 0), tl.max(most_own, 0)
        top_other = tl.where(top_other == -float("inf"), 0.0, top_other)  # no column, or none above -inf
        top_own = tl.where(top_own == -float("inf"), 0.0, top_own)

    sum_other, sum_own = nothing, nothing
    for start in range(0, columns, C):
        col = start + tl.arange(0, C)
        inside = col < columns
        a = similarities(here, shift, col, inside, sigma2, present, ALIGNED, REAL)
        of_other, of_own = sides(col, inside, begin, end, missing)
        e = exp2(a - tl.where(of_own, top_own, top_other))
        sum_other += tl.where(of_other, e, 0.0)
        if GROUPS:
            sum_own += tl.where(of_own, e, 0.0)
    other = log_of(top_other, tl.sum(sum_other, 0))
    own = log_of(top_own, tl.sum(sum_own, 0))

    # factor_other and factor_own belong to exp2(a - other) and exp2(a - own).
    weight = tl.load(weight_f64 + row, mask=true(is_loss != 0), other=1.0).to(REAL)
    counted = true(weight != 0.0)
    if is_loss != 0:
        base = tl.load(base_f64 + row, mask=has(present, BASE), other=-float("inf")).to(REAL) * LOG2_E
        bonus = tl.load(bonus_f64 + row, mask=has(present, BONUS), other=0.0).to(REAL) * LOG2_E
        raised = tl.where(own == -float("inf"), own, own + bonus)
        top = tl.maximum(base, tl.maximum(other, raised))
        reference = tl.where(top == -float("inf"), 0.0, top)
        e_base, e_other, e_own = tl.exp2(base - reference), tl.exp2(other - reference), tl.exp2(raised - reference)
        besides = e_base + e_other
        total = besides + e_own
        loss = (reference + tl.log2(total)) * LN_2
        factor_own = weight * (e_own / total)
        if minus_own != 0:
            near = bonus * LN_2 + log1p(besides / e_own)
            loss = tl.where(raised == reference, near, loss - own * LN_2)
            factor_own = -weight * (besides / total)
        factor_other = weight * (e_other / total)
        tl.store(loss_f64 + row, tl.where(counted, weight * loss, 0.0).to(tl.float64))
        share = tl.where(counted, weight * (e_base / total), 0.0).to(tl.float64)
        tl.store(grad_base_f64 + row, share, mask=has(present, GRAD_BASE))
    else:
        tl.store(other_f64 + row, (other * LN_2).to(tl.float64))
        tl.store(own_f64 + row, (own * LN_2).to(tl.float64))
        factor_other = tl.load(grad_other_f64 + row, mask=true(coefficients != 0), other=0.0).to(REAL)
        factor_own = tl.load(grad_own_f64 + row, mask=true(coefficients != 0), other=0.0).to(REAL)

    if coefficients != 0:
        # The factor of an empty side would be that of nothing.
        factor_other = tl.where(other == -float("inf"), 0.0, factor_other)
        factor_own = tl.where(own == -float("inf"), 0.0, factor_own)
        other = tl.where(other == -float("inf"), 0.0, other)
        own = tl.where(own == -float("inf"), 0.0, own)
        for start in range(0, columns, C):
            col = start + tl.arange(0, C)
            inside = col < columns
            a = similarities(here, shift, col, inside, sigma2, present, ALIGNED, REAL)
            among_others, among_own = sides(col, inside, begin, end, missing)
            g = tl.where(among_own, factor_own, factor_other) * exp2(a - tl.where(among_own, own, other))
            g = tl.where((among_others | among_own) & counted, g, 0.0)
            to = here + col
            if ALIGNED:
                to = tl.multiple_of(to, 16)
            tl.store(to, g, mask=inside)


def specialisation(dtype: torch.dtype, columns: int, groups: bool, aligned: bool) -> Specialisation:
    """The kernel for products of a dtype; float64 has neither 16-byte accesses nor tiles by length."""
    tile = _LONG_F64 if dtype == torch.float64 else _SHORT if columns <= _SHORT.columns else _LONG
    aligned = aligned and dtype != torch.float64
    return _configs._make(contrast_rows, dtype, tile, GROUPS=groups, ALIGNED=aligned, C=tile.columns)


def every() -> Iterator[Specialisation]:
    """All that contrast can launch."""
    widths = (_SHORT.columns, _SHORT.columns + 1)
    switches = itertools.product((torch.float32, torch.float64), widths, (False, True), (False, True))
    return iter(dict.fromkeys(specialisation(*each) for each in switches))


def row_logsumexp(products: Tensor, part: Part) -> None:
    """See `ltkernels.contrastive._rows.Part`. products (rows, columns) float32 or float64, columns contiguous; one launch."""
    rows, columns = products.shape
    if rows == 0:
        return
    number, index = part.row_scale, part.row_scale.view(torch.int64)  # stand-ins of the right type for what is not read
    optional = (part.shift, part.absent, part.base, part.bonus, part.grad_base, part.reference)
    bits = (SHIFT, ABSENT, BASE, BONUS, GRAD_BASE, REFERENCE)
    chosen = specialisation(
        products.dtype, columns, part.own_begin is not None, _aligned(columns, products, part.shift)
    )
    _launch(
        chosen,
        (rows,),
        products,
        products.stride(0),
        columns,
        _or(part.shift, products),
        part.row_scale,
        _or(part.reference, number),
        *(_or(each, index) for each in (part.own_begin, part.own_end, part.absent)),
        *(_or(each, number) for each in (part.loss, part.weight, part.base, part.bonus, part.grad_base)),
        *(_or(each, number) for each in (part.other, part.own, part.grad_other, part.grad_own)),
        sum(bit.value for bit, each in zip(bits, optional) if each is not None),
        int(part.minus_own),
        int(part.loss is not None),
        int(part.coefficients),
    )
