"""Narrow features on the CPU: all steps of a run in one C++ call (csrc/cpu/greedy.h), several runs side by
side.

Scores are float32 where that settles the choice: each comes with a bound on its error that holds for any rounding, and
what the bounds leave open is scored again in float64. The picks are those of float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._native import _C
from .._rules import MODES, Rule
from .._subsets import Problem

# Steps between two looks at Ctrl-C and at how much float32 left open.
CHUNK = 64
# float32 is given up where more than this share of its scores had to be computed again, and not tried where the condition
# number of I + alpha C is above the second: its bounds would settle nothing.
_OPEN, _KAPPA = 0.25, 1e3


class _Layout:
    """What the C++ loop reads and never changes: made once for a pool."""

    def __init__(self, problem: Problem) -> None:
        groups = problem.groups
        self.offsets = torch.tensor(problem.bounds)
        self.group_size = torch.tensor([group.size for group in groups])
        counts = torch.tensor([group.ids.shape[0] for group in groups])
        self.group_begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        member = torch.arange(problem.subsets).repeat_interleave(self.offsets.diff())
        squares = torch.zeros(problem.subsets, dtype=torch.float64)
        squares.index_add_(0, member, torch.linalg.vector_norm(problem.rows, dim=1).square_())
        # A little more than the norm: the error bound must survive the rounding of the norm itself.
        self.norms = squares.sqrt_().mul_(1.0 + 1e-12)
        self.group_packed, self.packed = {}, {}
        for single in (False, True):
            sizes = [_C.greedy_packed(problem.width, g.ids.shape[0], g.size, single) for g in groups]
            self.group_packed[single] = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
            self.packed[single] = sum(sizes)
        scatter = problem.start.scatter
        # Of I + alpha C; the smallest eigenvalue of that is at least 1.
        self.kappa = 1.0 + problem.alpha * float(torch.linalg.eigvalsh(scatter)[-1]) / problem.start.count
        self.scatter = scatter
        # The packs of the whole pool, by precision: a run starts from a copy.
        self.packs: dict[bool, Tensor] = {}


class Run:
    """One greedy run; `picked` and `values` hold what is done so far."""

    name = "full"

    def __init__(self, problem: Problem, rule: Rule, steps: int, *, single: bool | None = None) -> None:
        self.problem, self.rule, self.steps = problem, rule, steps
        problem.layout = problem.layout or _Layout(problem)
        self.layout: _Layout = problem.layout
        self.picked_buffer = torch.empty(steps, dtype=torch.int64)
        self.values_buffer = torch.empty(steps, dtype=torch.float64)
        self.scatter, self.mean = self.layout.scatter.clone(), problem.start.mean.clone()
        self.count, self.anchor = float(problem.start.count), problem.start.anchor
        self.made, self.scored, self.decided = 0, 0, 0
        self.finished = False
        self.scratch = torch.empty(0, dtype=torch.float64)
        self.reason = ""
        if single is None:
            single = self.layout.kappa <= _KAPPA
            if not single:
                self.reason = f" (condition number {self.layout.kappa:.2g}, above {_KAPPA:.0e})"
        self._attach(single)

    @property
    def picked(self) -> list[int]:
        return self.picked_buffer[: self.made].tolist()

    @property
    def values(self) -> list[float]:
        return self.values_buffer[: self.made].tolist()

    def _attach(self, single: bool) -> None:
        """A new job at the present state, in float32 or float64."""
        problem, layout = self.problem, self.layout
        free = torch.ones(problem.subsets, dtype=torch.bool)
        free[self.picked_buffer[: self.made]] = False
        self.ids = torch.cat([torch.cat([g.ids[free[g.ids]], g.ids[~free[g.ids]]]) for g in problem.groups])
        self.left = torch.tensor([int(free[g.ids].sum()) for g in problem.groups])
        dtype = torch.float32 if single else torch.float64
        self.single = single
        self.job = _C.Greedy(problem.width, problem.subsets, len(problem.groups), single, problem.alpha)
        self.job.pool(
            problem.rows.data_ptr(),
            layout.offsets.data_ptr(),
            problem.group_of.data_ptr(),
            layout.group_size.data_ptr(),
            layout.group_begin.data_ptr(),
            layout.group_packed[single].data_ptr(),
            layout.norms.data_ptr(),
        )
        rule = self.rule
        self.job.rule(MODES.index(rule.mode), rule.q, rule.low, rule.high, rule.tie, rule.stop)
        whole = self.made == 0 and single in layout.packs
        self.packs = layout.packs[single].clone() if whole else torch.empty(layout.packed[single], dtype=dtype)
        self._state()
        if not whole:
            self.job.pack()
            if self.made == 0:
                layout.packs[single] = self.packs.clone()

    def _state(self) -> None:
        self.job.state(
            self.ids.data_ptr(),
            self.left.data_ptr(),
            self.packs.data_ptr(),
            self.scatter.data_ptr(),
            self.mean.data_ptr(),
            self.count,
            self.anchor,
            self.scratch.data_ptr(),
        )

    def prepare(self, steps: int, threads: int) -> None:
        """Points the job at its next steps."""
        p = self.problem
        need = _C.greedy_scratch(p.width, p.subsets, len(p.groups), p.largest, threads)
        if self.scratch.numel() < need:
            self.scratch = torch.empty(need, dtype=torch.float64)
            self._state()
        steps = min(steps, self.steps - self.made)
        self.job.steps(steps, self.picked_buffer[self.made :].data_ptr(), self.values_buffer[self.made :].data_ptr())
        self.wanted = steps

    def collect(self) -> None:
        """Takes over what the job did."""
        job = self.job
        self.made += job.done
        self.count, self.anchor = job.count, job.anchor
        if job.done < self.wanted and not (job.done and self.rule.stops(float(self.values_buffer[self.made - 1]))):
            raise ValueError(f"the log-determinants of step {self.made + 1} are not finite; scale the features down")
        self.finished = self.made == self.steps or job.done < self.wanted
        self.finished = self.finished or (self.made > 0 and self.rule.stops(float(self.values_buffer[self.made - 1])))
        self.scored, self.decided = self.scored + job.scored, self.decided + job.decided
        if self.single and not self.finished and job.decided > _OPEN * job.scored:
            self.reason = " (float32 left too much open)"
            self._attach(False)

    def stats(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "evaluations": self.scored + self.decided,
            "scores": "float32, decided in float64" if self.single else f"float64{self.reason}",
        }


def run_all(runs: Sequence[Run], report: Callable[[int], None] = lambda made: None) -> None:
    """Brings every run to its end, a chunk of steps at a time; `report` gets the steps made, of all runs."""
    threads = torch.get_num_threads()
    while open_runs := [run for run in runs if not run.finished]:
        inner = threads if len(open_runs) == 1 else 1
        for run in open_runs:
            run.prepare(CHUNK, inner)
        _C.greedy_runs([run.job for run in open_runs], threads)
        for run in open_runs:
            run.collect()
        report(sum(run.steps if run.finished else run.made for run in runs))
