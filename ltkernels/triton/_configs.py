"""Tile shapes, and the list of what can be launched: a specialisation that is not listed here does not exist.

The launchers ask this file for a `Specialisation`, `compile_all` and the tests iterate over all of them. The list is short enough to
be compiled whole, for three generations of GPUs, in minutes: only what changes the registers or the width of the accesses of a usual
call is a variant. The shapes are reasoned for 132 multiprocessors of 64 Ki registers (H100) and not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._checks import FLOATING, real_dtype
from . import _kernels, _linear_kernels, _long_rows

_SIGMOID, _CLOUD, _VMF = 4, 5, 6  # csrc/cpu/adjusted_ce.h: enum Form
_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TL = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Products and sums may fuse: it drops a rounding. Triton's default has changed between versions, so it is always said.
FP_FUSION = True


class Tile(NamedTuple):
    """Rows and columns of a program's tile, its warps, the registers that the compiler may give a thread (None: as many as it likes)."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None


class Specialisation(NamedTuple):
    """One compiled kernel: its name in `module`, the logits' dtype, the compile-time constants, the warps, a limit on registers."""

    kernel: triton.JITFunction
    dtype: torch.dtype
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int = 1
    registers: int | None = None

    @property
    def rows(self) -> int:
        """Of a program."""
        return dict(self.constants)["R"]

    @property
    def options(self) -> dict[str, object]:
        """For the compiler, beside the constants."""
        limit = {} if self.registers is None or torch.version.hip is not None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @property
    def name(self) -> str:
        values = " ".join(f"{key}={value}" for key, value in self.constants if key != "REAL")
        return f"{self.kernel.__name__} {_NAMES[self.dtype]} {values} warps={self.warps}"


# Rows held in registers. A thread holds 8 to 32 logits: enough independent loads in flight, and few enough registers
# (about four a logit) for two to four blocks on a multiprocessor.
_ROWS = (
    Tile(32, 32, 4),  # 1024 logits, 8 a thread; 8 threads share a row, so a reduction stays inside a warp
    Tile(16, 64, 4),  # as above
    Tile(8, 128, 4),  # CIFAR-100: 100 of 128 columns used
    Tile(4, 256, 4),  # a row a warp
    Tile(2, 512, 4),  # Places-LT: two warps a row
    Tile(1, 1024, 4),  # ImageNet-LT: 8 logits a thread; four warps are the cheapest block-wide reduction
    Tile(1, 2048, 4),  # LVIS: 16 a thread
    Tile(1, 4096, 8),  # 16 a thread
    # 32 a thread. Left alone the compiler takes 154 registers with tables, and a block has a multiprocessor to itself: nothing is loaded
    # while it computes. So do 16 warps of 92; of 64, two blocks have room, with spills, and twice what a row costs once.
    Tile(1, 8192, 8, 128),
)
# iNaturalist: 8142 of 8192. Element by element 32 a thread take more addresses than 128 registers hold.
_UNALIGNED = {Tile(1, 8192, 8, 128): Tile(1, 8192, 16, 64)}
# 16 a thread and 1024 threads, the largest block there is, at 64 registers a thread: where no table is read. A warp of AMD's data centre
# GPUs has 64 lanes, so 16 of them are as many threads.
_PLAIN = Tile(1, 16384, 32 if torch.version.hip is None else 16)
# Up to here the tables cost eight registers of forty, and there is no variant without them.
_ONE_VARIANT = 2048
# Longer rows, and what else `rows` does not do: a tile is short of what a program could hold, because two labels' state and the tables
# of a tile live beside it; 8 logits a thread.
_LONG = Tile(1, 4096, 16)
# The same for short rows, and for mixed labels and closed forms of any length.
_SHORT = Tile(1, 1024, 4)
# Two registers a logit, and more for its exp: 4 logits a thread.
_LONG_F64 = Tile(1, 2048, 16)
_DENSE_F64 = Tile(1, 512, 4)  # closed forms of some fifty operations a logit
# Tiles of the head: rows, classes, and features at a time. Of 128 x 128 logits, which would halve what the products read, a thread spills
# 0.4 to 1.2 KB with 8 warps and 0.2 to 0.7 KB with 16 (Triton 3.9, sm_90): the exponentials and their gradient live beside the
# accumulators; 128 x 64 spill too.
_LINEAR = {
    # 16 logits a thread: the exponentials, both labels and two accumulators live beside them. Full float32 products go
    # through registers, so 16 features a step.
    torch.float32: (64, 64, 16, 8, 2),
    # Tensor cores want 64 features a step.
    torch.bfloat16: (64, 64, 64, 8, 2),
    torch.float16: (64, 64, 32, 8, 2),  # its gradients' products have float32 operands
    # Products of doubles go through registers: small tiles. Of 32 x 32, Triton 3.6 and 3.7 do not compile input_gradient.
    torch.float64: (16, 16, 16, 4, 1),
}
# Of float32 in TF32, which the tensor cores take: with 16 their gradient products had 8 columns. With mixed labels 64 spill on sm_100.
_TF32_FEATURES = {False: 64, True: 32}
COMBINE_ROWS = 128
NORM_BLOCK = 512
PARTS_BLOCK = 512

