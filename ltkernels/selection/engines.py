"""Engines that score every candidate subset and commit one: ``init / pick / commit / stats``, one interface.

State (count, mean, scatter T) is kept in float64, and so are the scores. After a subset joins, the log-determinant in
question is

    log det(I + alpha T+ / n+) = log det(A) - d log s + log det(I + Y'^T A^-1 Y'),      s = n+ / alpha,  A = s I + T,

with T+ = T + Y' Y'^T, so one d x d factorisation a step serves every candidate, and each costs a determinant of its own
size. A changes by a full-rank ridge from step to step, which no low-rank update of an inverse follows: A is factored
anew each step ("refactor", engine A).

Names for ``engine=``:

* ``"A"``: refactor per step, every candidate scored; the C++ scorer on the CPU, torch operations elsewhere.
* ``"lazy"``: engine A, but a candidate is scored only when certified bounds on its score do not rule it out (see
  `lazy`); on the CPU, for max, min and target. Elsewhere it is "A".
* ``"auto"``: "lazy" where it is the faster one, by features, original samples and mode, else "A".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diversity import SizeGroup, Start, group_by_size, grown_log_dets, mixed_columns
from .packs import Packs
from .rules import Rule, choose

ENGINES = ("auto", "A", "lazy")
# From this many features on, the bounds cost less than the scores that they save; with fewer original samples, each
# step changes A so much that the bounds let most candidates through.
LAZY_WIDTH, LAZY_COUNT = 128, 200
# Above this subset size the blocked d x d or n' x n' algebra of torch beats one lane per subset.
LARGEST_PACKED = 128


class Factor(NamedTuple):
    """A of every subset size, factored: A_g^-1 = basis^T diag(scales_g^2) basis; `commons` (groups,) = log det(A_g) - d
    log s_g."""

    basis: Tensor
    lower: bool
    scales: Tensor | None
    commons: Tensor


class Engine:
    """State and commit, and engine A in torch operations (any device)."""

    name = "A"

    def __init__(self, start: Start, pool: Tensor, offsets: Sequence[int], alpha: float) -> None:
        self.alpha = alpha
        self.offsets = offsets
        self.subsets = len(offsets) - 1
        self.pool = pool - start.origin
        self.groups = group_by_size(offsets, pool.device)
        self.scatter = start.scatter.clone()
        self.mean = start.mean.clone()
        self.count = start.count
        self.anchor = start.anchor
        self.evaluations = 0
        self.free = np.ones(self.subsets, dtype=bool)

    def score(self) -> Tensor:
        """log det(I + alpha T+ / n+) in nats for every subset, (K,) float64; the entries of committed subsets mean
        nothing."""
        self.evaluations += self.subsets
        return grown_log_dets(self.pool, self.groups, self.scatter, self.mean, self.count, self.anchor, self.alpha)

    def pick(self, rule: Rule) -> tuple[int, float]:
        """The free subset that `rule` takes, and the log-determinant with it."""
        values = self.score().cpu().numpy()
        best = choose(values, self.free, rule)
        return best, float(values[best])

    def rows(self, subset: int) -> Tensor:
        return self.pool[self.offsets[subset] : self.offsets[subset + 1]]

    def commit(self, subset: int) -> None:
        """Adds one subset to the state."""
        self.free[subset] = False
        rows = self.rows(subset)
        size = rows.shape[0]
        mixed = mixed_columns(rows, self.mean, self.anchor)
        self.scatter.addmm_(mixed.T, mixed)
        if not math.isinf(self.anchor):
            self.mean += (rows.mean(0) - self.mean) * (size / (self.anchor + size))
        self.anchor += size
        self.count += size

    def stats(self) -> dict[str, Any]:
        return {"engine": self.name, "evaluations": self.evaluations}


class PackedEngine(Engine):
    """Engine A on the CPU, scored by the C++ kernel from packs."""

    def __init__(self, start: Start, pool: Tensor, offsets: Sequence[int], alpha: float) -> None:
        super().__init__(start, pool, offsets, alpha)
        d = pool.shape[1]
        self.eye = torch.eye(d, dtype=torch.float64)
        self.matrix = torch.empty_like(self.eye)
        self.lower = torch.empty_like(self.eye)
        self.group_of = torch.empty(self.subsets, dtype=torch.int64)
        for g, group in enumerate(self.groups):
            self.group_of[group.ids] = g
        self.left = self.subsets
        self.packed = 0
        self.values = torch.empty(self.subsets, dtype=torch.float64)

    def _pack(self) -> None:
        self.packed = self.left
        self.packs = Packs(self.pool, self.select(torch.from_numpy(self.free)))

    def select(self, wanted: Tensor) -> list[SizeGroup]:
        """The size groups restricted to the subsets `wanted` (K,) bool; a group may be left empty."""
        parts = []
        for size, ids, rows in self.groups:
            keep = wanted[ids]
            parts.append(SizeGroup(size, ids[keep], rows[keep]))
        return parts

    def factor(self) -> Factor:
        """Cholesky where all subsets share a size; else the eigenvectors of T, which serve every ridge."""
        if len(self.groups) == 1:
            ridge = (self.count + self.groups[0].size) / self.alpha
            self.matrix.copy_(self.scatter).diagonal().add_(ridge)
            torch.linalg.cholesky(self.matrix, out=self.lower)
            # The row-major inverse: the solver works in column-major order, so its result is copied.
            basis = torch.linalg.solve_triangular(self.lower, self.eye, upper=False).contiguous()
            common = 2.0 * self.lower.diagonal().log().sum() - self.eye.shape[0] * math.log(ridge)
            return Factor(basis, True, None, common.reshape(1))
        values, vectors = torch.linalg.eigh(self.scatter)
        values.clamp_(min=0.0)  # T is positive semi-definite; rounding puts its zeros at about -1e-16
        ridges = torch.tensor([(self.count + group.size) / self.alpha for group in self.groups], dtype=torch.float64)
        scales = torch.rsqrt(values + ridges[:, None])
        return Factor(vectors.T.contiguous(), False, scales, torch.log1p(values / ridges[:, None]).sum(1))

    def score(self) -> Tensor:
        if self.packed == 0 or self.left < 0.75 * self.packed:
            self._pack()
        f = self.factor()
        self.evaluations += self.packed
        scores, _ = self.packs.score(f.basis, f.lower, f.scales, f.basis @ self.mean, self.anchor)
        if f.commons.shape[0] == 1:
            self.values[self.packs.ids] = scores.add_(f.commons)
        else:
            self.values[self.packs.ids] = scores.add_(f.commons[self.group_of[self.packs.ids]])
        return self.values

    def commit(self, subset: int) -> None:
        super().commit(subset)
        self.left -= 1


def make_engine(name: str, start: Start, pool: Tensor, offsets: Sequence[int], alpha: float, mode: str) -> Engine:
    """The engine called `name`; "auto" chooses by device and sizes."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    largest = max(end - begin for begin, end in itertools.pairwise(offsets))
    if pool.is_cuda or largest > LARGEST_PACKED:
        return Engine(start, pool, offsets, alpha)
    pays = mode != "quantile" and pool.shape[1] >= LAZY_WIDTH and start.count >= LAZY_COUNT
    if name == "lazy" or (name == "auto" and pays):
        from .lazy import LazyEngine

        return LazyEngine(start, pool, offsets, alpha)
    return PackedEngine(start, pool, offsets, alpha)
