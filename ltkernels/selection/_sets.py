"""Sets of subsets whose Feature Diversity Gains are uniformly spaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._features import check_count
from .._npz import write_npz
from ._checkpoint import fingerprint, read_checkpoint
from ._driver import Outcome, limit_of, run_all
from ._greedy import Selection, check_steps, make_rule, prepare, to_selection
from ._rules import Rule

_OF_A_SET = 1000  # bytes beside its picks and their values: records and their numbers


class UniformSets(NamedTuple):
    """What `uniform_fdg_sets` found.

    Attributes:
        selections: n_sets `Selection`, FDG rising.
        fdg: (n_sets,) float64, final FDG of each.
        targets: (n_sets,) float64, the uniformly spaced values aimed at; the ends are the greedy minimum and maximum.
        q: (n_sets,) float64, the quantile that gave each; NaN where a target-mode run came nearer.
        spacing_error: the largest |fdg - target|, in units of the spacing.
        runs: greedy runs made.
    """

    selections: list[Selection]
    fdg: Tensor
    targets: Tensor
    q: Tensor
    spacing_error: float
    runs: int


def uniform_fdg_sets(
    original: Any,
    candidates: Any,
    offsets: Tensor | Sequence[int],
    *,
    m: int,
    n_sets: int = 50,
    tol: float = 0.05,
    max_runs_per_set: int = 10,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
    memory_budget: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> UniformSets:
    """n_sets selections of m subsets whose final FDG are uniformly spaced between the greedy minimum and maximum.

    Always taking the q-quantile candidate gives a final FDG that rises with q, so each value is found by bisection over
    q, all values at a time: the runs of a round are independent and go in one batch. q is a dial with as many stops as
    subsets: where none is near enough, one run in target mode is tried.

    Args:
        original, candidates, offsets, m, centering, alpha, engine: as in `select_subsets`.
        n_sets: number of sets, at least 2.
        tol: how near a set must come to its value, as a share of the spacing.
        max_runs_per_set: bisection steps per value; should nothing come within tol, the nearest run found is taken.
        memory_budget: as in `select_subsets`.
        checkpoint: file that keeps every run made: an interrupted call, made again, goes on from its last round.
        progress: called with (values found, n_sets) after every round.

    Returns:
        `UniformSets`; its spacing_error says how uniform the result is.

    Raises:
        TypeError, ValueError: as `select_subsets`; n_sets below 2, tol not above 0, max_runs_per_set below 1.

    Source: the FDG paper, section 4.2, keeps 50 sets of uniformly spaced FDG; the quantile dial is this library's.
    """
    check_count(n_sets, "n_sets", 2)
    check_count(max_runs_per_set, "max_runs_per_set", 1)
    if not tol > 0.0:
        raise ValueError(f"tol must be above 0, got {tol}")

    problem = prepare(original, candidates, offsets, centering, alpha)
    m = check_steps(m, problem.subsets)
    need, limit = n_sets * (_OF_A_SET + 16 * m), limit_of(memory_budget, torch.device("cpu"))
    if need > limit:
        raise ValueError(
            f"n_sets = {n_sets} of {m} subsets take {need / 2**20:.0f} MiB, memory_budget is {limit / 2**20:.0f} MiB: ask for fewer"
        )
    base = float(problem.start.base)
    path = None if checkpoint is None else Path(checkpoint)
    key = "" if path is None else fingerprint(*problem.inputs, m, "uniform")
    # Runs so far by what steers them: ("quantile", q), with q = 0 and 1 the greedy minimum and maximum, or ("target", FDG).
    runs: dict[tuple[str, float], Outcome] = {}
    if path is not None:
        for mode, at, picked, values in zip(*read_checkpoint(path, key, ("modes", "at", "picked", "values")) or ()):
            runs[mode, at] = Outcome(picked, values, {"engine": "none", "form": "checkpoint", "evaluations": 0})

    def rule_of(mode: str, at: float) -> Rule:
        if mode == "target":
            return make_rule(problem.start, mode, None, at, None)
        return make_rule(problem.start, {0.0: "min", 1.0: "max"}.get(at, mode), at, None, None)

    def make(wanted: list[tuple[str, float]]) -> None:
        wanted = [w for w in dict.fromkeys(wanted) if w not in runs]
        count = len(wanted)
        outcomes = run_all([problem] * count, [rule_of(*w) for w in wanted], [m] * count, engine, memory_budget)
        runs.update(zip(wanted, outcomes))
        if wanted and path is not None:
            arrays = {name: np.array([getattr(run, name) for run in runs.values()]) for name in ("picked", "values")}
            modes, at = zip(*runs)
            write_npz(path, key=key, modes=np.array(modes), at=np.array(at), **arrays)

    def final(run: tuple[str, float]) -> float:
        return runs[run].values[-1] / base - 1.0

    make([("quantile", q) for q in np.linspace(0.0, 1.0, min(n_sets, problem.subsets + 1)).tolist()])
    ends = final(("quantile", 0.0)), final(("quantile", 1.0))
    targets = np.linspace(*ends, n_sets)
    spacing = float(targets[1] - targets[0])

    def nearest(target: float) -> tuple[str, float]:
        return min(runs, key=lambda run: (abs(final(run) - target), run))

    for _ in range(max_runs_per_set):
        dial = sorted((at, final((mode, at))) for mode, at in runs if mode == "quantile")
        wanted = []
        for target in targets.tolist():
            if abs(final(nearest(target)) - target) <= tol * spacing:
                continue
            # The neighbours in q between which the final FDG passes the target: the first, should it not be monotone.
            left = next(i for i in range(len(dial) - 1) if (dial[i][1] - target) * (dial[i + 1][1] - target) <= 0.0)
            low, high = dial[left][0], dial[left + 1][0]
            if high - low > 0.25 / problem.subsets:  # closer together, they pick the same subsets
                wanted.append(("quantile", (low + high) / 2.0))
        if progress:
            progress(n_sets - len(wanted), n_sets)
        if not wanted:
            break
        make(wanted)
    make([("target", t) for t in targets.tolist() if abs(final(nearest(t)) - t) > tol * spacing])
    if progress:
        progress(n_sets, n_sets)
    chosen = [nearest(target) for target in targets.tolist()]
    fdg = np.array([final(run) for run in chosen])
    error = float(np.abs(fdg - targets).max() / spacing) if spacing > 0.0 else 0.0
    return UniformSets(
        [to_selection(problem.start, problem.bounds, runs[run], m, None, None) for run in chosen],
        torch.from_numpy(fdg),
        torch.from_numpy(targets),
        torch.tensor([at if mode == "quantile" else math.nan for mode, at in chosen], dtype=torch.float64),
        error,
        len(runs),
    )
