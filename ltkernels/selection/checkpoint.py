"""Going on after an interruption: greedy steps and runs kept in a file."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._npz import DAMAGED, read_arrays, write_npz
from ..diversity import Start, mixed_columns
from . import dispatch
from .problem import Problem
from .rules import Rule

_log = logging.getLogger(__name__)

# Steps between two writes.
EVERY = 64


def grown(problem: Problem, picked: list[int]) -> tuple[Problem, Tensor]:
    """The problem after `picked` have joined, without them, and the ids (K - picked,) of the subsets that are left."""
    start = problem.start
    rows, mean, anchor, count = [start.rows], start.mean.clone(), start.anchor, start.count
    for c in picked:
        part = problem.rows[problem.bounds[c] : problem.bounds[c + 1]]
        size = part.shape[0]
        rows.append(mixed_columns(part, mean, anchor))
        mean = mean + (part.mean(0) - mean) * (size / (anchor + size))
        anchor, count = anchor + size, count + size
    free = torch.ones(problem.subsets, dtype=torch.bool)
    free[picked] = False
    left = free.nonzero()[:, 0]
    sizes = torch.tensor(problem.sizes())
    keep = free.repeat_interleave(sizes).to(problem.rows.device)
    state = Start(torch.zeros_like(start.origin), torch.cat(rows), mean, count, anchor, start.base)
    bounds = [0, *sizes[left].cumsum(0).tolist()]
    return Problem(state, problem.rows[keep], bounds, problem.alpha), left


def fingerprint(problem: Problem, what: Any) -> str:
    """Of everything that decides the picks."""
    digest = hashlib.sha256()
    for x in (problem.start.origin, problem.start.rows, problem.rows):
        digest.update(x.cpu().numpy().tobytes())
    digest.update(repr((problem.bounds, problem.alpha, problem.start.anchor, what)).encode())
    return digest.hexdigest()


def read_checkpoint(path: Path, key: str, names: Sequence[str]) -> list[np.ndarray] | None:
    """The named arrays, or None where there is no such file; ValueError where it is not the one of `key`."""
    if not path.exists():
        return None
    try:
        arrays = read_arrays(path, ("key", *names))
    except ValueError as error:
        raise ValueError(f"checkpoint {error}") from error
    if str(arrays["key"]) != key:
        raise ValueError(f"checkpoint {path}: belongs to another selection; remove it, or name another file")
    return [arrays[name] for name in names]


def drop_damaged(folder: Path) -> None:
    """Remove from a folder of checkpoints that nobody else writes into those that cannot be read, and say so: what they held
    is computed again."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None
        except DAMAGED:
            damaged = True
        if damaged:
            _log.warning("%s is damaged: its class is selected anew", path)
            path.unlink()


def run_with_checkpoint(
    problem: Problem,
    rule: Rule,
    m: int,
    engine: str,
    budget: int | None,
    progress: Callable[[int, int], None] | None,
    path: Path,
) -> dispatch.Outcome:
    """`dispatch.run_all` of one run, kept in `path` as it goes and begun where `path` ends."""
    key = fingerprint(problem, rule)
    found = read_checkpoint(path, key, ("picked", "values")) or [np.empty(0, np.int64), np.empty(0)]
    picked, values = (array.tolist()[:m] for array in found)
    stats: dict[str, Any] = {"engine": "none", "form": "checkpoint", "reason": "all steps were there", "evaluations": 0}
    while len(picked) < m and not (values and rule.stops(values[-1])):
        rest, left = grown(problem, picked) if picked else (problem, torch.arange(problem.subsets))
        (part,) = dispatch.run_all([rest], [rule], [min(EVERY, m - len(picked))], engine, budget)
        picked += left[part.picked].tolist()
        values += part.values
        stats = {**part.stats, "evaluations": stats["evaluations"] + part.stats["evaluations"]}
        write_npz(path, key=key, picked=np.array(picked, dtype=np.int64), values=np.array(values))
        if progress:
            progress(len(picked), m)
    return dispatch.Outcome(picked, values, stats)
