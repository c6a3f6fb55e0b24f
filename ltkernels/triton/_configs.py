"""Tile shapes, and the list of what can be launched: a specialisation that is not listed here does not exist.

The launchers ask this file for a `Specialisation`, `compile_all` and the tests iterate over all of them. The shapes are
reasoned for 132 multiprocessors of 64 Ki registers (H100) and not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._checks import FLOATING, real_dtype
from . import _kernels, _linear_kernels, _long_rows

_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TL = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Products and sums may fuse: it drops a rounding. Triton's default has changed between versions, so it is always said.
FP_FUSION = True


class Tile(NamedTuple):
    """Rows and columns of a program's tile, its warps."""

    rows: int
    columns: int
    warps: int


class Specialisation(NamedTuple):
    """One compiled kernel: its name in `module`, the logits' dtype, the compile-time constants, the warps."""

    kernel: triton.JITFunction
    dtype: torch.dtype
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int = 1

    @property
    def name(self) -> str:
        values = " ".join(f"{key}={value}" for key, value in self.constants if key != "REAL")
        return f"{self.kernel.__name__} {_NAMES[self.dtype]} {values} warps={self.warps}"


# Rows held in registers. A thread holds 8 to 16 logits: enough independent loads in flight, and few enough registers
# (about four a logit) for two to four blocks on a multiprocessor.
_ROWS = (
    Tile(32, 32, 4),  # C <= 32: 1024 logits, 8 a thread; 8 threads share a row, so a reduction stays inside a warp
    Tile(16, 64, 4),  # as above
    Tile(8, 128, 4),  # CIFAR-100: 100 of 128 columns used
    Tile(4, 256, 4),  # a row a warp
    Tile(2, 512, 4),  # Places-LT: two warps a row
    Tile(1, 1024, 4),  # ImageNet-LT: 8 logits a thread; four warps are the cheapest block-wide reduction
    Tile(1, 2048, 4),  # LVIS: 16 a thread
    Tile(1, 4096, 8),  # 16 a thread
    Tile(1, 8192, 16),  # iNaturalist: 8142 of 8192; 16 a thread, four such blocks fill a multiprocessor
)
# 16 a thread and 1024 threads, the largest block there is, at 64 registers a thread: where no table is read (`rows_tile`).
_PLAIN = Tile(1, 16384, 32)
# Two registers a logit, and more for its exp: 4 logits a thread.
_ROWS_F64 = (*(Tile(tile.rows, tile.columns, 2 * tile.warps) for tile in _ROWS[:6]), Tile(1, 2048, 16))
# Longer rows, and mixed labels: a tile is short of what a program could hold, because two labels' state and the
# tables of a tile live beside it; 8 logits a thread, 4 in float64.
_LONG = Tile(1, 4096, 16)
_LONG_F64 = Tile(1, 2048, 16)
# The same for short rows.
_SHORT = Tile(1, 1024, 4)
# Gradients from statistics: nothing is reduced, so 8 logits a thread in one shape for all.
_ELEMENTWISE = Tile(1, 1024, 4)

# Tiles of the head: rows, classes, and features at a time.
_LINEAR = {
    # 16 logits a thread: the exponentials, both labels and two accumulators live beside them. Full float32 products go
    # through registers, so 16 features a step.
    torch.float32: (64, 64, 16, 8, 2),
    # Tensor cores want 64 features a step.
    torch.bfloat16: (64, 64, 64, 8, 2),
    torch.float16: (64, 64, 32, 8, 2),  # its gradients' products have float32 operands
    # Products of doubles go through registers: small tiles.
    torch.float64: (32, 32, 16, 8, 1),
}
COMBINE_ROWS = 128
NORM_BLOCK = 512
PARTS_BLOCK = 512

DENOMINATOR_BLOCK = 1024
LOSS_BLOCK = 8192  # 16 warps: 64 Ki row losses are eight steps of one program
SCALE_BLOCK = 2048


