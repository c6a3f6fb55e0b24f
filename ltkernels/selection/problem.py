"""A selection problem as the engines see it, checked once and shared by every run over the same pool."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..diversity import SizeGroup, Start, group_by_size


class Problem:
    """Attributes:

    start: the state before anything is added (`ltkernels.diversity.Start`).
    rows: (P, d) float64, the pool relative to start.origin, contiguous.
    bounds: the offsets, a list; groups: the subsets by size; alpha.
    joining: sizes of all subsets that may join, those of other ranks too.
    cache: whatever an engine prepares once for all of its runs, under a name of its own.
    """

    def __init__(
        self, start: Start, pool: Tensor, bounds: list[int], alpha: float, joining: Sequence[int] | None = None
    ) -> None:
        self.start = start
        self.rows = (pool - start.origin).contiguous()
        self.bounds = bounds
        self.groups: list[SizeGroup] = group_by_size(bounds, pool.device)
        self.alpha = alpha
        self.joining = list(self.sizes() if joining is None else joining)
        self.largest = max(self.joining)
        # Whether every subset that may join has one size.
        self.uniform = min(self.joining) == self.largest
        self.cache: dict[Any, Any] = {}

    @property
    def subsets(self) -> int:
        return len(self.bounds) - 1

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def sizes(self) -> list[int]:
        return [end - begin for begin, end in itertools.pairwise(self.bounds)]
