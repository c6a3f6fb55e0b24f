"""Seeded draws of hostile inputs, and the loop over cases that every fuzzing part shares.

Not Hypothesis: drawing a tensor entry by entry costs it a hundred times what a loss of that tensor does, and a case is repeated by its seed
and number anyway.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _part import Tally
from torch import Tensor

import ltkernels

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PACKAGE = str(Path(ltkernels.__file__).parent)


class Draw(random.Random):
    """Draws of one case, and `said`, what it has drawn, for the report of a failure."""

    def __new__(cls, seed: int, case: int) -> Draw:
        return super().__new__(cls)  # Python 3.10's takes one argument at most

    def __init__(self, seed: int, case: int) -> None:
        super().__init__(f"{seed} {case}")
        self.case = case
        self.said: list[str] = []
        self.generator = torch.Generator().manual_seed(self.getrandbits(31))

    def say(self, name: str, value: Any) -> Any:
        self.said.append(f"{name}={value}")
        return value

    def chance(self, p: float) -> bool:
        return self.random() < p

    def size(self, largest: int, zero: float = 0.0) -> int:
        """Small sizes, powers of two and their neighbours more often than others; 0 with probability `zero`."""
        if self.chance(zero):
            return 0
        if self.chance(0.5):
            return self.randint(1, min(largest, 9))
        edge = (1 << self.randint(1, max(1, largest.bit_length() - 1))) + self.randint(-1, 1)
        return max(1, min(largest, edge)) if self.chance(0.5) else self.randint(1, largest)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def layout(self, value: Tensor) -> Tensor:
        """The same numbers in other memory: sliced, transposed, spread, misaligned."""
        kind = self.say(
            "layout", self.choice(["dense", "dense", "rows", "columns", "transposed", "misaligned", "both"])
        )
        if kind == "dense" or value.dim() == 0:
            return value.contiguous()
        if kind == "transposed":
            order = list(range(value.dim()))
            self.shuffle(order)
            back = sorted(range(value.dim()), key=order.__getitem__)
            return value.permute(order).contiguous().permute(back)
        if kind == "misaligned":
            flat = torch.empty(value.numel() + 3, dtype=value.dtype)[self.randint(1, 3) :][: value.numel()]
            return flat.view(value.shape).copy_(value)
        # A part of a larger tensor whose other entries are NaN: reading one shows.
        first, last = kind != "columns", kind != "rows"
        shape = list(value.shape)
        at: list[slice] = [slice(None)] * value.dim()
        for axis, chosen in ((0, first), (value.dim() - 1, last)):
            if chosen:
                step = self.randint(1, 2)
                shape[axis] = value.shape[axis] * step + 2
                at[axis] = slice(1, 1 + value.shape[axis] * step, step)
        filler = NAN if value.is_floating_point() else 2**30 if value.dtype == torch.int64 else 1
        whole = torch.full(shape, filler, dtype=value.dtype)
        whole[tuple(at)] = value
        return whole[tuple(at)]

    def given(self, value: Tensor) -> Any:
        """The same numbers as callers have them: now and then an array of any byte order, strides and flags, or nested lists."""
        if value.dtype == torch.bfloat16 or self.chance(0.6):
            return value
        array = value.numpy()
        kind = self.say(
            "given",
            self.choice(["array", "swapped", "backwards", "Fortran", "read only", "long double", "list", "width"]),
        )
        if kind == "swapped":
            return array.astype(array.dtype.newbyteorder("S"))
        if kind == "backwards":
            return array[::-1].copy()[::-1]
        if kind == "Fortran":
            return np.asfortranarray(array)
        if kind == "read only":
            array = array.copy()
            array.flags.writeable = False
        if kind == "long double" and array.dtype.kind == "f":
            return array.astype(np.longdouble)
        if kind == "width" and array.dtype == np.int64:
            width = self.choice(["i1", "i2", "i4", "u1", "u2", "u4", "u8"])
            limits = np.iinfo(width)
            return (
                array.astype(width) if array.size and limits.min <= array.min() and array.max() <= limits.max else array
            )
        # Python's numbers are doubles: a list of others would be another type of features.
        return array.tolist() if kind == "list" and array.dtype in (np.float64, np.int64) and array.size else array

    def any_seed(self) -> int:
        """Of up to 64 bits."""
        return self.choice([0, self.case, self.getrandbits(31), self.getrandbits(64), 2**64 - 1])

    def counts(self, classes: int) -> list[int]:
        """Class counts, long-tailed in no order; now and then equal, or enormous."""
        kind = self.randrange(6)
        if kind == 0:
            return [self.randint(1, 9)] * classes
        top = 10**9 if kind == 1 else 5000
        return [max(1, int(top * 0.001 ** self.random())) for _ in range(classes)]


def loop(seed: int, cases: int, one: Callable[[Draw], None]) -> Tally:
    """`one` for every case; what it raises is a failure of that case."""
    tally = Tally()
    torch.set_num_threads(2)
    for case in range(cases):
        draw = Draw(seed, case)
        torch.manual_seed(draw.getrandbits(31))
        try:
            one(draw)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:300]} ({Path(frame.filename).name}:{frame.lineno})"
            tally.failures.append(f"seed {seed} case {case}: {', '.join(draw.said)}: {text}")
        tally.cases += 1
    return tally


def refused(call: Callable[[], Any]) -> None:
    """`call` must be refused with a TypeError or ValueError that this library raised, and that says something."""
    try:
        call()
    except (TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not (where.startswith(_PACKAGE) or "argument" in str(error)) or len(str(error)) <= 10:
            raise AssertionError(f"refused by {where}, with {error!r}") from error
        return
    raise AssertionError("bad input was accepted")


def missing(names: set[str], generators: set[str]) -> None:
    """Every public name has a generator, so that a new one cannot be forgotten."""
    if names != generators:
        lacking, extra = sorted(names - generators), sorted(generators - names)
        raise AssertionError(f"public names without a generator: {lacking}; generators without a public name: {extra}")
