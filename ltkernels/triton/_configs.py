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
from . import _kernels
from ._row import EQUALIZATION, SIGMOID

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
    Tile(1, 16384, 32),  # 16 a thread and 1024 threads: the largest block there is, at 64 registers a thread
)
# Twice the registers a logit: half the columns at the end, where 64 registers a thread are all there are.
_ROWS_F64 = _ROWS[:-1]
# Longer rows go through twice. 8192 columns amortise two block-wide reductions; two such blocks keep a
# multiprocessor's loads in flight.
_LONG = Tile(1, 8192, 16)
_LONG_F64 = Tile(1, 4096, 16)
# Statistics of short rows.
_SHORT = Tile(1, 1024, 4)
# Gradients from statistics: nothing is reduced, so 8 logits a thread in one shape for all.
_ELEMENTWISE = Tile(1, 1024, 4)

DENOMINATOR_BLOCK = 1024
LOSS_BLOCK = 8192  # 16 warps: 64 Ki row losses are eight steps of one program
SCALE_BLOCK = 2048


def rows_tile(dtype: torch.dtype, classes: int) -> Tile | None:
    """The tile that holds whole rows; None where they are too long."""
    table = _ROWS_F64 if dtype == torch.float64 else _ROWS
    return next((tile for tile in table if classes <= tile.columns), None)


def _make(kernel: triton.JITFunction, dtype: torch.dtype, warps: int, stages: int = 1, **constants) -> Specialisation:
    constants["REAL"] = _TL[real_dtype(dtype)]
    return Specialisation(kernel, dtype, tuple(constants.items()), warps, stages)


def rows(dtype: torch.dtype, classes: int, form: int, tables: bool, mixed: bool, grad: bool, aligned: bool):
    """The kernel of a whole loss: `_kernels.rows`, or `_kernels.long_rows` where a row does not fit."""
    common = {"FORM": form, "TABLES": tables, "MIXED": mixed, "GRAD": grad}
    tile = rows_tile(dtype, classes)
    if tile is None:
        tile = _LONG_F64 if dtype == torch.float64 else _LONG
        return _make(
            _kernels.long_rows, dtype, tile.warps, **common, STATS=False, ALIGNED=aligned, C=tile.columns
        ), tile
    return _make(_kernels.rows, dtype, tile.warps, **common, ALIGNED=aligned, R=tile.rows, C=tile.columns), tile


def statistics(dtype: torch.dtype, classes: int, form: int, tables: bool, mixed: bool, aligned: bool):
    tile = _SHORT if classes <= _SHORT.columns else _LONG_F64 if dtype == torch.float64 else _LONG
    common = {"FORM": form, "TABLES": tables, "MIXED": mixed, "GRAD": False, "STATS": True}
    return _make(_kernels.long_rows, dtype, tile.warps, **common, ALIGNED=aligned, C=tile.columns), tile


def gradient(dtype: torch.dtype, form: int, tables: bool, mixed: bool, aligned: bool):
    tile = _ELEMENTWISE
    common = {"FORM": form, "TABLES": tables, "MIXED": mixed, "ALIGNED": aligned}
    return _make(_kernels.gradient_from_statistics, dtype, tile.warps, **common, R=tile.rows, C=tile.columns), tile


def denominator(dtype: torch.dtype) -> Specialisation:
    return _make(_kernels.denominator, real_dtype(dtype), 4, BLOCK=DENOMINATOR_BLOCK)


def loss_sum(dtype: torch.dtype) -> Specialisation:
    return _make(_kernels.loss_sum, real_dtype(dtype), 16, BLOCK=LOSS_BLOCK)


def scale_gradient(dtype: torch.dtype) -> Specialisation:
    return Specialisation(_kernels.scale_gradient, dtype, (("BLOCK", SCALE_BLOCK),), 4)


def every() -> Iterator[Specialisation]:
    """All that can be launched."""
    seen = set()
    for dtype in FLOATING:
        widths = [tile.columns for tile in _ROWS] + [_ROWS[-1].columns + 1]
        variants = itertools.product(range(5), (False, True), (False, True), (False, True))
        for form, tables, mixed, aligned in variants:
            if form and tables:  # a closed form brings no shift and scale of its own
                continue
            found = [rows(dtype, c, form, tables, mixed, grad, aligned)[0] for c in widths for grad in (False, True)]
            found += [statistics(dtype, c, form, tables, mixed, aligned)[0] for c in widths]
            found.append(gradient(dtype, form, tables, mixed, aligned)[0])
            yield from (each for each in dict.fromkeys(found) if each not in seen)
            seen.update(found)
        for each in (denominator(dtype), loss_sum(dtype), scale_gradient(dtype)):
            if each not in seen:
                seen.add(each)
                yield each
