"""Greedy selection of subsets by Feature Diversity Gain: one subset a step, by one of four rules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diversity import (
    check_alpha,
    check_centering,
    check_features,
    check_offsets,
    check_original,
    check_same_width,
    start_state,
)
from .engines import make_engine
from .rules import MODES, TIE, Rule

# Without `tol`, a target counts as reached when the last FDG is this close to it.
REACHED = 1e-2


class Selection(NamedTuple):
    """What `select_subsets` took.

    Attributes:
        picked: (m,) int64, subset ids in the order of picking; shorter than m only when target mode stopped at its
            tolerance.
        fdg: (m,) float64, FDG of the original samples plus everything picked so far, after each step.
        indices: (picked rows,) int64, rows of `candidates` in the order of picking.
        stats: engine, steps, evaluations (candidate scores computed), diversity (log det(I + alpha C_Z) of the original
            set, nats); in target mode also target, error (last FDG - target), reached (whether |error| <= tol) and
            stopped_early.
    """

    picked: Tensor
    fdg: Tensor
    indices: Tensor
    stats: dict[str, Any]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_mode(mode: str, q: Any, target: Any, tol: Any) -> None:
    """ValueError or TypeError unless the mode is known and has its own arguments and no other's."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "quantile":
        if q is None:
            raise ValueError('mode "quantile" needs q, a number in [0, 1]')
        if not 0.0 <= _number(q, "q") <= 1.0:
            raise ValueError(f"q must be in [0, 1], got {q}")
    elif q is not None:
        raise ValueError(f'q = {q} is for mode "quantile", but mode is {mode!r}')
    if mode == "target":
        if target is None:
            raise ValueError('mode "target" needs target, an FDG value')
        _number(target, "target")
        if tol is not None and _number(tol, "tol") < 0.0:
            raise ValueError(f"tol must not be negative, got {tol}")
    else:
        for name, value in (("target", target), ("tol", tol)):
            if value is not None:
                raise ValueError(f'{name} = {value} is for mode "target", but mode is {mode!r}')


def check_steps(m: Any, subsets: int) -> int:
    if isinstance(m, bool) or not isinstance(m, numbers.Integral):
        raise TypeError(f"m must be an integer, got {type(m).__name__}")
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    if m > subsets:
        raise ValueError(f"m = {m} subsets are wanted, but the pool has {subsets}")
    return int(m)


def select_subsets(
    original: Any,
    candidates: Any,
    offsets: Tensor | Sequence[int],
    *,
    m: int,
    mode: str = "max",
    q: float | None = None,
    target: float | None = None,
    tol: float | None = None,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
) -> Selection:
    """Greedily adds m subsets of a pool to the original samples, steering their Feature Diversity Gain.

    Args:
        original: (N, d) float features, N >= 2 and not all equal; a tensor or a numpy array.
        candidates: (P, d) float features of the pool.
        offsets: (K + 1,) integers; subset c is rows offsets[c]:offsets[c + 1]. Sizes may differ; the result is exact.
        m: subsets to pick, 1 <= m <= K.
        mode: what each step takes, judged by FDG after it: "max" the largest; "min" the smallest; "quantile" the one of
            rank round(q (R - 1)) among the R subsets left, counted from the smallest (the final FDG rises with q);
            "target" the one that brings FDG nearest to `target`. Ties (to 1e-11 of the log-determinant) go to the
            lowest subset id.
        q: in [0, 1], for "quantile" only.
        target: FDG to reach, for "target" only. An unreachable one gives the nearest that greedy steps find, with
            stats["reached"] False.
        tol: for "target" only: stop as soon as |FDG - target| <= tol, with fewer than m subsets if that comes early.
            Without it all m steps are made, and reached is judged at 0.01.
        centering: "joint", "separate" or "none" (see `ltkernels.diversity`).
        alpha: factor of the covariance, above 0.
        engine: "auto", or one of the engines by name (see `ltkernels.selection.engines`); every engine picks the same
            subsets.

    Returns:
        `Selection`: picked (m,), fdg (m,) after each step, indices into `candidates`, stats.

    Raises:
        TypeError, ValueError: NaN or infinity (first row named), N = 1 or equal originals, an empty pool or subset,
            offsets that do not rise from 0 to P, different feature counts, m above K, an unknown mode, centering or
            engine, q outside [0, 1] or without its mode, a missing target, alpha not above 0.

    Source: the greedy procedure of the FDG paper, section 4.2; quantile and target are this library's additions.
    """
    z = check_original(original).detach()
    pool = check_features(candidates, "candidates").detach()
    check_same_width(z, pool, "candidates")
    bounds = check_offsets(offsets, pool.shape[0])
    m = check_steps(m, len(bounds) - 1)
    check_mode(mode, q, target, tol)
    check_centering(centering)
    alpha = check_alpha(alpha)

    start = start_state(z, centering, alpha)
    base = float(start.base)
    runner = make_engine(engine, start, pool, bounds, alpha, mode)
    rule = Rule(mode, q or 0.0, 0.0 if target is None else (1.0 + target) * base, TIE * (1.0 + base))
    picked: list[int] = []
    path: list[float] = []
    for _ in range(m):
        best, value = runner.pick(rule)
        picked.append(best)
        path.append(value / base - 1.0)
        runner.commit(best)
        if tol is not None and target is not None and abs(path[-1] - target) <= tol:
            break
    stats = {**runner.stats(), "steps": len(picked), "diversity": base}
    if target is not None:
        error = path[-1] - target
        reached = abs(error) <= (REACHED if tol is None else tol)
        stats |= {"target": float(target), "error": error, "reached": reached, "stopped_early": len(picked) < m}
    indices = torch.cat([torch.arange(bounds[c], bounds[c + 1]) for c in picked])
    return Selection(torch.tensor(picked), torch.tensor(path, dtype=torch.float64), indices, stats)