DENOMINATOR_BLOCK = 1024
LOSS_BLOCK = 8192  # 16 warps: 64 Ki row losses are eight steps of one program
SCALE_BLOCK = 2048


def rows_tile(dtype: torch.dtype, classes: int, tables: bool) -> Tile | None:
    """The tile that holds whole rows; None where they are too long, and for float64, which has no use for speed."""
    if dtype == torch.float64:
        return None
    return next((tile for tile in (_ROWS if tables else (*_ROWS, _PLAIN)) if classes <= tile.columns), None)


def _make(kernel: triton.JITFunction, dtype: torch.dtype, tile: Tile, **constants) -> Specialisation:
    constants["REAL"] = _TL[real_dtype(dtype)]
    return Specialisation(kernel, dtype, tuple(constants.items()), tile.warps, registers=tile.registers)


def rows(dtype: torch.dtype, classes: int, tables: bool, aligned: bool, inputs: bool = False) -> Specialisation | None:
    """Loss and gradient of one label a row, without closed form and smoothing; None where a row is too long for registers. `tables`:
    shift or scale are read; `inputs`: sample weights or a label scale, for which tiles of few registers have none left."""
    tile = rows_tile(dtype, classes, tables)
    if tile is None or (inputs and tile.registers is not None):
        return None
    tile = tile if aligned else _UNALIGNED.get(tile, tile)
    tables = tables or tile.columns <= _ONE_VARIANT
    constants = {"TABLES": tables, "INPUTS": tile.registers is None, "ALIGNED": aligned}
    return _make(_kernels.rows, dtype, tile, **constants, R=tile.rows, C=tile.columns)


def long_rows(dtype: torch.dtype, classes: int, form: int, smooth: bool, mixed: bool, aligned: bool) -> Specialisation:
    """The loss, with or without the gradient; one row a program. What is rare has no variants: mixed labels count as smoothed, and
    closed forms and float64 have neither 16-byte accesses nor tiles by length."""
    rare = form != 0 or mixed
    plain = dtype != torch.float64 and form == 0
    long = _DENSE_F64 if form in (_CLOUD, _VMF) else _LONG_F64
    tile = long if dtype == torch.float64 else _SHORT if rare or smooth or classes <= _SHORT.columns else _LONG
    # Two of the forms cannot be smoothed (losses/_terms.py).
    constants = {
        "FORM": form,
        "TABLES": form in (0, _SIGMOID),
        "SMOOTH": form in (1, 3, _CLOUD, _VMF) or (form == 0 and (mixed or smooth or not plain)),
    }
    constants |= {"MIXED": mixed, "ALIGNED": aligned and plain and not mixed, "C": tile.columns}
    return _make(_long_rows.long_rows, dtype, tile, **constants)


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


def _linear(kernel: triton.JITFunction, dtype: torch.dtype, precision: str, **constants) -> Specialisation:
    rows, classes, features, warps, stages = _LINEAR[dtype]
    if dtype == torch.float32 and precision == "tf32":
        features = _TF32_FEATURES[bool(constants["MIXED"])]
    constants |= {"R": rows, "C": classes, "K": features, "PRECISION": precision}
    return _make(kernel, dtype, Tile(rows, classes, warps), **constants)._replace(stages=stages)


def tile_statistics(dtype: torch.dtype, mixed: bool, precision: str) -> Specialisation:
    return _linear(_linear_kernels.tile_statistics, dtype, precision, MIXED=mixed)


def combine(dtype: torch.dtype) -> Specialisation:
    return _make(_linear_kernels.combine, real_dtype(dtype), Tile(COMBINE_ROWS, 1, 4), R=COMBINE_ROWS)


