"""What is trained on and what is held out, and how classes are numbered: the same for arrays, tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ltkernels._arrays import class_indices
from ltkernels._features import check_seed
from ltkernels.train.data._longtail import make_long_tailed

Part = TypeVar("Part")
Rows = np.ndarray | slice


class Arranged(NamedTuple):
    """Of train, test and val: the part that each is taken from with its rows there, and its class indices (n,); then the names of the
    classes, and what to say."""

    rows: dict[str, tuple[str, Rows]]
    labels: dict[str, np.ndarray]
    names: tuple[str, ...]
    notes: list[str]


def arrange(
    given: Mapping[str, np.ndarray],
    class_names: Sequence[Any] | None = None,
    called: str = "y_{}",
    *,
    test_split: float = 0.2,
    seed: int = 0,
    imbalance: float | None = None,
    profile: str = "exp",
) -> Arranged:
    """Number the classes of the labels (n,) of each part, hold a test set out of train where there is none, thin train to `imbalance`.

    Raises ValueError or TypeError with the part as it is `called`: labels that are none, classes without a sample.
    """
    numbers, found = class_indices({called.format(part): labels for part, labels in given.items()}, class_names)
    labels = dict(zip(given, numbers.values()))
    names = _checked_names(labels, called, found)
    rows: dict[str, tuple[str, Rows]] = {part: (part, slice(None)) for part in labels}
    notes = []
    if "test" not in labels:
        kept, held = hold_out(labels["train"], test_split, seed)
        there = np.unique(labels["train"][kept])
        notes.append(
            f"no test set: {len(held)} of {len(labels['train'])} samples are held out as one, {test_split:g} of every class, at least "
            "one of each"
        )
        if len(there) < len(names):
            single = np.setdiff1d(np.arange(len(names)), there)
            notes.append(f"left out, with one sample: {listed([names[c] for c in single])}")
        renumbered = np.full(len(names), -1, np.int64)
        renumbered[there] = np.arange(len(there))
        rows |= {"train": ("train", kept), "test": ("train", held)}
        if "val" in rows:
            rows["val"] = "val", np.flatnonzero(renumbered[labels["val"]] >= 0)
        labels = {part: renumbered[labels[origin][index]] for part, (origin, index) in rows.items()}
        names = tuple(names[c] for c in there)
    if imbalance is not None:
        kept = make_long_tailed(labels["train"], imbalance, profile, seed)
        origin, index = rows["train"]
        rows["train"] = origin, kept if isinstance(index, slice) else index[kept]
        labels["train"] = labels["train"][kept]
    return Arranged(rows, labels, names, notes)


def _checked_names(labels: Mapping[str, np.ndarray], called: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the classes, once each is known to have its samples."""
    for part, y in labels.items():
        if not len(y) or y.min() < 0:
            what = f"holds the negative label {y.min()}" if len(y) else "is empty"
            raise ValueError(f"{called.format(part)} {what}")
    num_classes = len(names) if names is not None else 1 + max(int(y.max()) for y in labels.values())
    for part, y in labels.items():
        argument = called.format(part)
        if y.max() >= num_classes:
            raise ValueError(f"{argument} holds label {y.max()}, but there are {num_classes} classes")
        if part == "val":
            continue
        # Before a table of all classes is made: one forged label would make it as large as it likes.
        if num_classes > len(y):
            raise ValueError(f"{argument} has {len(y)} samples for {num_classes} classes: some have none")
        empty = np.flatnonzero(np.bincount(y, minlength=num_classes) == 0)
        if len(empty):
            which = listed([names[c] if names is not None else str(c) for c in empty])
            raise ValueError(f"{argument} has no sample of class {which}")
    return names if names is not None else tuple(map(str, range(num_classes)))


def with_test(parts: dict[str, Part]) -> tuple[dict[str, Part], list[str]]:
    """The parts of a data set from files, of which val is the test set where there is no other; and what to say."""
    if "test" in parts or "val" not in parts:
        return parts, []
    renamed = {"test" if part == "val" else part: value for part, value in parts.items()}
    return renamed, ["the validation set is the test set, as there is no other"]


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out, both rising: of every class of n samples round(share * n) are held out, at least one, and at
    least one is kept. A class of one sample is in neither. Labels (n,) are 0..C-1.

    The draw of a class depends on (seed, class) alone. Raises ValueError where every class has one sample.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, got {share}")
    seed, kept, held = check_seed(seed), [], []
    for label, count in enumerate(np.bincount(labels)):
        rows = np.random.default_rng([seed, label, 20_000]).permutation(np.flatnonzero(labels == label))
        if count > 1:
            size = min(max(1, round(share * count)), count - 1)
            held.append(rows[:size])
            kept.append(rows[size:])
    if not kept:
        raise ValueError("every class has one sample: no test set can be held out")
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def fold_rows(labels: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Rows to test in each fold, rising: of every class of n samples n / folds, rounded, or one where it has fewer samples than
    there are folds, which are then tested in more than one. Labels (n,) are 0..C-1, of two samples or more each.

    The draw of a class depends on (seed, class) alone.
    """
    seed = check_seed(seed)
    found: list[list[np.ndarray]] = [[] for _ in range(folds)]
    for label in range(int(labels.max()) + 1):
        rows = np.random.default_rng([seed, label, 40_000]).permutation(np.flatnonzero(labels == label))
        # Classes begin in different folds, so that these are of one size.
        for i, part in enumerate(np.array_split(np.resize(rows, max(folds, len(rows))), folds)):
            found[(i + label) % folds].append(part)
    return [np.sort(np.concatenate(parts)) for parts in found]


def chosen(files: Sequence[str], rows: Rows) -> tuple[str, ...]:
    """The names of these rows' files; none where there are none."""
    return tuple(np.array(files, object)[rows]) if files else ()


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more
