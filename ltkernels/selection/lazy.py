"""Engine "lazy": engine A that scores a candidate only when certified bounds on its score do not settle the matter.

FDG is neither submodular nor monotone, so the textbook lazy greedy (a stale score as an upper bound) picks wrong
subsets. What is certain is this. Split a candidate's score into the part of its centred columns W and the part of its
mean's distance from the current mean,

    J = a + log(1 + w^2 r^2),   a = log det(I + W^T A^-1 W),   r = |mean_c - mean| in the norm of (A + W W^T)^-1,   w^2
    = n n_c / (n + n_c).

A only grows, A' = A + growth I + Y'Y'^T, so a and every norm only fall: a stale a is an upper bound, and r rises by at
most the norm of what the current mean has moved since. Below, A' <= kappa A with kappa = 1 + growth / ridge +
lambda_max(Y'^T A^-1 Y'), so r' >= r / sqrt(kappa) - |move|, and a' >= (n_c - 1) log(1 + (exp(a / (n_c - 1)) - 1) /
kappa), the sum over the n_c - 1 eigenvalues being smallest when they are equal. Candidates are scored in batches, most
promising first, until no bound reaches the best score. Where subset sizes differ, the smallest ridge of all bounds the
moves and kappa, and each size's own log det A, which is exact, is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..diversity import Start, mixed_columns
from .engines import Factor, PackedEngine
from .packs import LANES, Packs
from .rules import Rule, choose, least_loss

# Candidates scored together: two packs, enough to keep two cores busy.
BATCH = 2 * LANES
# Rounding of a computed score, added to every bound; scores of 500 features agree between engines to about 1e-12.
SLACK = 1e-11


class LazyEngine(PackedEngine):
    """Certified lazy evaluation on the CPU, for max, min and target; the quantile needs every score and gets it."""

    name = "lazy"

    def __init__(self, start: Start, pool: Tensor, offsets: Sequence[int], alpha: float) -> None:
        super().__init__(start, pool, offsets, alpha)
        self.sizes = np.diff(np.asarray(offsets)).astype(np.float64)
        # Bounds on a and r of every candidate, before anything is known.
        self.a_high = np.full(self.subsets, np.inf)
        self.a_low = np.zeros(self.subsets)
        self.r_high = np.full(self.subsets, np.inf)
        self.r_low = np.zeros(self.subsets)
        self.move: Tensor | None = None
        self.step_factor: Factor | None = None
        self.group_ids = self.group_of.numpy()

    def _squared_norms(self, f: Factor, columns: Tensor) -> Tensor:
        """Columns (d, k) whitened by the A of the smallest ridge, the largest of the inverses."""
        whitened = f.basis @ columns
        return whitened if f.scales is None else whitened * f.scales[0][:, None]

    def _leverage(self) -> np.ndarray:
        """w^2 of every candidate."""
        return self.sizes * (1.0 - self.sizes / (self.anchor + self.sizes))

    def _measure(self, f: Factor, ids: Tensor, values: np.ndarray) -> None:
        """Scores the candidates `ids` exactly, into `values`, and resets their bounds."""
        wanted = torch.zeros(self.subsets, dtype=torch.bool)
        wanted[ids] = True
        packs = Packs(self.pool, self.select(wanted)) if 2 * ids.shape[0] < self.packed else self.packs
        self.evaluations += packs.ids.shape[0]
        scores, inner = packs.score(f.basis, f.lower, f.scales, f.basis @ self.mean, self.anchor, within=True)
        at = packs.ids.numpy()
        a, j = inner.numpy(), scores.numpy()
        values[at] = j + self._commons[at]
        leverage = self._leverage()[at]
        if math.isinf(self.anchor):
            # "none": nothing is centred, so the whole score behaves as a does.
            self.a_high[at] = self.a_low[at] = j
            self.r_high[at] = self.r_low[at] = 0.0
            return
        self.a_high[at] = self.a_low[at] = a
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.expm1(np.maximum(j - a, 0.0))
            # w = 0 (first "separate" step) tells nothing about r.
            self.r_high[at] = np.where(leverage > 0.0, np.sqrt((spread + SLACK) / leverage), np.inf)
            self.r_low[at] = np.where(leverage > 0.0, np.sqrt(np.maximum(spread - SLACK, 0.0) / leverage), 0.0)

    def pick(self, rule: Rule) -> tuple[int, float]:
        if rule.mode == "quantile":
            return super().pick(rule)
        if self.left < 0.75 * self.packed:
            self._pack()
        f = self.step_factor = self.factor()
        self._commons = f.commons.numpy()[self.group_ids]
        if self.move is not None:
            moved = float(torch.linalg.vector_norm(self._squared_norms(f, self.move[:, None]))) * (1.0 + SLACK)
            self.r_high += moved
            self.r_low = np.maximum(self.r_low - moved, 0.0)
        leverage = np.zeros(self.subsets) if math.isinf(self.anchor) else self._leverage()
        with np.errstate(invalid="ignore"):
            # 0 * inf: w = 0 leaves only a.
            high = self.a_high + np.where(leverage > 0.0, np.log1p(leverage * self.r_high**2), 0.0)
        low = self.a_low + np.log1p(leverage * self.r_low**2)
        slack = SLACK * (1.0 + np.abs(self._commons))
        bound = least_loss(low + self._commons - slack, high + self._commons + slack, rule)
        free = self.free.numpy()
        bound[~free] = np.inf
        order = np.argsort(bound, kind="stable")[: self.left]
        values = np.full(self.subsets, np.nan)
        best, done = np.inf, 0
        while done < self.left and bound[order[done]] <= best + rule.tie:
            # With half of the pool scored, the rest is cheaper in one go.
            count = BATCH if bound[order[done]] > -np.inf and 2 * done < self.left else self.left
            batch = order[done : done + count]
            self._measure(f, torch.from_numpy(batch), values)
            best = min(best, least_loss(values[batch], values[batch], rule).min())
            done += batch.shape[0]
        scored = torch.from_numpy(~np.isnan(values)) & self.free
        picked = choose(torch.from_numpy(values), scored, rule)
        return picked, float(values[picked])

    def commit(self, subset: int) -> None:
        f, before, count = self.step_factor, self.mean.clone(), self.count
        if f is not None:
            # kappa bounds A' / A, by the smallest ridge.
            mixed = mixed_columns(self.rows(subset), self.mean, self.anchor)
            white = self._squared_norms(f, mixed.T)
            largest = (
                float(torch.linalg.eigvalsh(white.T @ white)[-1]) if white.shape[1] > 1 else float(white.square().sum())
            )
            kappa = (1.0 + self.sizes[subset] / (count + self.sizes.min()) + largest) * (1.0 + SLACK)
            rank = self.sizes if math.isinf(self.anchor) else np.maximum(self.sizes - 1.0, 1.0)
            self.a_low = rank * np.log1p(np.expm1(self.a_low / rank) / kappa)
            self.r_low /= math.sqrt(kappa)
        super().commit(subset)
        self.move = None if math.isinf(self.anchor) else self.mean - before
