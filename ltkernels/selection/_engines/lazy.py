"""Engine "lazy": the engine of single steps that scores a candidate only when certified bounds on its score do not settle the matter.

FDG is neither submodular nor monotone, so the textbook lazy greedy (a stale score as an upper bound) picks wrong
subsets. What is certain is this. Split a candidate's score into the part of its centred columns W and the part of its
mean's distance from the current mean, delta = mean_c - mean,

    J = a + log(1 + w^2 r^2),  a = log det(I + W^T A^-1 W),  r^2 = delta^T M delta,  M = (A + W W^T)^-1,
    w^2 = n n_c / (n + n_c).

*From above.* A only grows, A' = A + growth I + Y'Y'^T, so a falls and M falls: with the M of the last scoring and e =
minus what the mean has moved since, r'^2 <= r^2 + 2 e^T g + e^T M e, where g = M delta is kept per candidate. The
second term is exact, the third is of second order and bounded by the length of the moves. (Without g, the triangle
inequality gives (r + |moves|)^2, which lets several times as many candidates through; the smaller of both is taken.)

*From below.* A' <= kappa A with kappa = 1 + growth / ridge + lambda_max(Y'^T A^-1 Y'), so r'^2 >= (r^2 + 2 e^T g) /
kappa and a' >= (n_c - 1) log(1 + (exp(a / (n_c - 1)) - 1) / kappa): the sum over the n_c - 1 eigenvalues is smallest
when they are equal.

Candidates are scored in batches, most promising first, until no bound reaches the best score. Where subset sizes
differ, the smallest ridge of all bounds the moves and kappa, and each size's own log det A, which is exact, is added.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..._features import cholesky_log_det
from .._rules import Rule, least_loss
from .._subsets import Problem, mixed_columns
from .steps import StepEngine

# Candidates scored together. Twice as many cost little more: the triangular solve runs over all their columns at once.
BATCH = 16
# Added to every bound for the rounding of scores, which agree between engines to about 1e-12.
SLACK = 1e-11
# Whitened columns held at a time while the whole pool is scored, in doubles (32 MB).
_CHUNK = 1 << 22


class LazyEngine(StepEngine):
    """Certified lazy evaluation on the CPU, for max, min and target; the quantile needs every score and gets it."""

    name = "lazy"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        count, width = self.subsets, problem.width
        self.sizes = np.diff(np.asarray(problem.bounds)).astype(np.float64)
        self.group_of = problem.group_of.numpy()
        # Of each candidate at its last scoring: a, r^2, g, mean . g, the length of all moves and log kappa up to then.
        self.known = np.zeros(count, dtype=bool)
        self.a, self.r2, self.mean_g = np.zeros(count), np.zeros(count), np.zeros(count)
        self.g = torch.zeros(count, width, dtype=torch.float64)
        self.path_then, self.stretched_then, self.log_kappa_then = np.zeros(count), np.zeros(count), np.zeros(count)
        # Now: sum of |move| in the norm after it, sum of sqrt(kappa) |move| in the norm before it, and log kappa.
        self.path, self.stretched, self.log_kappa = 0.0, 0.0, 0.0
        self.move: Tensor | None = None
        self.factored = False  # whether A of the present state is

    def prepare(self) -> None:
        """A of this step, factored; scores need triangular solves over a few columns only, so there is no inverse."""
        ridges = torch.tensor([(self.count + group.size) / self.alpha for group in self.groups], dtype=torch.float64)
        if len(ridges) == 1:
            matrix = self.scatter.clone()
            matrix.diagonal().add_(ridges)
            self.lower = torch.linalg.cholesky(matrix)
            commons = 2.0 * self.lower.diagonal().log().sum() - self.problem.width * ridges.log()
        else:  # the eigenvectors of T serve every ridge
            values, vectors = torch.linalg.eigh(self.scatter)
            values.clamp_(min=0.0)  # T is positive semi-definite; rounding puts its zeros at about -1e-16
            self.basis, self.scales = vectors.T.contiguous(), torch.rsqrt(values + ridges[:, None])
            commons = torch.log1p(values / ridges[:, None]).sum(1)
        self.commons = commons.numpy()[self.group_of]
        self.factored = True
        # One solve for both: a triangular solve of a single column costs as much as one of ten.
        move = self.mean if self.move is None else self.move
        self.white_mean, self.white_move = self.whiten(torch.stack([self.mean, move]))

    def whiten(self, rows: Tensor, group: int = 0) -> Tensor:
        """Rows (k, d) in coordinates where A of a size group is I; group 0 has the smallest ridge, so the largest
        norms."""
        if len(self.groups) == 1:
            return torch.linalg.solve_triangular(self.lower, rows.T, upper=False).T
        return rows @ self.basis.T * self.scales[group]

    def unwhiten(self, rows: Tensor, group: int) -> Tensor:
        """The transposed map, so that (whitened x) . y = x . unwhiten(y)."""
        if len(self.groups) == 1:
            return torch.linalg.solve_triangular(self.lower.T, rows.T, upper=True).T
        return (rows * self.scales[group]) @ self.basis

    def leverage(self) -> np.ndarray:
        """w^2 of every candidate."""
        if math.isinf(self.anchor):
            return np.zeros(self.subsets)
        return self.sizes * (1.0 - self.sizes / (self.anchor + self.sizes))

    def measure(self, wanted: np.ndarray, values: np.ndarray) -> None:
        """Scores the candidates `wanted` (ids) exactly, into `values`, and remembers what their bounds need."""
        self.evaluations += wanted.shape[0]
        mask = torch.zeros(self.subsets, dtype=torch.bool)
        mask[torch.from_numpy(wanted)] = True
        for group, (size, ids, rows) in enumerate(self.groups):
            keep = mask[ids]
            step = max(1, _CHUNK // (size * self.pool.shape[1]))
            for part, part_rows in zip(ids[keep].split(step), rows[keep].split(step)):
                if len(part):
                    self._measure_group(group, size, part, part_rows, values)

    def _measure_group(self, group: int, size: int, ids: Tensor, rows: Tensor, values: np.ndarray) -> None:
        count, at = ids.shape[0], ids.numpy()
        columns = self.whiten(self.pool[rows.reshape(-1)], group).reshape(count, size, -1)
        centred = columns if math.isinf(self.anchor) else columns - columns.mean(1, keepdim=True)
        inner = centred @ centred.mT
        inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
        self.a[at] = cholesky_log_det(inner).numpy()
        values[at] = self.commons[at] + self.a[at]
        self.known[at] = True
        self.log_kappa_then[at] = self.log_kappa
        if math.isinf(self.anchor):
            return  # "none": nothing is centred, so the whole score behaves as a does
        # Sizes differ in their ridge: the mean in group 0's coordinates, scaled to this one's.
        white_mean = self.white_mean if group == 0 else self.white_mean * (self.scales[group] / self.scales[0])
        delta = columns.mean(1) - white_mean
        solved = torch.cholesky_solve(centred @ delta[:, :, None], torch.linalg.cholesky(inner))
        g = delta - (centred.mT @ solved).squeeze(2)
        self.r2[at] = (delta * g).sum(1).clamp_min(0.0).numpy()
        self.g[ids] = self.unwhiten(g, group)
        self.mean_g[at] = (self.g[ids] @ self.mean).numpy()
        self.path_then[at], self.stretched_then[at] = self.path, self.stretched
        values[at] += np.log1p(self.leverage()[at] * self.r2[at])

    def extend_path(self) -> None:
        """Adds the last move of the mean to the path, in the norm of the A that `prepare` has just factored."""
        if self.move is not None:
            self.path += float(torch.linalg.vector_norm(self.white_move)) * (1.0 + SLACK)
            self.move = None

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of every candidate's log-determinant."""
        leverage = self.leverage()
        kappa = np.exp(self.log_kappa - self.log_kappa_then)
        linear = self.r2 + 2.0 * (self.mean_g - (self.g @ self.mean).numpy())
        rounding = SLACK * (1.0 + np.abs(self.mean_g) + self.r2)
        moved = self.path - self.path_then
        stretched = (self.stretched - self.stretched_then) * np.exp(-0.5 * self.log_kappa_then)
        above = np.minimum(np.maximum(linear + stretched**2, 0.0), (np.sqrt(self.r2) + moved) ** 2) + rounding
        below = np.maximum(linear - rounding, 0.0) / kappa
        below = np.maximum(below, np.maximum(np.sqrt(self.r2 / kappa) - moved, 0.0) ** 2 - rounding)
        rank = self.sizes if math.isinf(self.anchor) else np.maximum(self.sizes - 1.0, 1.0)
        a_low = rank * np.log1p(np.expm1(self.a / rank) / kappa)
        slack = SLACK * (1.0 + np.abs(self.commons))
        high = np.where(self.known, self.commons + self.a + np.log1p(leverage * above) + slack, np.inf)
        low = np.where(self.known, self.commons + a_low + np.log1p(leverage * np.maximum(below, 0.0)) - slack, 0.0)
        return low, high

    def judge(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        if rule.mode == "quantile":
            return super().judge(rule)
        self.prepare()
        self.extend_path()
        low, high = self.bounds()
        bound = least_loss(low, high, rule)
        bound[~self.free] = np.inf
        order = np.argsort(bound, kind="stable")[: self.left]
        values = np.full(self.subsets, np.nan)
        best, done = np.inf, 0
        while done < self.left and bound[order[done]] <= best + rule.tie:
            # Unknown candidates, and the rest once half of the pool has been scored, are cheaper in one go.
            batch = order[done : done + (BATCH if self.known[order[done]] and 2 * done < self.left else self.left)]
            self.measure(batch, values)
            best = min(best, least_loss(values[batch], values[batch], rule).min())
            done += batch.shape[0]
        return values, ~np.isnan(values)

    def join(self, rows: Tensor) -> None:
        before, count = self.mean.clone(), self.count
        mixed = mixed_columns(rows, self.mean, self.anchor)
        super().join(rows)
        if not self.factored:
            self.known[:] = False  # nothing was scored this step, so no bound can follow it
            return
        self.factored = False
        if not math.isinf(self.anchor):
            self.move = self.mean - before
        # kappa bounds A' / A, by the smallest ridge.
        white = self.whiten(mixed if self.move is None else torch.cat([mixed, self.move[None]]))
        part = white[: mixed.shape[0]]
        small = part @ part.T if part.shape[0] < part.shape[1] else part.T @ part
        largest = float(torch.linalg.eigvalsh(small)[-1])
        growth = rows.shape[0] / (count + self.sizes.min())
        if self.move is not None:
            length = float(torch.linalg.vector_norm(white[-1]))
            self.stretched += math.exp(0.5 * self.log_kappa) * length * (1.0 + SLACK)
        self.log_kappa += math.log1p((growth + largest) * (1.0 + SLACK))
