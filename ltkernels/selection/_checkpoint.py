"""Going on after an interruption: greedy steps and runs kept in a file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._npz import array_names, read_arrays
from .._ranks import digest

_log = logging.getLogger(__name__)

# Steps between two writes.
EVERY = 64


def fingerprint(*what: Any) -> str:
    """Of everything that decides the picks: tensors, and values that say all in their `repr`."""
    parts = [digest(x) if isinstance(x, Tensor) else x for x in what]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_checkpoint(path: Path, key: str, names: Sequence[str]) -> list[list[Any]] | None:
    """The named arrays as lists, or None where there is no such file; ValueError where it is not the one of `key`."""
    if not path.exists():
        return None
    try:
        arrays = read_arrays(path, ("key", *names))
    except ValueError as error:
        raise ValueError(f"checkpoint {error}") from error
    if str(arrays["key"]) != key:
        raise ValueError(f"checkpoint {path}: belongs to another selection; remove it, or name another file")
    return [arrays[name].tolist() for name in names]


def drop_damaged(folder: Path) -> None:
    """Remove from a folder of checkpoints that nobody else writes into those that cannot be read, and say so: what they held
    is computed again."""
    for path in sorted(folder.glob("*.npz")):
        try:
            read_arrays(path, array_names(path))
        except ValueError:
            _log.warning("%s is damaged: its class is selected anew", path)
            path.unlink()
