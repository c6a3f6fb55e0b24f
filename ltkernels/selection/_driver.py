"""Which engine makes a run, and the run itself.

An engine of single steps has ``judge / rows / take / join / stats`` and `left` (see `_engines.steps`); `step_by_step` is the
one loop over them: with a checkpoint or without, with the subsets here or spread over ranks. Two engines make whole runs by
themselves: `_engines.loop` in C++, and `_engines.batched`, many runs in each torch operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._memory import available
from .._npz import write_npz
from ._checkpoint import EVERY
from ._engines import loop
from ._engines.batched import BatchedEngine, stack_key
from ._engines.lazy import LazyEngine
from ._engines.steps import StepEngine
from ._rules import Rule, choose
from ._subsets import Problem

ENGINES = ("auto", "full", "lazy")
# Up to this many features the C++ loop makes all steps; its own factorisation is no match for LAPACK's on wider ones.
LOOP_WIDTH = 256
# Above this subset size the blocked algebra of torch beats one lane per subset.
LARGEST_PACKED = 128


class Plan(NamedTuple):
    """engine: its name; form: "loop", "steps" or "batched", how it is carried out; reason: why; need: bytes, roughly."""

    engine: str
    form: str
    reason: str
    need: int


class Outcome(NamedTuple):
    picked: list[int]
    values: list[float]
    stats: dict[str, Any]


def limit_of(budget: int | None, device: torch.device) -> int:
    """Bytes that a selection may take: by default half of what is available."""
    return available(device) // 2 if budget is None else budget


def _loop_fits(problem: Problem) -> bool:
    # Every size has a factor of its own there; the eigenvectors that serve many sizes at once are LAPACK's.
    return problem.width <= LOOP_WIDTH and len(problem.groups) * problem.width**3 <= 8 * LOOP_WIDTH**3


def check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")


def plan(problem: Problem, mode: str, engine: str, budget: int | None) -> Plan:
    """The engine for a run. ValueError for an unknown name, one that cannot serve, or a budget in which nothing fits."""
    check_engine(engine)
    packed = not problem.rows.is_cuda and problem.largest <= LARGEST_PACKED
    if engine == "lazy" and not packed:
        why = "on the CPU only" if problem.rows.is_cuda else f"for subsets of at most {LARGEST_PACKED} rows"
        raise ValueError(f'engine "lazy" works {why}, got {problem.rows.device} and {problem.largest} rows')
    total, d = problem.rows.shape
    if engine != "auto":
        reason = "asked for"
    elif not packed:
        reason = "on a GPU" if problem.rows.is_cuda else f"subsets of more than {LARGEST_PACKED} rows"
    elif _loop_fits(problem):
        reason = f"{d} features, at most {LOOP_WIDTH}: the whole run in C++"
    elif mode == "quantile":
        reason = "the quantile needs every score"
    else:
        engine, reason = "lazy", f"{d} features: bounds settle most candidates"
    engine = "full" if engine == "auto" else engine
    form = "batched" if not packed else "loop" if engine == "full" and _loop_fits(problem) else "steps"
    need, limit = 8 * (3 * total * d + 6 * d * d), limit_of(budget, problem.rows.device)
    if need > limit:
        raise ValueError(
            f"memory_budget = {limit} bytes ({limit / 2**20:.0f} MiB) is too small: engine {engine} takes {need / 2**20:.0f} MiB; "
            "raise it, or select from a smaller pool"
        )
    return Plan(engine, form, reason, need)


class Pool:
    """Where the subsets of a run are: here, all of them the engine's own."""

    def pick(self, engine: Any, rule: Rule, step: int) -> tuple[int, float]:
        """The subset that `rule` takes, and the log-determinant with it."""
        try:
            values, known = engine.judge(rule)
        except torch.linalg.LinAlgError:
            values, known = np.full(1, math.nan), np.ones(1, dtype=bool)
        if not np.isfinite(values[known]).all():
            raise ValueError(f"the log-determinants of step {step + 1} are not finite; scale the features down")
        best = choose(values, known, rule)
        return best, float(values[best])

    def commit(self, engine: Any, subset: int) -> None:
        """Adds the subset to the engine's state."""
        engine.take(subset)
        engine.join(engine.rows(subset))


def engine_of_steps(found: Plan, problem: Problem) -> StepEngine:
    """An engine of single steps for what was planned: where it is whole runs, every candidate is scored, as they do."""
    return LazyEngine(problem) if found.engine == "lazy" else StepEngine(problem)


def step_by_step(
    engine: Any,
    rule: Rule,
    steps: int,
    *,
    pool: Pool | None = None,
    begun: Sequence[list[Any]] | None = None,
    save: Callable[[list[int], list[float]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], list[float]]:
    """(picked, log-determinants) after `steps` steps, or when `rule` stops. `begun`: those that a checkpoint brought back,
    which are repeated without scoring; `save` is called every `EVERY` steps and at the end."""
    pool = pool or Pool()
    picked, values = (part[:steps] for part in begun or ([], []))
    made = len(picked)
    if made == steps or (made and rule.stops(values[-1])):
        return picked, values
    for step in range(steps):
        if step >= made:
            best, value = pool.pick(engine, rule, step)
            picked.append(best)
            values.append(value)
        last = step + 1 == steps or rule.stops(values[step])
        if step >= made:
            if save and (last or (step + 1) % EVERY == 0):
                save(picked, values)
            if progress:
                progress(step + 1, steps)
        if last:
            break
        pool.commit(engine, picked[step])
    return picked, values


def saver(path: Path, key: str) -> Callable[[list[int], list[float]], None]:
    """Keeps the steps made in a file."""
    return lambda picked, values: write_npz(
        path, key=key, picked=np.array(picked, dtype=np.int64), values=np.array(values)
    )


def run_all(
    problems: Sequence[Problem],
    rules: Sequence[Rule],
    steps: Sequence[int],
    engine: str,
    budget: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Every run to its end, those of one kind together; `progress` gets (steps made, steps wanted)."""
    plans = [plan(problem, rule.mode, engine, budget) for problem, rule in zip(problems, rules)]
    out: dict[int, Outcome] = {}
    total = sum(steps)

    def report(now: int) -> None:
        if progress:
            progress(min(sum(steps[i] for i in out) + now, total), total)

    kinds: dict[Any, list[int]] = {}
    for i, found in enumerate(plans):
        own = {"loop": (), "steps": (i,), "batched": stack_key(problems[i])}[found.form]
        kinds.setdefault((found.form, *own), []).append(i)
    for (form, *_), members in kinds.items():
        # As many at a time as the budget holds.
        size = max(1, limit_of(budget, problems[members[0]].rows.device) // max(plans[i].need for i in members))
        for part in (members[at : at + size] for at in range(0, len(members), size)):
            work = [problems[i] for i in part], [rules[i] for i in part], [steps[i] for i in part]
            if form == "loop":
                runs = [loop.Run(*run) for run in zip(*work)]
                loop.run_all(runs, report)
                made = [(run.picked, run.values, run.stats()) for run in runs]
            elif form == "batched":
                batch = BatchedEngine(*work)
                made = [(*path, batch.stats(r)) for r, path in enumerate(batch.run(report))]
            else:
                single = engine_of_steps(plans[part[0]], problems[part[0]])
                path = step_by_step(single, rules[part[0]], steps[part[0]], progress=lambda now, _: report(now))
                made = [(*path, single.stats())]
            for i, (picked, values, stats) in zip(part, made):
                out[i] = Outcome(picked, values, {**stats, "form": form, "reason": plans[i].reason})
    return [out[i] for i in range(len(plans))]