def rows_tile(dtype: torch.dtype, classes: int, plain: bool) -> Tile | None:
    """The tile that holds whole rows; None where they are too long. `plain`: no table is streamed, and the form is none
    or ArcFace."""
    table = _ROWS_F64 if dtype == torch.float64 else (*_ROWS, _PLAIN) if plain else _ROWS
    return next((tile for tile in table if classes <= tile.columns), None)


def _make(kernel: triton.JITFunction, dtype: torch.dtype, tile: Tile, **constants) -> Specialisation:
    constants["REAL"] = _TL[real_dtype(dtype)]
    return Specialisation(kernel, dtype, tuple(constants.items()), tile.warps)


def rows(dtype: torch.dtype, classes: int, form: int, tables: bool, smooth: bool, aligned: bool):
    """Loss and gradient of one label a row; None where a row is too long for registers."""
    tile = rows_tile(dtype, classes, form in (0, 3) and not tables and not smooth)
    if tile is None:
        return None
    constants = {
        "FORM": form,
        "TABLES": tables,
        "SMOOTH": smooth,
        "ALIGNED": aligned,
        "R": tile.rows,
        "C": tile.columns,
    }
    return _make(_kernels.rows, dtype, tile, **constants), tile


def long_rows(
    dtype: torch.dtype,
    classes: int,
    form: int,
    tables: bool,
    smooth: bool,
    mixed: bool,
    aligned: bool,
    *,
    grad: bool = False,
    stats: bool = False,
):
    """The loss, with the gradient or statistics or neither."""
    tile = _SHORT if classes <= _SHORT.columns else _LONG_F64 if dtype == torch.float64 else _LONG
    constants = {"FORM": form, "TABLES": tables, "SMOOTH": smooth, "MIXED": mixed, "GRAD": grad, "STATS": stats}
    return _make(_long_rows.long_rows, dtype, tile, **constants, ALIGNED=aligned, C=tile.columns)


def gradient(dtype: torch.dtype, form: int, tables: bool, smooth: bool, mixed: bool, aligned: bool):
    """The gradient from statistics."""
    tile = _ELEMENTWISE
    constants = {"FORM": form, "TABLES": tables, "SMOOTH": smooth, "MIXED": mixed, "ALIGNED": aligned}
    return _make(_long_rows.gradient_from_statistics, dtype, tile, **constants, R=tile.rows, C=tile.columns), tile


def denominator(dtype: torch.dtype) -> Specialisation:
    return _make(_kernels.denominator, real_dtype(dtype), Tile(1, DENOMINATOR_BLOCK, 4), BLOCK=DENOMINATOR_BLOCK)


def loss_sum(dtype: torch.dtype) -> Specialisation:
    return _make(_kernels.loss_sum, real_dtype(dtype), Tile(1, LOSS_BLOCK, 16), BLOCK=LOSS_BLOCK)


def scale_gradient(dtype: torch.dtype) -> Specialisation:
    return Specialisation(_kernels.scale_gradient, dtype, (("BLOCK", SCALE_BLOCK),), 4)


# ---- the head --------------------------------------------------------------------------------------------------------


def linear_tile(dtype: torch.dtype) -> Tile:
    rows, classes, _, warps, _ = _LINEAR[dtype]
    return Tile(rows, classes, warps)


def _linear(
    kernel: triton.JITFunction, dtype: torch.dtype, precision: str, aligned: bool, **constants
) -> Specialisation:
    rows, classes, features, warps, stages = _LINEAR[dtype]
    if not aligned:  # every element has an address of its own
        features, stages = min(features, 32), 1
    constants |= {"ALIGNED": aligned, "R": rows, "C": classes, "K": features, "PRECISION": precision}
    return _make(kernel, dtype, Tile(rows, classes, warps), **constants)._replace(stages=stages)


def tile_statistics(dtype: torch.dtype, smooth: bool, mixed: bool, precision: str, aligned: bool) -> Specialisation:
    return _linear(_linear_kernels.tile_statistics, dtype, precision, aligned, SMOOTH=smooth, MIXED=mixed)


def combine(dtype: torch.dtype, smooth: bool, mixed: bool) -> Specialisation:
    tile = Tile(COMBINE_ROWS, 1, 4)
    return _make(_linear_kernels.combine, real_dtype(dtype), tile, SMOOTH=smooth, MIXED=mixed, R=tile.rows)