def input_gradient(dtype: torch.dtype, by_class: bool, mixed: bool, precision: str) -> Specialisation:
    # The logits' gradient is rounded to bfloat16 for the product, as torch's is. float16 would lose what is below 6e-8,
    # the tail classes of any larger batch: its products are in TF32, which holds a float16 exactly.
    operand = torch.float32 if dtype == torch.float16 else dtype
    if dtype == torch.float16 and precision == "ieee":
        precision = "tf32"
    constants = {"BY_CLASS": by_class, "MIXED": mixed, "OPERAND": _TL[operand]}
    return _linear(_linear_kernels.input_gradient, dtype, precision, **constants)


def norms(dtype: torch.dtype) -> Specialisation:
    return _make(_linear_kernels.norms, dtype, Tile(1, NORM_BLOCK, 4), BLOCK=NORM_BLOCK)


def gather_parts(dtype: torch.dtype) -> Specialisation:
    return _make(_linear_kernels.gather_parts, dtype, Tile(1, PARTS_BLOCK, 4), BLOCK=PARTS_BLOCK)


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """How products of a dtype may be computed; the first is torch's default."""
    return ("ieee", "tf32") if dtype == torch.float32 else ("ieee",)


def precision(dtype: torch.dtype) -> str:
    """As torch.set_float32_matmul_precision has it: what F.linear would do with these features. cuBLAS takes TF32 for "high" too."""
    if dtype != torch.float32:
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# ---- the lists -------------------------------------------------------------------------------------------------------

_SWITCH = (False, True)


def every_linear() -> Iterator[Specialisation]:
    """All that the head can launch."""
    found = []
    for dtype in FLOATING:
        for mixed, how in itertools.product(_SWITCH, precisions(dtype)):
            if mixed and real_dtype(dtype) != dtype:
                continue  # computed in float32
            found.append(tile_statistics(dtype, mixed, how))
            found += [input_gradient(dtype, by_class, mixed, how) for by_class in _SWITCH]
        found += [combine(dtype), norms(dtype), gather_parts(dtype)]
    return iter(dict.fromkeys(found))


def every() -> Iterator[Specialisation]:
    """All that the losses on logits can launch without autotuning."""
    found = []
    widths = [*(tile.columns for tile in (*_ROWS, _PLAIN)), _PLAIN.columns + 1]
    for dtype, classes, aligned in itertools.product(FLOATING, widths, _SWITCH):
        found += [rows(dtype, classes, tables, aligned) for tables in _SWITCH]
        for form, mixed, smooth in itertools.product(range(7), _SWITCH, _SWITCH):
            if form == _VMF and mixed:
                continue  # there is none
            if form == 0 or not mixed or real_dtype(dtype) == dtype:  # else computed in float32
                found.append(long_rows(dtype, classes, form, smooth, mixed, aligned))
    for dtype in FLOATING:
        found += [denominator(dtype), loss_sum(dtype), scale_gradient(dtype)]
    return iter(dict.fromkeys(each for each in found if each is not None))


def neighbours(tile: Tile) -> tuple[Tile, ...]:
    """What autotuning may take in a tile's place, itself first: half and twice its warps, half and twice its rows."""
    near = [tile]
    for rows, warps in ((1, 0.5), (1, 2), (0.5, 1), (2, 1)):
        other = Tile(int(tile.rows * rows), tile.columns, int(tile.warps * warps))
        logits = other.rows * other.columns
        if other.rows > 0 and 0 < other.warps <= 32 and 32 * other.warps <= logits <= min(16384, 1024 * other.warps):
            near.append(other)
    return tuple(near)


def alternatives(listed: Specialisation) -> tuple[Specialisation, ...]:
    """The specialisations of `rows` that autotuning compares, the listed one first."""
    constants = dict(listed.constants)
    near = neighbours(Tile(constants["R"], constants["C"], listed.warps, listed.registers))
    return tuple(
        listed._replace(
            constants=tuple((constants | {"R": tile.rows}).items()), warps=tile.warps, registers=tile.registers
        )
        for tile in near
    )


def every_neighbour() -> Iterator[Specialisation]:
    """What autotuning may launch beyond `every`."""
    listed = [each for each in every() if each.kernel is _kernels.rows]
    return iter(dict.fromkeys(chain.from_iterable(alternatives(each)[1:] for each in listed)))
