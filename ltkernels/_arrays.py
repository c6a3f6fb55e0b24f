"""Arrays as people have them, read for their values: any byte order and strides, labels as numbers or names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

_SHOWN = 40  # characters of a label in a message


def plain(given: Any) -> np.ndarray:
    """The array in native byte order and with strides that torch takes; float128 as float64. The same memory where it can be."""
    array: np.ndarray = np.asanyarray(given)  # a memory-mapped one stays mapped
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # A copy: an array of one row counts as contiguous whatever its strides.
    return array.copy() if any(stride < 0 for stride in array.strides) else array


class _Writable:
    """The memory of a read-only array, of which torch makes no tensor without a warning about what would happen on a write."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # which owns the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def tensor(array: Any) -> torch.Tensor:
    """`plain` as a tensor, in the same memory where it can be; not to be written to. Raises TypeError for what is no array of numbers."""
    found = plain(array)
    if found.dtype.kind not in "biufc":
        raise TypeError(f"an array of {found.dtype}")
    return torch.from_numpy(found if found.flags.writeable or not found.size else np.asarray(_Writable(found)))


def text(value: Any) -> str:
    """A name as text; bytes are decoded (as UTF-8, else every byte as the character of its number)."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")
    return str(value)


def natural_key(name: str) -> list[tuple[int, int, str, str]]:
    """Sorts `class2` before `class10`."""
    parts = re.split(r"([0-9]+)", name)
    # Digits compare as the number does, by length and then by value, however many there are: int() refuses thousands.
    digits = [part.lstrip("0") for part in parts]
    return [(1, len(d), d, part) if i % 2 else (0, 0, "", part) for i, (part, d) in enumerate(zip(parts, digits))]


def integers(argument: str, labels: np.ndarray) -> np.ndarray:
    """Labels as int64; floats must be whole. Raises TypeError or ValueError naming the argument."""
    labels = plain(labels)
    if labels.dtype.kind == "f":
        whole = np.isfinite(labels) & (labels == np.round(labels)) & (np.abs(labels) < 2**53)
        if not whole.all():
            found = labels[~whole].flat[0]
            raise TypeError(f"{argument} must hold integers or names of classes, got the number {found}")
    elif labels.dtype.kind not in "iu":
        raise TypeError(f"{argument} must hold integers or names of classes, got {labels.dtype}")
    elif labels.dtype == np.uint64 and labels.size and labels.max() >= 1 << 63:
        raise ValueError(f"{argument} holds the label {labels.max()}: more than 63 bits")
    return labels.astype(np.int64)


def class_indices(
    given: Mapping[str, np.ndarray], class_names: Sequence[Any] | None = None
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Labels of several arrays, one numbering for all: int64 class indices from 0, and the names of the classes.

    Names of classes (strings or bytes) are numbered as `class_names` orders them, or in their natural order (`c2` before
    `c10`). Integers, and floats that are integers, are indices; those of all arrays together that are exactly 1..C count from
    1: they become 0..C-1, with "1", "2", ... for names where `class_names` gives none. Names None: the caller numbers them.
    Raises TypeError or ValueError naming the array.
    """
    names = None if class_names is None else each_once(class_names)
    arrays = {argument: np.asarray(labels) for argument, labels in given.items()}
    kinds = {labels.dtype.kind in "SU" for labels in arrays.values()}
    if kinds == {True}:
        return _named(arrays, names)
    if len(kinds) > 1:
        raise TypeError(f"{' and '.join(arrays)} must all hold integers or all names of classes")
    numbers = {argument: integers(argument, labels) for argument, labels in arrays.items()}
    values = np.unique(np.concatenate([labels.ravel() for labels in numbers.values()]))
    from_one = len(values) > 0 and values[0] == 1 and values[-1] == len(values)
    if from_one and (names is None or len(names) == len(values)):
        numbers = {argument: labels - 1 for argument, labels in numbers.items()}
        names = names or tuple(str(value) for value in values)
    return numbers, names


def readable(path: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a file of features, read for their values: byte order and strides; `labels` and `pool_labels` as class indices
    (see `class_indices`), with the names that they held as `class_names`; the class names as text. ValueError naming the file."""
    found = {name: plain(array) for name, array in arrays.items()}
    given = found.get("class_names")
    if given is not None and given.dtype != object:
        try:
            found["class_names"] = np.array(each_once(given.ravel()), np.str_)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    labels: dict[str, np.ndarray] = {name: found[name] for name in ("labels", "pool_labels") if name in found}
    if not any(
        array.dtype.kind in "fSU" or (array.size and array.min() > 0)
        for array in labels.values()
        if array.dtype != object
    ):
        return found
    try:
        numbers, names = class_indices(labels, None if given is None else list(found["class_names"].ravel()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return {**found, **numbers, **({"class_names": np.array(names)} if names else {})}


def each_once(class_names: Iterable[Any]) -> tuple[str, ...]:
    """The names as text; ValueError for one that two classes have."""
    names = tuple(text(name) for name in class_names)
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"class_names holds {twice[:_SHOWN]!r} twice")
    return names


def _named(
    arrays: dict[str, np.ndarray], names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    for argument, given in arrays.items():
        unique, index = np.unique(plain(given), return_inverse=True)
        found[argument] = [text(value) for value in unique], index.reshape(given.shape)
    if names is None:
        names = tuple(
            sorted({value for values, _ in found.values() for value in values}, key=lambda n: (natural_key(n), n))
        )
    place = {name: i for i, name in enumerate(names)}
    for argument, (values, _) in found.items():
        stranger = next((value for value in values if value not in place), None)
        if stranger is not None:
            raise ValueError(f"{argument} holds {stranger[:_SHOWN]!r}, which class_names does not")
    numbers = {
        argument: np.array([place[value] for value in values], np.int64)[index]
        for argument, (values, index) in found.items()
    }
    return numbers, names