def input_gradient(
    dtype: torch.dtype, by_class: bool, product: bool, smooth: bool, mixed: bool, precision: str, aligned: bool
) -> Specialisation:
    # The logits' gradient is rounded to bfloat16 for the product, as torch's is. float16 would lose what is below 6e-8,
    # the tail classes of any larger batch: its products are in TF32, which holds a float16 exactly.
    operand = torch.float32 if dtype == torch.float16 else dtype
    if dtype == torch.float16 and precision == "ieee":
        precision = "tf32"
    return _linear(
        _linear_kernels.input_gradient,
        dtype,
        precision,
        aligned,
        BY_CLASS=by_class,
        PRODUCT=product,
        SMOOTH=smooth,
        MIXED=mixed,
        OPERAND=_TL[operand],
    )


def norms(dtype: torch.dtype) -> Specialisation:
    return _make(_linear_kernels.norms, dtype, Tile(1, NORM_BLOCK, 4), BLOCK=NORM_BLOCK)


def gather_parts(dtype: torch.dtype) -> Specialisation:
    return _make(_linear_kernels.gather_parts, dtype, Tile(1, PARTS_BLOCK, 4), BLOCK=PARTS_BLOCK)


def linear_unsupported(dtype: torch.dtype) -> str:
    """Why the head cannot be served in a dtype; empty where it can. Triton 3.6 fails in a compiler pass on products of
    float64 tiles, 3.9 compiles them."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if dtype == torch.float64 and version < (3, 9):
        return f"Triton {triton.__version__} does not compile products of float64 tiles; 3.9 does"
    return ""


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """How products of a dtype may be computed; the first is torch's default."""
    return ("ieee", "tf32x3", "tf32") if dtype == torch.float32 else ("ieee",)


def precision(dtype: torch.dtype) -> str:
    """As torch.set_float32_matmul_precision has it: what F.linear would do with these features."""
    if dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def every_linear() -> Iterator[Specialisation]:
    """All that the head can launch."""
    found = []
    switches = (False, True)
    served = [dtype for dtype in FLOATING if not linear_unsupported(dtype)]
    for dtype, smooth, mixed in itertools.product(served, switches, switches):
        for how, aligned in itertools.product(precisions(dtype), switches):
            found.append(tile_statistics(dtype, smooth, mixed, how, aligned))
            for by_class, product in ((False, True), (True, True), (True, False)):
                found.append(input_gradient(dtype, by_class, product, smooth, mixed, how, aligned))
        found.append(combine(dtype, smooth, mixed))
    for dtype in served:
        found += [norms(dtype), gather_parts(dtype)]
    return iter(dict.fromkeys(found))


# ---- the lists -------------------------------------------------------------------------------------------------------


def every() -> Iterator[Specialisation]:
    """All that the losses on logits can launch."""
    found = []
    widths = [*(tile.columns for tile in (*_ROWS, _PLAIN)), _PLAIN.columns + 1]
    switches = (False, True)
    for dtype, form, tables, smooth, aligned in itertools.product(FLOATING, range(5), switches, switches, switches):
        # A closed form brings no shift and scale; two of them cannot be smoothed (losses/_terms.py); and smoothing alone
        # does not deserve a variant.
        if (form and tables) or (smooth and (form in (2, 4) or (form == 0 and not tables))):
            continue
        common = (form, tables, smooth)
        found += [rows(dtype, classes, *common, aligned) for classes in widths]
        for mixed in switches:
            for classes, kind in itertools.product(widths, ({}, {"grad": True}, {"stats": True})):
                found.append(long_rows(dtype, classes, *common, mixed, aligned, **kind))
            found.append(gradient(dtype, *common, mixed, aligned))
    found = [each[0] if type(each) is tuple else each for each in found if each is not None]
    for dtype in FLOATING:
        found += [denominator(dtype), loss_sum(dtype), scale_gradient(dtype)]
    return iter(dict.fromkeys(found))
