"""A selection problem as the engines see it, checked once and shared by every run over the same pool."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from ._subsets import SizeGroup, Start, group_by_size


class Problem:
    """Attributes:

    start: the state before anything is added (`_subsets.Start`).
    rows: (P, d) float64, the pool relative to start.origin, contiguous.
    bounds: the offsets, a list; groups: the subsets by size; alpha.
    cache: whatever an engine prepares once for all of its runs, under a name of its own.
    """

    def __init__(self, start: Start, pool: Tensor, bounds: list[int], alpha: float) -> None:
        self.start = start
        self.rows = (pool - start.origin).contiguous()
        self.bounds = bounds
        self.groups: list[SizeGroup] = group_by_size(bounds, pool.device)
        self.alpha = alpha
        self.largest = max(self.sizes())
        self.cache: dict[Any, Any] = {}

    @property
    def subsets(self) -> int:
        return len(self.bounds) - 1

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def sizes(self) -> list[int]:
        return [end - begin for begin, end in itertools.pairwise(self.bounds)]
