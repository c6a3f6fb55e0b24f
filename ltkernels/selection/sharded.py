"""Greedy selection from a pool that is spread over the ranks of a process group.

Every rank keeps the state (count, mean, scatter) and scores its own subsets. A step is two small exchanges: the subsets
that may win, a few numbers a rank, and then the rows of the winner, which its owner broadcasts. All decisions are taken
from what was exchanged, so that every rank takes the same one.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._npz import write_npz
from .._ranks import Ranks
from ..diversity import (
    check_alpha,
    check_centering,
    check_features,
    check_offsets,
    check_original,
    check_same_width,
    start_state,
)
from . import dispatch
from .batched import BatchedEngine
from .checkpoint import EVERY, read_checkpoint
from .engines import PackedEngine
from .greedy import Selection, check_mode, check_steps, make_rule, to_selection
from .lazy import LazyEngine
from .problem import Problem
from .rules import Rule, choose, least_loss

# Nominees of a rank that travel in the first exchange of a step. More than one means scores within a tie of each other.
SLOTS = 4
# What a rank sends in place of the number of its nominees.
_NOT_FINITE, _FAILED = -1, -2


def nominees(values: np.ndarray, known: np.ndarray, rule: Rule) -> np.ndarray:
    """(k, 3) of (subset, loss, value): the subsets of one rank that can win among all, in order of index.

    The winner is the lowest index within a tie of the smallest loss of all. So it is within a tie of its own rank's
    smallest, and its loss is below that of every lower index that is, too.
    """
    ids = np.flatnonzero(known)
    loss = least_loss(values[ids], values[ids], rule)
    near = loss - loss.min() <= rule.tie
    ids, loss = ids[near], loss[near]
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    ids, loss = ids[loss < before], loss[loss < before]
    return np.stack([ids.astype(np.float64), loss, values[ids]], 1)


def settle(found: np.ndarray, rule: Rule) -> tuple[int, float]:
    """(subset, value) that `rule` takes among the nominees (k, 3) of all ranks."""
    near = found[found[:, 1] - found[:, 1].min() <= rule.tie]
    winner = near[near[:, 0].argmin()]
    return int(winner[0]), float(winner[2])


class _Stacked:
    """An engine for many runs, with one run, as the engines for one: judge, rows, take, join."""

    def __init__(self, kind: type[BatchedEngine], problem: Problem, rule: Rule, steps: int) -> None:
        self.problem, self.engine, self.left = problem, kind([problem], [rule], [steps]), problem.subsets
        self.engine.step, self.scored = 0, 0

    def judge(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        self.scored += self.problem.subsets
        return self.engine.score()[0].cpu().numpy(), self.engine.free[0].cpu().numpy()

    def rows(self, subset: int) -> Tensor:
        return self.problem.rows[self.problem.bounds[subset] : self.problem.bounds[subset + 1]]

    def take(self, subset: int) -> None:
        self.engine.free[0, subset] = False
        self.left -= 1

    def join(self, rows: Tensor) -> None:
        size = rows.new_tensor([float(rows.shape[0])])
        self.engine.join(rows[None], torch.ones_like(rows[None, :, :1]), size)
        self.engine.step += 1

    def stats(self) -> dict[str, Any]:
        return {**self.engine.stats(0), "evaluations": self.scored}


def _engine(problem: Problem, rule: Rule, steps: int, name: str, budget: int | None) -> tuple[Any, str]:
    """The engine of this rank's share, and why."""
    limit = dispatch.default_budget(problem.rows.device) if budget is None else budget
    plan = dispatch.plan(problem, steps, rule.mode, name, limit)
    if plan.form == "batched":
        return _Stacked(dispatch.BATCHED[plan.engine], problem, rule, steps), plan.reason
    reason = "step by step, for the ranks" if plan.form == "loop" else plan.reason
    return LazyEngine(problem) if plan.engine == "lazy" else PackedEngine(problem), reason


