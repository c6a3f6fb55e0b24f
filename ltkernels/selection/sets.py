"""Sets of subsets whose Feature Diversity Gains are uniformly spaced."""

from __future__ import annotations

import bisect
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .greedy import Selection, select_subsets


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
) -> UniformSets:
    """n_sets selections of m subsets whose final FDG are uniformly spaced between the greedy minimum and maximum.

    Always taking the q-quantile candidate gives a final FDG that rises with q, so each value is found by bisection over
    q; runs are shared between values. q is a dial with as many stops as subsets: where none is near enough, one run in
    target mode is tried.

    Args:
        original, candidates, offsets, m, centering, alpha, engine: as in `select_subsets`.
        n_sets: number of sets, at least 2.
        tol: how near a set must come to its value, as a share of the spacing.
        max_runs_per_set: bisection steps per value; should nothing come within tol, the nearest run found is taken.

    Returns:
        `UniformSets`; its spacing_error says how uniform the result is.

    Raises:
        TypeError, ValueError: as `select_subsets`; n_sets below 2, tol not above 0, max_runs_per_set below 1.

    Source: the FDG paper, section 4.2, keeps 50 sets of uniformly spaced FDG; the quantile dial is this library's.
    """
    for name, value, least in (("n_sets", n_sets, 2), ("max_runs_per_set", max_runs_per_set, 1)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not tol > 0.0:
        raise ValueError(f"tol must be above 0, got {tol}")

    keywords: dict[str, Any] = {"m": m, "centering": centering, "alpha": alpha, "engine": engine}
    # Quantile runs so far, by q: (q, final FDG, selection). q = 0 and q = 1 are the greedy minimum and maximum.
    runs: list[tuple[float, float, Selection]] = []

    def run(mode: str, at: float, **rule: float) -> tuple[float, float, Selection]:
        selection = select_subsets(original, candidates, offsets, mode=mode, **rule, **keywords)
        return at, float(selection.fdg[-1]), selection

    runs += [run("min", 0.0), run("max", 1.0)]
    targets = np.linspace(runs[0][1], runs[-1][1], n_sets)
    spacing = float(targets[1] - targets[0])
    chosen, extra = [], 0
    for target in targets.tolist():
        for _ in range(max_runs_per_set):
            if min(abs(value - target) for _, value, _ in runs) <= tol * spacing:
                break
            # The neighbours in q between which the final FDG passes the target: the first, should it not be monotone.
            left = next(i for i in range(len(runs) - 1) if (runs[i][1] - target) * (runs[i + 1][1] - target) <= 0.0)
            q = (runs[left][0] + runs[left + 1][0]) / 2.0
            bisect.insort(runs, run("quantile", q, q=q), key=lambda r: r[0])
        near = min(runs, key=lambda r: (abs(r[1] - target), r[0]))
        if abs(near[1] - target) > tol * spacing:
            extra += 1
            near = min(near, run("target", math.nan, target=target), key=lambda r: abs(r[1] - target))
        chosen.append(near)
    fdg = np.array([value for _, value, _ in chosen])
    error = float(np.abs(fdg - targets).max() / spacing) if spacing > 0.0 else 0.0
    return UniformSets(
        [selection for _, _, selection in chosen],
        torch.from_numpy(fdg),
        torch.from_numpy(targets),
        torch.tensor([q for q, _, _ in chosen], dtype=torch.float64),
        error,
        len(runs) + extra,
    )
