"""Which engine makes a run, and why: the one place that chooses."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import loop
from .batched import BatchedEngine, stack_key
from .engines import PackedEngine
from .gram import GramEngine
from .lazy import LazyEngine
from .problem import Problem
from .rules import Rule
from .shifts import ShiftEngine, plan_window

ENGINES = ("auto", "A", "lazy", "B", "C")
# Up to this many features the C++ loop makes all steps; its own factorisation is no match for LAPACK's on wider ones.
LOOP_WIDTH = 256
# With fewer original samples, each step changes A so much that the bounds of "lazy" let most candidates through.
LAZY_COUNT = 200
# Above this subset size the blocked algebra of torch beats one lane per subset.
LARGEST_PACKED = 128

BATCHED: dict[str, type[BatchedEngine]] = {"A": BatchedEngine, "B": GramEngine, "C": ShiftEngine}


class Plan(NamedTuple):
    """engine: its name; form: "loop", "steps" or "batched", how it is carried out; reason: why."""

    engine: str
    form: str
    reason: str


def default_budget(device: torch.device) -> int:
    """Bytes that a selection may take by default: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 1 << 31


def _loop_fits(problem: Problem) -> bool:
    # Every size has a factor of its own there; the eigenvectors that serve many sizes at once are LAPACK's.
    return problem.width <= LOOP_WIDTH and len(problem.groups) * problem.width**3 <= 8 * LOOP_WIDTH**3


def _bytes(engine: str, problem: Problem, steps: int) -> int:
    if engine in ("B", "C"):
        return BATCHED[engine].bytes_for(problem, steps)
    total, d = problem.rows.shape
    return 8 * (3 * total * d + 6 * d * d)


def _costs(problem: Problem, steps: int) -> dict[str, float]:
    """Multiply-adds of a run by engine."""
    total, d = problem.rows.shape
    n, size = float(problem.start.count), problem.largest
    end = n + steps * size
    samples = problem.start.rows.shape[0]
    last = samples + steps * size
    _, _, c = plan_window(d, total, size, (n + size) / problem.alpha, max(end, n + size) / problem.alpha, steps)
    return {
        "A": steps * (2 * d**3 / 3 + total * d * d / 2),
        "B": samples * d * total + steps * (last**3 / 3 + last * last * total / 2 + size * d * total),
        "C": c,
    }


def plan(problem: Problem, steps: int, mode: str, engine: str, budget: int) -> Plan:
    """The engine for a run of `steps` steps. ValueError for an unknown name, or where nothing fits the budget."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    cuda = problem.rows.is_cuda
    packed = not cuda and problem.largest <= LARGEST_PACKED
    order: list[tuple[str, str]]
    if engine != "auto":
        order = [(engine, "asked for")]
    elif packed and _loop_fits(problem):
        order = [("A", f"{problem.width} features, at most {LOOP_WIDTH}: the whole run in C++")]
    else:
        costs = _costs(problem, steps)
        order = [(name, f"fewest operations: {costs[name]:.2g}") for name in sorted(costs, key=costs.__getitem__)]
        if packed and mode != "quantile" and problem.start.count >= LAZY_COUNT:
            why = f"{problem.start.count} originals, at least {LAZY_COUNT}: bounds settle most candidates"
            order = [("lazy", why), *order]
    needs = []
    for name, reason in order:
        need = _bytes(name, problem, steps)
        if need <= budget:
            if needs:
                reason = f"{reason}; {needs[0]} does not fit the memory budget"
            if name in ("B", "C") or not packed:
                return Plan("A" if name == "lazy" else name, "batched", reason)
            if name == "A" and _loop_fits(problem):
                return Plan("A", "loop", reason)
            return Plan(name, "steps", reason)
        needs.append(f"engine {name} ({need / 2**20:.0f} MiB)")
    raise ValueError(
        f"memory_budget = {budget} bytes ({budget / 2**20:.0f} MiB) is too small: {', '.join(needs)}; "
        "raise it, or select from a smaller pool"
    )


class Outcome(NamedTuple):
    picked: list[int]
    values: list[float]
    stats: dict[str, Any]


def _report_batch(report: Callable[[int], None], runs: int, now: int, _: int) -> None:
    report(now * runs)


def run_all(
    problems: Sequence[Problem],
    rules: Sequence[Rule],
    steps: Sequence[int],
    engine: str,
    budget: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Every run to its end, grouped by the way it is carried out; `progress` gets (steps made, steps wanted)."""
    plans = []
    for problem, rule, wanted in zip(problems, rules, steps):
        limit = default_budget(problem.rows.device) if budget is None else budget
        plans.append((plan(problem, wanted, rule.mode, engine, limit), limit))
    out: list[Outcome | None] = [None] * len(plans)
    total, done = sum(steps), 0

    def report(now: int) -> None:
        if progress:
            progress(min(done + now, total), total)

    def keep(i: int, picked: list[int], values: list[float], stats: dict[str, Any]) -> None:
        out[i] = Outcome(picked, values, {**stats, "form": plans[i][0].form, "reason": plans[i][0].reason})

    looped = [i for i, (p, _) in enumerate(plans) if p.form == "loop"]
    while looped:
        # As many at a time as the budget holds, each with its own copy of the packs.
        size = max(1, plans[looped[0]][1] // max(1, loop.bytes_for(problems[looped[0]])))
        part, looped = looped[:size], looped[size:]
        runs = [loop.Run(problems[i], rules[i], steps[i]) for i in part]
        loop.run_all(runs, functools.partial(_report_batch, report, 1))
        for i, run in zip(part, runs):
            keep(i, run.picked, run.values, run.stats())
            done += steps[i]
    for i, (p, _) in enumerate(plans):
        if p.form != "steps":
            continue
        single = LazyEngine(problems[i]) if p.engine == "lazy" else PackedEngine(problems[i])
        picked: list[int] = []
        values: list[float] = []
        for _ in range(steps[i]):
            try:
                best, value = single.pick(rules[i])
            except torch.linalg.LinAlgError:
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(
                    f"the log-determinants of step {len(picked) + 1} are not finite; scale the features down"
                )
            picked.append(best)
            values.append(value)
            single.commit(best)
            report(len(picked))
            if rules[i].stops(value):
                break
        keep(i, picked, values, single.stats())
        done += steps[i]
    stacks: dict[Any, list[int]] = {}
    for i, (p, _) in enumerate(plans):
        if p.form == "batched":
            stacks.setdefault((p.engine, *stack_key(problems[i])), []).append(i)
    for (name, *_), members in stacks.items():
        kind = BATCHED[name]
        longest = max(steps[i] for i in members)
        size = max(1, plans[members[0]][1] // max(1, max(kind.bytes_for(problems[i], longest) for i in members)))
        for first in range(0, len(members), size):
            part = members[first : first + size]
            batch = kind([problems[i] for i in part], [rules[i] for i in part], [steps[i] for i in part])
            every = functools.partial(_report_batch, report, len(part)) if progress else None
            for r, (i, (chosen, path)) in enumerate(zip(part, batch.run(every))):
                keep(i, chosen, path, batch.stats(r))
            done += sum(steps[i] for i in part)
    return [outcome for outcome in out if outcome is not None]
