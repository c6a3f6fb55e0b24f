"""The engine of single steps on the CPU: ``judge`` scores the candidate subsets, ``take`` and ``join`` commit one.

State (count, mean, scatter T) is kept in float64. After a subset joins, the log-determinant in question is

    log det(I + alpha T+ / n+) = log det(A) - d log s + log det(I + Y'^T A^-1 Y'),      s = n+ / alpha,  A = s I + T,

with T+ = T + Y' Y'^T, so one d x d factorisation a step serves every candidate, and each costs a determinant of its own
size. A changes by a full-rank ridge from step to step, which no low-rank update of an inverse follows: A is factored
anew each step. `loop` does all steps in C++ where features are narrow, `batched` does many runs at once in torch operations, and
`lazy` scores only what bounds do not settle; `_driver` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._native import _C
from .._rules import Rule
from .._subsets import Problem, SizeGroup, mixed_columns

LANES = 8


class Packs:
    """Subsets in the memory layout of the C++ scorer (csrc/cpu/subset_scores.h), and the call that scores them all: subsets of one size,
    eight to a pack, one per lane."""

    def __init__(self, pool: Tensor, groups: Sequence[SizeGroup]) -> None:
        """`pool` (P, d) float64 on the CPU; `groups` says which rows form which subset. Group g reads row g of
        `scales`."""
        self.width = pool.shape[1]
        self.largest = max(group.size for group in groups)
        parts, starts, sizes, scales, slots, position = [], [], [], [], [], 0
        for g, (size, _, rows) in enumerate(groups):
            count = rows.shape[0]
            packs = -(-count // LANES)
            # Lanes past the last subset repeat it: their scores are computed and never read.
            lanes = torch.arange(packs * LANES).clamp_(max=count - 1)
            part = pool[rows[lanes].reshape(packs, LANES, size)]
            parts.append(part.permute(0, 3, 2, 1).reshape(-1))
            starts += [position + p * self.width * size * LANES for p in range(packs)]
            position += packs * self.width * size * LANES
            slots.append(len(sizes) * LANES + torch.arange(count))
            sizes += [size] * packs
            scales += [g] * packs
        self.data = torch.cat(parts)
        self.starts, self.sizes, self.scale_rows = torch.tensor(starts), torch.tensor(sizes), torch.tensor(scales)
        self.slots = torch.cat(slots)
        self.ids = torch.cat([group.ids for group in groups])
        self.out = torch.empty(len(sizes) * LANES, dtype=torch.float64)
        self.scratch = self.out[:0]

    def score(self, basis: Tensor, lower: bool, scales: Tensor | None, centre: Tensor, anchor: float) -> Tensor:
        """J = log det(I + Y'^T A^-1 Y') of each subset, in the order of `ids`.

        A^-1 = B^T diag(scale^2) B for `basis` B (d, d), lower triangular if `lower`, and `scales` (groups, d) or None;
        `centre` (d,) is B times the current mean, `anchor` the samples that it stands for.
        """
        threads = torch.get_num_threads()
        need = threads * _C.subset_scores_scratch(self.width, self.largest)
        if self.scratch.numel() < need:
            self.scratch = torch.empty(need, dtype=torch.float64)
        _C.subset_scores(
            self.data.data_ptr(),
            self.starts.data_ptr(),
            self.sizes.data_ptr(),
            self.scale_rows.data_ptr(),
            self.sizes.shape[0],
            self.width,
            basis.data_ptr(),
            lower,
            0 if scales is None else scales.data_ptr(),
            centre.data_ptr(),
            anchor,
            self.scratch.data_ptr(),
            self.out.data_ptr(),
            0,
            False,
            threads,
        )
        return self.out[self.slots]


class Factor(NamedTuple):
    """A of every subset size, factored: A_g^-1 = basis^T diag(scales_g^2) basis; `commons` (groups,) = log det(A_g) - d
    log s_g."""

    basis: Tensor
    lower: bool
    scales: Tensor | None
    commons: Tensor


class PackedEngine:
    """Single steps on the CPU: LAPACK's factors, and the C++ scorer over packs."""

    name = "full"

    def __init__(self, problem: Problem) -> None:
        start, d = problem.start, problem.width
        self.problem = problem
        self.alpha, self.subsets, self.groups, self.pool = (
            problem.alpha,
            problem.subsets,
            problem.groups,
            problem.rows,
        )
        self.scatter = start.scatter
        self.mean = start.mean.clone()
        self.count = start.count
        self.anchor = start.anchor
        self.evaluations = 0
        self.free = np.ones(self.subsets, dtype=bool)
        self.eye = torch.eye(d, dtype=torch.float64)
        self.matrix = torch.empty_like(self.eye)
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
            self.lower = torch.linalg.cholesky(self.matrix)
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
        """log det(I + alpha T+ / n+) in nats for every subset, (K,) float64; the entries of committed subsets mean
        nothing."""
        if self.packed == 0 or self.left < 0.75 * self.packed:
            self._pack()
        f = self.factor()
        self.evaluations += self.packed
        scores = self.packs.score(f.basis, f.lower, f.scales, f.basis @ self.mean, self.anchor)
        if f.commons.shape[0] == 1:
            self.values[self.packs.ids] = scores.add_(f.commons)
        else:
            self.values[self.packs.ids] = scores.add_(f.commons[self.group_of[self.packs.ids]])
        return self.values

    def judge(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Log-determinants (K,) float64, and which of them count (K,) bool: every subset that `rule` could take is among
        these."""
        return self.score().numpy(), self.free

    def rows(self, subset: int) -> Tensor:
        return self.pool[self.problem.bounds[subset] : self.problem.bounds[subset + 1]]

    def take(self, subset: int) -> None:
        """Marks one subset as no longer free."""
        self.free[subset] = False
        self.left -= 1

    def join(self, rows: Tensor) -> None:
        """Adds `rows` (size, d), of this pool or of another rank's, to the state."""
        size = rows.shape[0]
        mixed = mixed_columns(rows, self.mean, self.anchor)
        self.scatter.addmm_(mixed.T, mixed)
        if not math.isinf(self.anchor):
            self.mean += (rows.mean(0) - self.mean) * (size / (self.anchor + size))
        self.anchor += size
        self.count += size

    def stats(self) -> dict[str, Any]:
        return {"engine": self.name, "evaluations": self.evaluations, "scores": "float64"}