class _Pool:
    """The whole pool: sizes of all subsets, and which rank holds which."""

    def __init__(self, ranks: Ranks, sizes: Sequence[Sequence[int]]) -> None:
        self.ranks = ranks
        self.sizes = [size for part in sizes for size in part]
        self.begins = list(itertools.accumulate((len(part) for part in sizes), initial=0))
        self.bounds = list(itertools.accumulate(self.sizes, initial=0))
        self.first, self.count = self.begins[ranks.rank], len(sizes[ranks.rank])

    def owner(self, subset: int) -> int:
        return bisect.bisect_right(self.begins, subset) - 1

    def rows(self, subset: int, engine: Any, like: Tensor) -> Tensor:
        """The rows of a subset, from its owner; `like` gives dtype and device."""
        owner = self.owner(subset)
        own = owner == self.ranks.rank
        return self.ranks.broadcast(
            engine.rows(subset - self.first) if own else like.new_empty(self.sizes[subset], like.shape[1]), owner
        )

    def pick(self, engine: Any, rule: Rule, step: int, failure: Exception | None) -> tuple[int, float]:
        """The subset that `rule` takes, and the log-determinant with it. Errors of one rank are errors of all: `failure`
        is what this one met since the last step."""
        found, scores = np.empty((0, 3)), np.full(self.count, np.nan)
        status = 0
        try:
            if failure is not None:
                status = _FAILED
            elif engine is not None and engine.left:
                values, known = engine.judge(rule)
                if not np.isfinite(values[known]).all():
                    status = _NOT_FINITE
                elif rule.mode == "quantile":
                    scores = np.where(known, values, np.nan)
                else:
                    found = nominees(values, known, rule)
                    found[:, 0] += self.first
                    status = len(found)
        except torch.linalg.LinAlgError:
            status = _NOT_FINITE
        except Exception as error:
            failure, status = error, _FAILED
        head = np.full(1 + 3 * SLOTS, np.nan)
        head[0] = status
        head[1 : 1 + 3 * min(len(found), SLOTS)] = found[:SLOTS].ravel()
        heads = torch.stack(self.ranks.gather(torch.from_numpy(head))).numpy()
        if failure is not None:
            raise failure
        for rank, code in enumerate(heads[:, 0].tolist()):
            if code == _FAILED:
                raise RuntimeError(f"rank {rank} failed in step {step + 1}; see its own error")
            if code == _NOT_FINITE:
                raise ValueError(f"the log-determinants of step {step + 1} are not finite; scale the features down")
        if rule.mode == "quantile":
            whole = np.concatenate(self._ragged(scores[:, None], np.diff(self.begins).tolist()))[:, 0]
            best = choose(whole, ~np.isnan(whole), rule)
            return best, float(whole[best])
        counts = [int(n) for n in heads[:, 0]]
        if max(counts) > SLOTS:  # rare: scores of many subsets within a tie, and not equal
            return settle(np.concatenate(self._ragged(found, counts)), rule)
        return settle(np.concatenate([row[1 : 1 + 3 * n].reshape(n, 3) for row, n in zip(heads, counts)]), rule)

    def _ragged(self, rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """The `rows` (k, width) of every rank, of which there are `counts`."""
        padded = np.zeros((max(counts), rows.shape[1]))
        padded[: len(rows)] = rows
        return [part.numpy()[:n] for part, n in zip(self.ranks.gather(torch.from_numpy(padded)), counts)]


def select_over_ranks(
    group: Any,
    original: Any,
    candidates: Any,
    offsets: Any,
    arguments: dict[str, Any],
    engine: str,
    budget: int | None,
    checkpoint: Path | None,
    progress: Callable[[int, int], None] | None,
) -> Selection:
    """`select_subsets` with a group; `arguments` are those that must be the same on every rank."""
    ranks = Ranks(group)
    steering = [arguments[name] for name in ("mode", "q", "target", "tol")]
    target, tol = steering[2:]
    with ranks.together():
        z = check_original(original).detach()
        rows = check_features(candidates, "candidates").detach()
        check_same_width(z, rows, "candidates")
        none = rows.shape[0] == 0 and torch.as_tensor(offsets).tolist() == [0]
        bounds = [0] if none else check_offsets(offsets, rows.shape[0])
        check_mode(*steering)
        centering, alpha = check_centering(arguments["centering"]), check_alpha(arguments["alpha"])
        own = {
            "original": _digest(z),
            "arguments": repr({**arguments, "checkpoint": checkpoint is not None}),
            "sizes": [end - begin for begin, end in itertools.pairwise(bounds)],
            "share": "" if checkpoint is None else _digest(rows),
        }
    shares = ranks.share(own)
    for rank, other in enumerate(shares):
        if other["original"] != shares[0]["original"]:
            raise ValueError(f"original differs between rank 0 and rank {rank}; every rank must give the whole of it")
        if other["arguments"] != shares[0]["arguments"]:
            raise ValueError(
                f"arguments differ: rank 0 has {shares[0]['arguments']}, rank {rank} has {other['arguments']}"
            )
    pool = _Pool(ranks, [share["sizes"] for share in shares])
    if not pool.sizes:
        raise ValueError("candidates is empty on every rank: the pool must hold at least one subset")
    m = check_steps(arguments["m"], len(pool.sizes))
    chosen, reason = None, "no subsets on this rank"
    picked: list[int] = []
    values: list[float] = []
    with ranks.together():
        start = start_state(z, centering, alpha)
        rule = make_rule(start, *steering)
        if pool.count:
            problem = Problem(start, rows, bounds, alpha, pool.sizes)
            chosen, reason = _engine(problem, rule, m, engine, budget)
        elif engine not in dispatch.ENGINES:
            raise ValueError(f"unknown engine {engine!r}; known: {', '.join(dispatch.ENGINES)}")
        if checkpoint is not None:
            # Of everything that decides the picks; m does not.
            pools = [(share["sizes"], share["share"]) for share in shares]
            what = json.dumps([own["original"], pools, centering, alpha, repr(rule)])
            key = hashlib.sha256(what.encode()).hexdigest()
            if ranks.rank == 0 and (found := read_checkpoint(checkpoint, key, ("picked", "values"))):
                picked, values = (array.tolist()[:m] for array in found)
    if checkpoint is not None:
        picked, values = ranks.share([picked, values])[0]
    # Rounding may differ between machines: what decides is rank 0's.
    start = start._replace(base=ranks.broadcast(start.base, 0))
    rule = make_rule(start, *steering)
    failure: Exception | None = None
    made = len(picked)
    finished = made == m or (made > 0 and rule.stops(values[-1]))
    for step in range(0 if finished else m):
        if step >= made:
            best, value = pool.pick(chosen, rule, step, failure)
            picked.append(best)
            values.append(value)
        last = step + 1 == m or rule.stops(values[step])
        if checkpoint is not None and step >= made and (last or (step + 1) % EVERY == 0):
            with ranks.together():
                if ranks.rank == 0:
                    write_npz(checkpoint, key=key, picked=np.array(picked), values=np.array(values))
        if progress and step >= made:
            progress(step + 1, m)
        if last:
            break
        joining = pool.rows(picked[step], chosen, z)
        try:
            if chosen is not None and failure is None:
                if pool.owner(picked[step]) == ranks.rank:
                    chosen.take(picked[step] - pool.first)
                chosen.join(joining)
        except Exception as error:
            failure = error
    own_stats = {"engine": "none", "evaluations": 0, "scores": "none"} if chosen is None else chosen.stats()
    stats = {**own_stats, "form": "ranks", "reason": reason, "shares": np.diff(pool.begins).tolist()}
    return to_selection(start, pool.bounds, dispatch.Outcome(picked, values, stats), m, target, tol)


def _digest(x: Tensor) -> str:
    return hashlib.sha256(repr(tuple(x.shape)).encode() + x.cpu().numpy().tobytes()).hexdigest()
