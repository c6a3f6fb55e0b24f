"""Engine B: Gram space, for fewer samples than features.

With the scatter T = F^T F of n rows F (centred originals, then the Y'^T of every committed subset), s = n+ / alpha:

    A^-1 = (s I + F^T F)^-1 = (I - F^T (s I + F F^T)^-1 F) / s,       log det A - d log s = log det(I_n + F F^T / s).

So a step factors an n x n matrix, whitens F X^T (n, P), and never sees d again: F F^T and F X^T grow by the rows of the
subset just taken, at a cost of d times the pool. Exact like engine A, and n^2 P in place of d^2 P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diversity import cholesky_log_det, mixed_columns
from ..diversity._subsets import mixing, whitening
from .batched import BatchedEngine
from .problem import Problem


def shifted_gram(block: Tensor, along: Tensor, square: Tensor, size: int, mean_keep: Tensor, h: Tensor) -> Tensor:
    """Y' M Y'^T of subsets, from D = X M X^T (R, k, s, s), e = X M mean (R, k, s) and c = mean^T M mean (R,), for
    Y' = X - 1 (keep mean + h X^T 1)^T."""
    keep, h = mean_keep[:, None, None], h[:, None, None]
    row_sums = block.sum(-1)
    p = keep * along + h * row_sums
    v = (
        keep[..., 0] ** 2 * square[:, None]
        + 2.0 * (keep * h)[..., 0] * along.sum(-1)
        + (h**2)[..., 0] * row_sums.sum(-1)
    )
    return block - p[..., :, None] - p[..., None, :] + v[..., None, None]


class GramEngine(BatchedEngine):
    name = "B"

    def begin(self) -> None:
        counts = [p.start.rows.shape[0] for p in self.problems]
        most, room = max(counts), max(counts) + max(self.wanted) * self.largest
        total = self.pool.shape[1]
        self.filled = most
        self.frame = self.pool.new_zeros(self.runs, room, self.width)  # F
        for r, p in enumerate(self.problems):
            self.frame[r, : counts[r]] = p.start.rows  # fewer than `most`: rows of zeros change nothing
        self.across = self.pool.new_zeros(self.runs, room, total)  # F X^T
        self.inner = self.pool.new_zeros(self.runs, room, room)  # F F^T
        frame = self.frame[:, :most]
        torch.matmul(frame, self.pool.mT, out=self.across[:, :most])
        self.inner[:, :most, :most] = frame @ frame.mT
        self.blocks = []
        for group in self.groups:
            columns = self.pool[:, group.rows]
            self.blocks.append(columns @ columns.mT)

    def score(self) -> Tensor:
        n = self.filled
        along = (self.pool @ self.mean[:, :, None])[:, :, 0]
        square = self.mean.square().sum(1)
        framed = (self.frame[:, :n] @ self.mean[:, :, None])[:, :, 0]
        out = self.pool.new_full((self.runs, self.subsets), torch.nan)
        for group, block in zip(self.groups, self.blocks):
            ridge = (self.count + group.size) / self.alpha
            inverse, common = whitening(self.inner[:, :n, :n], ridge)
            every = group.rows.reshape(-1)
            source = self.across[:, :n] if len(self.groups) == 1 else self.across[:, :n, every]
            white = (inverse @ source[:, :, : every.shape[0]]).mT
            white = white.reshape(self.runs, *group.rows.shape, n)
            white = mixed_columns(white, (inverse @ framed[:, :, None])[:, :, 0], self.anchor)
            keep, h = mixing(group.size, self.anchor)
            whole = shifted_gram(block, along[:, group.rows], square, group.size, keep, h)
            inner = (whole - white @ white.mT) / ridge[:, None, None, None]
            inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
            out[:, group.ids] = common[:, None] + cholesky_log_det(inner)
        return out

    def grow(self, mixed: Tensor) -> None:
        n, end = self.filled, self.filled + mixed.shape[1]
        self.frame[:, n:end] = mixed
        self.across[:, n:end] = mixed @ self.pool.mT
        cross = self.frame[:, :end] @ mixed.mT
        self.inner[:, :end, n:end] = cross
        self.inner[:, n:end, :end] = cross.mT
        self.filled = end

    @classmethod
    def bytes_for(cls, problem: Problem, steps: int) -> int:
        total, d = problem.rows.shape
        room = problem.start.rows.shape[0] + steps * problem.largest
        return 8 * (room * (d + 2 * total + 3 * room) + total * (d + 3 * problem.largest))


def gram_samples(problems: Sequence[Problem], steps: int) -> int:
    """n at the end of the longest run: what engine B factors."""
    return max(p.start.rows.shape[0] + steps * p.largest for p in problems)
