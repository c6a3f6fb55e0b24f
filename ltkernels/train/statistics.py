"""The job `ltkernels statistics`: statistics of the classes of a file of features, and those of several parties together."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ltkernels._ranks import together
from ltkernels.diversity import ClassStatistics
from ltkernels.train import distributed
from ltkernels.train.rundir import check_file
from ltkernels.train.select import check_labelled, load_features

# Rows taken in together: a memory-mapped file is never read whole.
_BLOCK = 1 << 16


def write_statistics(
    path: str | Path, *, out: str | Path | None = None, labels: str | Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Count, mean and scatter of every class of a file of features (see `select.load_features`; `class_names` too, if it has
    them), written to `out` for other parties; what the file reveals is said at `ClassStatistics`.

    The features are streamed. Several processes (torchrun) share the rows out, and the first one writes. Returns names,
    counts and diversity (V, None without samples) of the classes, and parties, which is empty. Raises FileExistsError where
    `out` is there and `force` is not given, FileNotFoundError, or ValueError naming the file.
    """
    path = Path(path)
    with distributed.joined("cpu") as world:
        with together(world.ranks):
            if world.is_main:
                check_file(out, force)
            arrays = load_features(path, None if labels is None else Path(labels))
            x, y = check_labelled(path, arrays, "features", "labels")
            given = arrays.get("class_names")
            names = int(y.max()) + 1 if given is None else list(given.ravel())
            try:
                statistics = ClassStatistics(x.shape[1], names)
                begin, end = (len(x) * (world.rank + i) // world.size for i in range(2))
                for first in range(begin, end, _BLOCK):
                    last = min(end, first + _BLOCK)
                    statistics.update(x[first:last], y[first:last])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        if world.ranks is not None:
            statistics.all_reduce()
        with together(world.ranks):
            if world.is_main and out is not None:
                statistics.save(out)
    return _result(statistics, str(path))


def merge_statistics(
    paths: Sequence[str | Path], *, out: str | Path | None = None, force: bool = False
) -> dict[str, Any]:
    """The files of several parties as one, written to `out`. Classes are matched by name.

    Returns names, counts and diversity of the classes of the union, and for every party its file, counts, diversity and gain:
    the Feature Diversity Gain of the union over its own samples (V(union) / V(own) - 1; None where it has fewer than two
    samples of a class, or equal ones); and notes, sentences on parties that hold the same. Raises FileExistsError where `out` is there
    and `force` is not given, FileNotFoundError, or ValueError naming the file.
    """
    distributed.refuse("merging files of statistics")
    check_file(out, force)
    if not paths:
        raise ValueError("paths is empty: there must be a file to merge")
    parties = [ClassStatistics.load(path) for path in paths]
    notes = []
    for (first, one), (second, other) in itertools.combinations(zip(paths, parties), 2):
        if Path(first).samefile(second):
            raise ValueError(f"--merge: {second} is {first}: its samples would count twice")
        if _equal(one, other):
            notes.append(f"{second} holds the same numbers as {first}: if these are the same samples, they count twice")
    union = ClassStatistics(parties[0].width, parties[0].names)
    for path, party in zip(paths, parties):
        try:
            union.merge(party)
        except ValueError as error:
            raise ValueError(f"{path}: {error}".replace("other has", "has")) from None
    result = _result(union, "the union") | {"notes": notes}
    for path, party in zip(paths, parties):
        own = dict(zip(party.names, zip(party.counts, _values(party, str(path)))))
        counts, values = zip(*(own.get(name, (0, None)) for name in union.names))
        gain = [v / w - 1.0 if v and w and n > 1 else None for v, w, n in zip(result["diversity"], values, counts)]
        result["parties"].append({"file": str(path), "counts": counts, "diversity": values, "gain": gain})
    if out is not None:
        union.save(out)
    return result


def _equal(one: ClassStatistics, other: ClassStatistics) -> bool:
    """Whether both hold the same numbers of the same classes, and so have seen the same samples."""
    return (
        one.names == other.names
        and one.counts == other.counts
        and any(one.counts)
        and all(
            torch.equal(a.scatter, b.scatter) and torch.equal(a.mean, b.mean)
            for a, b in zip(one.classes, other.classes)
        )
    )


def _result(statistics: ClassStatistics, what: str) -> dict[str, Any]:
    values = _values(statistics, what)
    return {"names": list(statistics.names), "counts": statistics.counts, "diversity": values, "parties": []}


def _values(statistics: ClassStatistics, what: str) -> list[float | None]:
    values = statistics.diversity().tolist()
    for name, count, value in zip(statistics.names, statistics.counts, values):
        if count and not math.isfinite(value):
            raise ValueError(f"{what}: class {name!r}: the diversity overflows float64; scale the features down")
    return [value if count else None for value, count in zip(values, statistics.counts)]
