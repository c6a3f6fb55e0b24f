"""Holding samples out, a share of every class."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Indices of the samples that are kept and held out, both rising; the classes that have both, those left out for want of a
    second sample, and the new number of every old class (-1: left out)."""

    kept: np.ndarray
    held: np.ndarray
    kept_classes: list[int]
    dropped_classes: list[int]
    renumbered: np.ndarray


def hold_out(labels: np.ndarray, share: float, seed: int, *, drop_single: bool = True) -> Split:
    """Hold out round(share * n) of the n samples of every class, at least one; at least one is kept. Labels (n,) are 0..C-1.

    A single sample cannot be on both sides: its class is left out, or with `drop_single` False kept with nothing held out.
    The draw of a class depends on (seed, class) alone.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, got {share}")
    counts = np.bincount(labels)
    kept, held = [], []
    for label, count in enumerate(counts):
        rows = np.random.default_rng([seed, label, 20_000]).permutation(np.flatnonzero(labels == label))
        if count == 1 and drop_single:
            continue
        size = min(max(1, round(share * count)), count - 1)
        held.append(rows[:size])
        kept.append(rows[size:])
    none = np.empty(0, np.int64)
    there = [c for c, count in enumerate(counts) if count > 1 or not drop_single]
    renumbered = np.full(len(counts), -1, np.int64)
    renumbered[there] = np.arange(len(there))
    dropped = [c for c in range(len(counts)) if renumbered[c] < 0]
    return Split(
        np.sort(np.concatenate([none, *kept])), np.sort(np.concatenate([none, *held])), there, dropped, renumbered
    )


def fold_rows(labels: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Rows to test in each fold, rising: of every class of n samples n / folds, rounded, or one where it has fewer samples than
    there are folds, which are then tested in more than one. Labels (n,) are 0..C-1, of two samples or more each.

    The draw of a class depends on (seed, class) alone.
    """
    found: list[list[np.ndarray]] = [[] for _ in range(folds)]
    for label in range(int(labels.max()) + 1):
        rows = np.random.default_rng([seed, label, 40_000]).permutation(np.flatnonzero(labels == label))
        # Classes begin in different folds, so that these are of one size.
        for i, part in enumerate(np.array_split(np.resize(rows, max(folds, len(rows))), folds)):
            found[(i + label) % folds].append(part)
    return [np.sort(np.concatenate(parts)) for parts in found]


def split_off(labels: np.ndarray, names: Sequence[str], share: float, seed: int) -> tuple[Split, list[str], list[str]]:
    """A test set where there is none: the split, the names of the classes that stay, and what to say of it."""
    split = hold_out(labels, share, seed)
    if not split.kept_classes:
        raise ValueError("every class has one sample: no test set can be held out")
    notes = [
        f"no test set: {len(split.held)} of {len(labels)} samples are held out as one, {share:g} of every class, at least one of each"
    ]
    if split.dropped_classes:
        notes.append(f"left out, with one sample: {listed([names[c] for c in split.dropped_classes])}")
    return split, [names[c] for c in split.kept_classes], notes


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more
