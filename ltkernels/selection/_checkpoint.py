"""Going on after an interruption: greedy steps and runs kept in a file."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._npz import DAMAGED, read_arrays
from ._subsets import Problem

_log = logging.getLogger(__name__)

# Steps between two writes.
EVERY = 64


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
