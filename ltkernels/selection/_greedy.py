"""Greedy selection of subsets by Feature Diversity Gain: one subset a step, by one of four rules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._features import as_tensor, check_count, check_number
from ..diversity import standardized_offset
from ._checkpoint import fingerprint, read_checkpoint
from ._driver import Outcome, engine_of_steps, plan, run_all, saver, step_by_step
from ._rules import MODES, TIE, Rule
from ._subsets import Problem, Start, prepare

# Without `tol`, a target counts as reached when the last FDG is this close to it.
REACHED = 1e-2


class Selection(NamedTuple):
    """What `select_subsets` or `match_pool` took.

    Attributes:
        picked: (m,) int64, subset ids in the order of picking; shorter than m only when target mode stopped at its
            tolerance.
        fdg: (m,) float64, FDG of the original samples plus everything picked so far, after each step.
        indices: (picked rows,) int64, rows of `candidates` in the order of picking.
        stats: engine, form and reason (how and why this engine), scores (their precision), steps, evaluations (candidate
            scores computed), diversity (log det(I + alpha C_Z) of the original set, nats); in target mode also target,
            error (of the last FDG, from the nearest end of the target's range), reached (whether |error| <= tol) and
            stopped_early.
        offset: `ltkernels.diversity.standardized_offset` of everything picked: FDG hardly sees it. NaN with
            `group`, where no rank holds all rows.
    """

    picked: Tensor
    fdg: Tensor
    indices: Tensor
    stats: dict[str, Any]
    offset: float = math.nan

    @property
    def reached(self) -> bool:
        """Whether everything that was asked for holds."""
        return bool(self.stats.get("reached", True))


def target_range(target: Any) -> tuple[float, float]:
    """(low, high) of a target given as a number or as a pair."""
    if isinstance(target, (tuple, list)):
        if len(target) != 2:
            raise ValueError(f"target must be an FDG value or a pair (low, high), got {len(target)} values")
        low, high = (check_number(value, "target") for value in target)
        if low > high:
            raise ValueError(f"target must be a pair (low, high) with low <= high, got ({low}, {high})")
        return low, high
    return (value := check_number(target, "target")), value


def check_mode(mode: str, q: Any, target: Any, tol: Any) -> None:
    """ValueError or TypeError unless the mode is known and has its own arguments and no other's."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "quantile":
        if q is None:
            raise ValueError('mode "quantile" needs q, a number in [0, 1]')
        if not 0.0 <= check_number(q, "q") <= 1.0:
            raise ValueError(f"q must be in [0, 1], got {q}")
    elif q is not None:
        raise ValueError(f'q = {q} is for mode "quantile", but mode is {mode!r}')
    if mode == "target":
        if target is None:
            raise ValueError('mode "target" needs target, an FDG value or a range (low, high)')
        target_range(target)
        if tol is not None and check_number(tol, "tol") < 0.0:
            raise ValueError(f"tol must not be negative, got {tol}")
    else:
        for name, value in (("target", target), ("tol", tol)):
            if value is not None:
                raise ValueError(f'{name} = {value} is for mode "target", but mode is {mode!r}')


def check_steps(m: Any, subsets: int) -> int:
    m = check_count(m, "m", 1)
    if m > subsets:
        raise ValueError(f"m = {m} subsets are wanted, but the pool has {subsets}")
    return m


def make_rule(start: Start, mode: str, q: Any, target: Any, tol: Any) -> Rule:
    base = float(start.base)
    low, high = (0.0, 0.0) if target is None else ((1.0 + t) * base for t in target_range(target))
    return Rule(mode, float(q or 0.0), low, high, TIE * (1.0 + base), -1.0 if tol is None else float(tol) * base)


def to_selection(start: Start, bounds: Sequence[int], outcome: Outcome, m: int, target: Any, tol: Any) -> Selection:
    """`bounds` are the offsets of the whole pool."""
    base = float(start.base)
    picked, path = outcome.picked, [value / base - 1.0 for value in outcome.values]
    stats = {**outcome.stats, "steps": len(picked), "diversity": base}
    if target is not None:
        low, high = target_range(target)
        error = path[-1] - min(max(path[-1], low), high)
        stats |= {
            "target": target if isinstance(target, (tuple, list)) else float(target),
            "error": error,
            "reached": abs(error) <= (REACHED if tol is None else tol),
            "stopped_early": len(picked) < m,
        }
    rows = [torch.arange(bounds[c], bounds[c + 1]) for c in picked]
    indices = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    return Selection(torch.tensor(picked, dtype=torch.int64), torch.tensor(path, dtype=torch.float64), indices, stats)


def select_subsets(
    original: Any,
    candidates: Any,
    offsets: Tensor | Sequence[int],
    *,
    m: int,
    mode: str = "max",
    q: float | None = None,
    target: float | tuple[float, float] | None = None,
    tol: float | None = None,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
    memory_budget: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    group: Any = None,
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
        target: FDG to reach, for "target" only: a value, or a range (low, high) in which everything is as good. An
            unreachable one gives the nearest that greedy steps find, with stats["reached"] False.
        tol: for "target" only: stop as soon as FDG is within tol of the target, with fewer than m subsets if that
            comes early. Without it all m steps are made, and reached is judged at 0.01.
        centering: "joint", "separate" or "none" (see `ltkernels.diversity`).
        alpha: factor of the covariance, above 0.
        engine: "full" scores every candidate at each step, "lazy" those that bounds leave open (CPU, subsets of at most 128
            rows; the quantile needs every score and gets it), "auto" is the faster one. Both pick the same subsets.
        memory_budget: bytes that the selection may take; by default half of what is available (see `ltkernels._memory`).
        checkpoint: file that keeps the steps made, for long runs: an interrupted call, made again with the same
            arguments (m may differ), goes on from there.
        progress: called with (steps made, steps wanted).
        group: process group over whose ranks the pool is spread ("world" is the default one). Each rank gives the whole
            of `original` and its own share of the pool, as `candidates` and `offsets`: whole subsets, any number of
            them, none too (shape (0, d), offsets [0]). The pool is the shares one after the other, and every rank gets
            the `Selection` that one process would make of it, with ids and indices of the whole pool. A step exchanges
            a few numbers a rank and the rows of the subset that joins ("quantile": also every score, K doubles).
            `engine`, `memory_budget` and `progress` are each rank's own; `checkpoint` is rank 0's file.

    Returns:
        `Selection`: picked (m,), fdg (m,) after each step, indices into `candidates`, stats.

    Raises:
        TypeError, ValueError: NaN or infinity (first row named), N = 1 or equal originals, an empty pool or subset,
            offsets that do not rise from 0 to P, different feature counts, m above K, an unknown mode, centering or
            engine, q outside [0, 1] or without its mode, a missing target, alpha not above 0, a budget in which no
            engine fits, a checkpoint of another selection. With `group`, an error of one rank is one of every rank
            (elsewhere with the rank named), and so are originals or arguments that are not the same everywhere.

    Source: the greedy procedure of the FDG paper, section 4.2; quantile and target are this library's additions.
    """
    if group is not None:
        from ._sharded import select_over_ranks  # it needs this module

        arguments = {"m": m, "mode": mode, "q": q, "target": target, "tol": tol, "centering": centering, "alpha": alpha}
        path = None if checkpoint is None else Path(checkpoint)
        return select_over_ranks(group, original, candidates, offsets, arguments, engine, memory_budget, path, progress)
    problem = prepare(original, candidates, offsets, centering, alpha)
    m = check_steps(m, problem.subsets)
    check_mode(mode, q, target, tol)
    rule = make_rule(problem.start, mode, q, target, tol)
    if checkpoint is None:
        (outcome,) = run_all([problem], [rule], [m], engine, memory_budget, progress)
    else:
        path, key = Path(checkpoint), fingerprint(*problem.inputs, rule)
        begun = read_checkpoint(path, key, ("picked", "values"))
        planned = plan(problem, mode, engine, memory_budget)
        single = engine_of_steps(planned, problem)
        made = step_by_step(single, rule, m, begun=begun, save=saver(path, key), progress=progress)
        stats = {**single.stats(), "form": "steps", "reason": f"{planned.reason}; with a checkpoint"}
        outcome = Outcome(*made, stats)
    return _with_offset(to_selection(problem.start, problem.bounds, outcome, m, target, tol), original, candidates)


def _with_offset(found: Selection, original: Any, candidates: Any) -> Selection:
    rows = as_tensor(candidates, "candidates").detach()
    return found._replace(offset=standardized_offset(original, rows[found.indices.to(rows.device)]))


def select_subsets_batched(
    originals: Any,
    candidates: Any,
    offsets: Any,
    *,
    m: Any,
    mode: Any = "max",
    q: Any = None,
    target: Any = None,
    tol: Any = None,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
    memory_budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Selection]:
    """Many independent selections in one call: classes x seeds x modes. On the CPU they run side by side, one a thread;
    on a GPU together, a batch in every operation.

    Args:
        originals, candidates, offsets, m, mode, q, target, tol: as in `select_subsets`; each is one value for all runs,
            or a list with one per run (a range as target is a tuple). Features given once are checked and prepared
            once.
        centering, alpha, engine, memory_budget: as in `select_subsets`, for all.
        progress: called with (steps made, steps wanted), of all runs together.

    Returns:
        One `Selection` per run, each equal to that of `select_subsets`.

    Raises:
        TypeError, ValueError: as `select_subsets`, the run named; lists of different lengths.
    """
    one_pool = isinstance(offsets, list) and (not offsets or isinstance(offsets[0], numbers.Integral))
    arguments = {
        "originals": originals,
        "candidates": candidates,
        "offsets": tuple(offsets) if one_pool else offsets,
        "m": m,
        "mode": mode,
        "q": q,
        "target": target,
        "tol": tol,
    }
    lengths = {name: len(value) for name, value in arguments.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists of different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}")
    runs = next(iter(lengths.values()), 1)
    problems: dict[tuple[int, ...], Problem] = {}
    work = []
    for run in range(runs):
        original, pool, bounds, wanted, *rule = (
            value[run] if name in lengths else value for name, value in arguments.items()
        )
        key = id(original), id(pool), id(bounds)
        try:
            if key not in problems:
                problems[key] = prepare(original, pool, bounds, centering, alpha)
            steps = check_steps(wanted, problems[key].subsets)
            check_mode(*rule)
        except (TypeError, ValueError) as error:
            raise type(error)(f"run {run}: {error}" if runs > 1 else str(error)) from None
        work.append((problems[key], steps, rule, original, pool))
    rules = [make_rule(problem.start, *rule) for problem, _, rule, *_ in work]
    outcomes = run_all([w[0] for w in work], rules, [w[1] for w in work], engine, memory_budget, progress)
    return [
        _with_offset(to_selection(problem.start, problem.bounds, outcome, steps, *rule[2:]), original, pool)
        for (problem, steps, rule, original, pool), outcome in zip(work, outcomes)
    ]
