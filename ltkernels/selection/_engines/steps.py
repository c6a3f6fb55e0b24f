"""The engine of single steps, on any device: ``judge`` scores the candidate subsets, ``take`` and ``join`` commit one.

State (count, mean, scatter T) is kept in float64. After a subset joins, the log-determinant in question is

    log det(I + alpha T+ / n+) = log det(A) - d log s + log det(I + Y'^T A^-1 Y'),      s = n+ / alpha,  A = s I + T,

with T+ = T + Y' Y'^T, so one d x d factorisation a step serves every candidate, and each costs a determinant of its own
size. A changes by a full-rank ridge from step to step, which no low-rank update of an inverse follows: A is factored
anew each step. `loop` does all steps in C++ where features are narrow, `batched` does many runs at once, and `lazy` scores only
what bounds do not settle; `_driver` chooses.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from .._rules import Rule
from .._subsets import Problem, grown_log_dets, mixed_columns


class StepEngine:
    """Single steps in which every candidate is scored."""

    name = "full"

    def __init__(self, problem: Problem) -> None:
        start = problem.start
        self.problem, self.pool, self.groups = problem, problem.rows, problem.groups
        self.alpha, self.subsets = problem.alpha, problem.subsets
        self.scatter, self.mean = start.scatter, start.mean.clone()
        self.count, self.anchor = start.count, start.anchor
        self.free, self.left = np.ones(self.subsets, dtype=bool), self.subsets
        self.evaluations = 0

    def score(self) -> Tensor:
        """log det(I + alpha T+ / n+) in nats for every subset, (K,) float64; the entries of committed subsets mean
        nothing."""
        self.evaluations += self.subsets
        state = self.scatter, self.mean, self.count, self.anchor
        return grown_log_dets(self.pool, self.groups, *state, self.alpha, self.anchor == 0.0)

    def judge(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Log-determinants (K,) float64, and which of them count (K,) bool: every subset that `rule` could take is among
        these."""
        return self.score().cpu().numpy(), self.free

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
