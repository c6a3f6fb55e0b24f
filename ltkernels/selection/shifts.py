"""Engine C: fixed shifts and Chebyshev interpolation, for wide features and long runs.

The ridge s = n+ / alpha of A = s I + T changes every step, and a full-rank change has no cheap update. For a fixed shift
sigma there is one: when T grows by Y'^T Y', with V = M^-1 Y'^T and S = I + Y' V,

    M^-1 <- M^-1 - V S^-1 V^T,      X_c M^-1 X_c^T <- X_c M^-1 X_c^T - (X_c V) S^-1 (X_c V)^T,

at 2 d n' per row of the pool, with no d^2 in it. So M = sigma_j I + T is held at q Chebyshev nodes of a window [a, b]
and everything is interpolated at the s of each step and subset size. For 1 / (s + lambda) the relative error is
prod_j |s - sigma_j| / (sigma_j + lambda), at most 2 ((b/a - 1) / 4)^q for every eigenvalue lambda >= 0; q is chosen to
keep it at the rounding level, so picks are those of engine A. Past the window, everything is factored anew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..diversity import cholesky_log_det
from ..diversity._subsets import mixing, whitening
from .batched import BatchedEngine
from .gram import shifted_gram
from .problem import Problem

# Relative error of an interpolated quadratic form; a log-determinant of size n' is off by at most n' times it.
PRECISION = 2e-13
# Widest window, as b / a: wider ones need more nodes than they save factorisations.
WIDEST = (1.05, 1.1, 1.25, 1.5)


def nodes_for(ratio: float) -> int:
    """Nodes that a window of b / a = ratio needs."""
    if ratio <= 1.0:
        return 1
    return max(1, math.ceil(math.log(PRECISION / 2.0) / math.log((ratio - 1.0) / 4.0)))


def plan_window(width: int, total: int, size: int, begin: float, end: float, steps: int) -> tuple[float, int, float]:
    """(ratio, nodes, multiply-adds of the run) of the cheapest windows between ridges `begin` and `end`."""
    best = (math.inf, 1.0, 1)
    for ratio in WIDEST:
        ratio = min(ratio, end / begin)
        q = nodes_for(ratio)
        windows = max(1, math.ceil(math.log(end / begin) / math.log(ratio))) if ratio > 1.0 else 1
        factors = windows * q * (width**3 + width**2 * total)
        updates = steps * q * (2 * width**2 * size + width * (size + 1) * total)
        best = min(best, (factors + updates, ratio, q))
    return best[1], best[2], best[0]


class ShiftEngine(BatchedEngine):
    name = "C"

    def begin(self) -> None:
        self.scatter = torch.stack([p.start.scatter for p in self.problems])
        uniform = self.problems[0].uniform
        count = max(len(p.joining) for p in self.problems)
        sizes = [self.largest] * count if uniform else sorted(self.problems[0].joining)
        self.smallest = sizes[0]
        self.most = [0, *torch.tensor(sizes[::-1]).cumsum(0).tolist()]
        self.starts = [float(p.start.count) for p in self.problems]
        self.until = -1  # the window's last step
        self.windows = 0

    def _refactor(self) -> None:
        """Opens the window that begins at this step."""
        longest = max(self.wanted)
        if self.problems[0].uniform:
            now = [n + self.step * self.largest for n in self.starts]
        else:
            now = self.count.tolist()  # sizes differ, so the counts depend on the picks: read once a window
        begin = [(n + self.smallest) / self.alpha for n in now]
        last = [(n + self.most[min(longest - self.step, len(self.most) - 1)]) / self.alpha for n in now]
        spread = max((n + self.largest) / (n + self.smallest) for n in now)
        lowest = min(range(self.runs), key=lambda r: begin[r])
        ratio, _, _ = plan_window(
            self.width, self.pool.shape[1], self.largest, begin[lowest], last[lowest], longest - self.step
        )
        ratio = max(ratio, spread)
        end = [max(min(a * ratio, b), a * spread) for a, b in zip(begin, last)]
        self.until = self.step
        while self.until + 1 < longest and all(
            (n + self.most[self.until + 1 - self.step] + self.largest) / self.alpha <= b for n, b in zip(now, end)
        ):
            self.until += 1
        end = [
            (n + self.most[self.until - self.step] + self.largest) / self.alpha for n in now
        ]  # no wider than the steps that it serves
        q = max(nodes_for(b / a) for a, b in zip(begin, end))
        self.windows += 1
        points = torch.cos(math.pi * (2.0 * torch.arange(q, dtype=torch.float64, device=self.device) + 1.0) / (2 * q))
        a, b = self._vector(begin)[:, None], self._vector(end)[:, None]
        self.nodes = (a + b) / 2.0 + (b - a) / 2.0 * points if q > 1 else a  # (R, q)
        inverses, log_dets, by_node = [], [], []
        for j in range(q):
            lower, common = whitening(self.scatter, self.nodes[:, j])
            inverses.append(lower.mT @ lower)
            log_dets.append(common + self.width * self.nodes[:, j].log())
            forms = []
            for group in self.groups:
                white = self.pool[:, group.rows.reshape(-1)] @ lower.mT
                white = white.reshape(self.runs, *group.rows.shape, self.width)
                forms.append(white @ white.mT)
            by_node.append(forms)
        self.inverse = torch.stack(inverses, 1)  # (R, q, d, d)
        self.log_dets = torch.stack(log_dets, 1)
        self.forms = [torch.stack(parts, 1) for parts in zip(*by_node)]  # per size (R, q, k, s, s)

    def _weights(self, ridge: Tensor) -> Tensor:
        """Lagrange weights (R, q) of the nodes at `ridge` (R,)."""
        q = self.nodes.shape[1]
        gaps = self.nodes[:, :, None] - self.nodes[:, None, :]
        eye = torch.eye(q, dtype=torch.bool, device=self.device)
        shares = (ridge[:, None, None] - self.nodes[:, None, :]) / gaps.masked_fill(eye, 1.0)
        return shares.masked_fill(eye, 1.0).prod(2)

    def score(self) -> Tensor:
        if self.step > self.until:
            self._refactor()
        turned = (self.inverse @ self.mean[:, None, :, None])[..., 0]  # (R, q, d)
        along = self.pool @ turned.mT  # (R, P, q)
        square = (turned * self.mean[:, None]).sum(2)
        out = self.pool.new_full((self.runs, self.subsets), torch.nan)
        for group, forms in zip(self.groups, self.forms):
            ridge = (self.count + group.size) / self.alpha
            weights = self._weights(ridge)
            flat = (weights[:, None] @ forms.flatten(2))[:, 0].reshape(self.runs, *forms.shape[2:])
            e = (along @ weights[:, :, None])[:, :, 0][:, group.rows]
            keep, h = mixing(group.size, self.anchor)
            inner = shifted_gram(flat, e, (square * weights).sum(1), group.size, keep, h)
            inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
            common = (self.log_dets * weights).sum(1) - self.width * ridge.log()
            out[:, group.ids] = common[:, None] + cholesky_log_det(inner)
        return out

    def grow(self, mixed: Tensor) -> None:
        self.scatter.baddbmm_(mixed.mT, mixed)
        if self.step >= self.until:
            return  # the next step factors anew
        right = self.inverse @ mixed.mT[:, None]  # V (R, q, d, S)
        small = mixed[:, None] @ right
        small.diagonal(dim1=-2, dim2=-1).add_(1.0)
        factor, _ = torch.linalg.cholesky_ex(small)
        self.log_dets += 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        right = torch.linalg.solve_triangular(factor, right.mT, upper=False).mT  # V L^-T
        self.inverse -= right @ right.mT
        for i, group in enumerate(self.groups):
            columns = self.pool[:, None, group.rows.reshape(-1)] if len(self.groups) > 1 else self.pool[:, None]
            turned = (columns[:, :, : group.rows.numel()] @ right).reshape(
                self.runs, right.shape[1], *group.rows.shape, -1
            )
            self.forms[i] -= turned @ turned.mT

    def stats(self, run: int) -> dict[str, Any]:
        return {**super().stats(run), "windows": self.windows, "nodes": self.nodes.shape[1]}

    @classmethod
    def bytes_for(cls, problem: Problem, steps: int) -> int:
        total, d = problem.rows.shape
        q = nodes_for(WIDEST[-1])
        return 8 * (q * (2 * d * d + 3 * total * problem.largest) + 3 * total * d + 2 * d * d)
