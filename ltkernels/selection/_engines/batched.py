"""Many independent runs at once, in torch operations on any device, with no host synchronisation in the
loop: runs (classes x seeds x modes) fill a GPU that a single one at d = 64 leaves idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._rules import MODES, Rule
from .._subsets import Problem, SizeGroup, grown_log_dets, mixing


def stack_key(problem: Problem) -> tuple[Any, ...]:
    """Problems of equal keys may run in one batch: one size for all subsets, or the very same offsets."""
    sizes = problem.groups[0].size if len(problem.groups) == 1 else tuple(problem.bounds)
    return problem.width, str(problem.rows.device), problem.alpha, sizes


class BatchedEngine:
    """R runs; leading dimension R everywhere. Where a run has fewer subsets than another, the rest are never free."""

    name = "full"

    def __init__(self, problems: Sequence[Problem], rules: Sequence[Rule], steps: Sequence[int]) -> None:
        first = problems[0]
        self.problems, self.wanted = problems, list(steps)
        self.alpha, self.width, self.device = first.alpha, first.width, first.rows.device
        self.runs, self.subsets = len(problems), max(p.subsets for p in problems)
        self.largest = first.largest
        longest = max(problems, key=lambda p: p.subsets)
        self.groups: list[SizeGroup] = longest.groups
        if all(p is first for p in problems):
            self.pool = first.rows.expand(self.runs, -1, -1)
        else:
            total = longest.rows.shape[0]
            self.pool = first.rows.new_zeros(self.runs, total, self.width)
            for r, p in enumerate(problems):
                self.pool[r, : p.rows.shape[0]] = p.rows
        self.mean = torch.stack([p.start.mean for p in problems])
        self.count = self._vector([float(p.start.count) for p in problems])
        self.anchor = self._vector([p.start.anchor for p in problems])
        self.alone = any(p.start.anchor == 0.0 for p in problems)
        left = torch.tensor([p.subsets for p in problems], device=self.device)
        self.left = left.to(torch.float64)
        self.free = torch.arange(self.subsets, device=self.device) < left[:, None]
        self.run_ids = torch.arange(self.runs, device=self.device)
        # Rows of each subset, padded to the largest size, and which of these are real.
        sizes = torch.tensor(longest.bounds, device=self.device).diff()
        places = torch.arange(self.largest, device=self.device)
        self.real = places < sizes[:, None]
        begins = torch.tensor(longest.bounds[:-1], device=self.device)[:, None]
        self.rows = torch.where(self.real, begins + places, 0)
        self.sizes = sizes.to(torch.float64)
        self.mode = torch.tensor([MODES.index(rule.mode) for rule in rules], device=self.device)[:, None]
        self.modes = {rule.mode for rule in rules}
        self.q, self.low, self.high, self.tie = (
            self._vector([getattr(rule, name) for rule in rules])[:, None] for name in ("q", "low", "high", "tie")
        )
        self.rules = rules
        self.scatter = torch.stack([p.start.scatter for p in problems])

    def _vector(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def score(self) -> Tensor:
        """log det(I + alpha T+ / n+) in nats, (R, K)."""
        state = self.scatter, self.mean, self.count, self.anchor
        return grown_log_dets(self.pool, self.groups, *state, self.alpha, self.alone)

    def choose(self, values: Tensor) -> Tensor:
        """The subset (R,) that each run's rule takes, ties to the lowest."""
        loss = torch.maximum(values - self.high, self.low - values).clamp_min(0.0)
        loss = torch.where(self.mode == MODES.index("max"), -values, loss)
        loss = torch.where(self.mode == MODES.index("min"), values, loss)
        if "quantile" in self.modes:
            ordered = values.masked_fill(~self.free, torch.inf).sort(1).values
            # A run of the batch that is at its end has no free subsets.
            rank = (self.q * (self.left[:, None] - 1.0) + 0.5).floor().long().clamp_min(0)
            loss = torch.where(self.mode == MODES.index("quantile"), (values - ordered.gather(1, rank)).abs(), loss)
        loss = loss.masked_fill(~self.free, torch.inf)
        best = loss.amin(1, keepdim=True)
        return (loss <= best + self.tie).to(torch.uint8).argmax(1)

    def commit(self, picked: Tensor) -> None:
        """Adds the subsets `picked` (R,): those rows of each that are `real`; the rest are zeros."""
        real, size = self.real[picked][:, :, None], self.sizes[picked]
        columns = self.pool[self.run_ids[:, None], self.rows[picked]] * real
        keep, h = mixing(size, self.anchor)
        moved = keep[:, None] * self.mean + h[:, None] * columns.sum(1)
        mixed = (columns - moved[:, None]) * real
        self.scatter.baddbmm_(mixed.mT, mixed)
        self.mean += (columns.sum(1) / size[:, None] - self.mean) * (size / (self.anchor + size))[:, None]
        self.anchor += size
        self.count += size
        self.left -= 1.0
        self.free[self.run_ids, picked] = False
        self.alone = False

    def run(self, report: Callable[[int], None] = lambda made: None) -> list[tuple[list[int], list[float]]]:
        """(picked, log-determinants) of each run. The device is read once, at the end; `report` gets the steps made, of all
        runs, as they are asked for."""
        longest = max(self.wanted)
        picks = torch.zeros(longest, self.runs, dtype=torch.int64, device=self.device)
        values = torch.zeros(longest, self.runs, dtype=torch.float64, device=self.device)
        for step in range(longest):
            scores = self.score()
            picked = self.choose(scores)
            picks[step], values[step] = picked, scores.gather(1, picked[:, None])[:, 0]
            self.commit(picked)
            report((step + 1) * self.runs)
        found, made = picks.cpu(), values.cpu()
        results = []
        for r, (rule, steps) in enumerate(zip(self.rules, self.wanted)):
            path = made[:steps, r].tolist()
            if not all(abs(value) < float("inf") for value in path):
                raise ValueError("log-determinants are not finite; scale the features down")
            steps = next((i + 1 for i, value in enumerate(path) if rule.stops(value)), steps)
            results.append((found[:steps, r].tolist(), path[:steps]))
        return results

    def stats(self, run: int) -> dict[str, Any]:
        return {
            "engine": self.name,
            "evaluations": self.problems[run].subsets * self.wanted[run],
            "scores": "float64",
        }
