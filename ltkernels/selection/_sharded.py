"""Greedy selection from a pool that is spread over the ranks of a process group.

Every rank keeps the state (count, mean, scatter) and scores its own subsets. A step is two small exchanges: the subsets
that may win, a few numbers a rank, and then the rows of the winner, which its owner broadcasts. All decisions are taken
from what was exchanged, so that every rank takes the same one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._features import (
    as_tensor,
    check_alpha,
    check_centering,
    check_features,
    check_offsets,
    check_original,
    check_same_width,
)
from .._ranks import Ranks, digest, same_arguments
from ._checkpoint import fingerprint, read_checkpoint
from ._driver import Outcome, Pool, check_engine, engine_of_steps, plan, saver, step_by_step
from ._greedy import Selection, check_mode, check_steps, make_rule, to_selection
from ._rules import Rule, choose, least_loss
from ._subsets import Problem, start_state

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


class _Pool(Pool):
    """The whole pool: sizes of all subsets, and which rank holds which."""

    def __init__(self, ranks: Ranks, sizes: Sequence[Sequence[int]], like: Tensor) -> None:
        self.ranks, self.like = ranks, like
        self.failure: Exception | None = None  # what this rank met since the last step
        self.sizes = [size for part in sizes for size in part]
        self.begins = list(itertools.accumulate((len(part) for part in sizes), initial=0))
        self.bounds = list(itertools.accumulate(self.sizes, initial=0))
        self.first, self.count = self.begins[ranks.rank], len(sizes[ranks.rank])

    def owner(self, subset: int) -> int:
        return bisect.bisect_right(self.begins, subset) - 1

    def commit(self, engine: Any, subset: int) -> None:
        """Adds the rows of a subset, from its owner, to every rank's state."""
        owner = self.owner(subset)
        own = owner == self.ranks.rank
        shape = self.sizes[subset], self.like.shape[1]
        rows = self.ranks.broadcast(engine.rows(subset - self.first) if own else self.like.new_empty(shape), owner)
        try:
            if engine is not None and self.failure is None:
                if own:
                    engine.take(subset - self.first)
                engine.join(rows)
        except Exception as error:
            self.failure = error

    def pick(self, engine: Any, rule: Rule, step: int) -> tuple[int, float]:
        """The subset that `rule` takes, and the log-determinant with it. Errors of one rank are errors of all."""
        failure = self.failure
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
        none = rows.shape[0] == 0 and as_tensor(offsets, "offsets").tolist() == [0]
        bounds = [0] if none else check_offsets(offsets, rows.shape[0])
        check_mode(*steering)
        centering, alpha = check_centering(arguments["centering"]), check_alpha(arguments["alpha"])
        sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
        own = sizes, "" if checkpoint is None else digest(rows)
    shares = same_arguments(ranks, z, repr({**arguments, "checkpoint": checkpoint is not None}), own)
    pool = _Pool(ranks, [sizes for sizes, _ in shares], z)
    if not pool.sizes:
        raise ValueError("candidates is empty on every rank: the pool must hold at least one subset")
    m = check_steps(arguments["m"], len(pool.sizes))
    chosen, reason, begun = None, "no subsets on this rank", None
    with ranks.together():
        start = start_state(z, centering, alpha)
        rule = make_rule(start, *steering)
        check_engine(engine)
        if pool.count:
            problem = Problem(start, rows, bounds, alpha)
            planned = plan(problem, rule.mode, engine, budget)
            chosen = engine_of_steps(planned, problem)
            reason = "step by step, for the ranks" if planned.form == "loop" else planned.reason
        if checkpoint is not None:
            # Of everything that decides the picks; m does not.
            key = fingerprint(z, shares, centering, alpha, rule)
            if ranks.rank == 0:
                begun = read_checkpoint(checkpoint, key, ("picked", "values"))
    if checkpoint is not None:
        begun = ranks.share(begun)[0]
    # Rounding may differ between machines: what decides is rank 0's.
    start = start._replace(base=ranks.broadcast(start.base, 0))
    rule = make_rule(start, *steering)

    def save(picked: list[int], values: list[float]) -> None:
        with ranks.together():
            if ranks.rank == 0 and checkpoint is not None:
                saver(checkpoint, key)(picked, values)

    keep = None if checkpoint is None else save
    picked, values = step_by_step(chosen, rule, m, pool=pool, begun=begun, save=keep, progress=progress)
    own_stats = {"engine": "none", "evaluations": 0, "scores": "none"} if chosen is None else chosen.stats()
    stats = {**own_stats, "form": "ranks", "reason": reason, "shares": np.diff(pool.begins).tolist()}
    return to_selection(start, pool.bounds, Outcome(picked, values, stats), m, target, tol)
