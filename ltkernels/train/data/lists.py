"""`list:PATH` and `csv:PATH`: data sets that are named by a text file.

`list:PATH`: a line `path label` a picture, as ImageNet-LT, Places-LT and iNaturalist are published; labels are numbers or names.
Beside a file whose name holds `train`, those with `test` and `val` in its place are read as well. Paths are relative to
--data-dir, or to the list's own folder.

`csv:PATH`: a table with a header. A column `label` (or class, target, category, y) is the label. With a column `path` (or file,
filename, image) the rows are pictures, as above; else every other column is a number, and the rows are vectors. A column
`split` says train, val or test.
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltkernels._arrays import class_indices
from ltkernels.train.data._archive import clipped
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import Source, of_file
from ltkernels.train.data._longtail import make_long_tailed
from ltkernels.train.data._pictures import Part, build
from ltkernels.train.data._split import listed

_LABEL = ("label", "class", "target", "category", "y")
_PATH = ("path", "file", "filename", "image")
_SPLIT = ("split", "subset", "partition")
_PARTS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_MAX_LINE = 1 << 16


def load_list(request: DataRequest) -> Dataset:
    """Load list:PATH. Raises FileNotFoundError or ValueError naming the file and line."""
    path = Path(request.argument).expanduser()
    paths, notes = {"train": path}, []
    for part in ("test", "val"):
        beside = path.with_name(re.sub("train", part, path.name, flags=re.IGNORECASE))
        if beside != path and beside.is_file():
            paths[part] = beside
            notes.append(f"the {part} set is {beside.name}")
    if "test" not in paths and "val" in paths:
        paths["test"] = paths.pop("val")
        notes = [f"the test set is {paths['test'].name}"]
    rows = {part: [_pair(line, where) for line, where in _lines(file)] for part, file in paths.items()}
    empty = next((part for part in rows if not rows[part]), None)
    if empty is not None:
        raise ValueError(f"{paths[empty]}: holds no line")
    return _pictures(request, path, "list", rows, notes)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each with its place for a message."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if len(line) > _MAX_LINE:
                raise ValueError(f"{path}: line {number} is longer than {_MAX_LINE} characters")
            if line.strip():
                yield line.strip(), f"{path}: line {number}"


def _pair(line: str, where: str) -> tuple[str, str]:
    """Path and label: the label is what follows the last space, so that paths may hold spaces."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise ValueError(f"{where}: not `path label`: {clipped(line, 80)!r}")
    return parts[0], parts[1]


def _pictures(
    request: DataRequest, path: Path, kind: str, rows: dict[str, list[tuple[str, str]]], notes: list[str]
) -> Dataset:
    root = (request.data_dir or path.parent).resolve()
    labels, names = _classes({f"the {part} set": [label for _, label in pairs] for part, pairs in rows.items()}, path)
    parts, inside = {}, {}
    for part, pairs in rows.items():
        sources = [_source(root, name, path, inside) for name, _ in pairs]
        parts[part] = Part(sources, labels[f"the {part} set"], [name for name, _ in pairs])
        there = np.bincount(parts[part].labels, minlength=len(names))
        if part != "val" and 0 in there:
            raise ValueError(f"{path}: the {part} set has no sample of class {clipped(names[int(there.argmin())])}")
    return build(request, f"{kind}:{path.name}", parts, names, notes)


def _source(root: Path, name: str, path: Path, inside: dict[str, bool]) -> Source:
    """`inside` remembers which folders lie in `root`: a list may have a million lines."""
    if "\0" in name:
        raise ValueError(f"{path}: {clipped(name)!r} is no name of a file")
    place = os.path.join(root, name)
    folder = os.path.dirname(place)
    if folder not in inside:
        inside[folder] = Path(folder).resolve().is_relative_to(root)
    # A list may come from anywhere: what it names outside the data's own folder would be read into a model without a word.
    if not (inside[folder] and (not os.path.islink(place) or Path(place).resolve().is_relative_to(root))):
        raise ValueError(f"{path}: {clipped(name)} leads out of {root} (--data-dir says where the files are)")
    if not os.path.isfile(place):
        raise FileNotFoundError(f"{path}: {clipped(place, 500)}: no such file (--data-dir says where the files are)")
    return of_file(place)


def _classes(given: dict[str, Sequence[str]], path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Class indices of labels in a text file, numbers or names, and the names."""
    arrays: dict[str, Any] = {part: np.array(labels) for part, labels in given.items()}
    if all(re.fullmatch(r"[0-9]{1,18}(\.0+)?", label) for labels in given.values() for label in labels):
        arrays = {part: labels.astype(np.float64) for part, labels in arrays.items()}
    try:
        labels, names = class_indices(arrays)
        most, count = max(int(part.max()) for part in labels.values()), sum(map(len, labels.values()))
        if most >= count:
            raise ValueError(f"the labels reach {most}, of {count} samples: some class has none")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return labels, names or tuple(str(i) for i in range(most + 1))


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file, with commas, semicolons or tabs. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            sample = file.read(_MAX_LINE)
            file.seek(0)
            first = sample.partition("\n")[0]
            delimiter = max(",;\t", key=first.count)
            table = [row for row in csv.reader(file, delimiter=delimiter) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    if len(table) < 2:
        raise ValueError(f"{path}: holds no row below a header")
    header, rows = [cell.strip() for cell in table[0]], table[1:]
    short = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if short is not None:
        raise ValueError(f"{path}: row {short + 1} has {len(rows[short])} cells, the header {len(header)}")
    return header, rows


def _numeric(header: Sequence[str]) -> list[int]:
    others = {_column(header, names) for names in (_LABEL, _SPLIT)}
    return [c for c in range(len(header)) if c not in others]


def read_numbers(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, columns) float64: all columns but those of labels and split. Raises ValueError naming file, row and column."""
    columns = _numeric(header)
    if not columns:
        raise ValueError(f"{path}: no column beside the label")
    x = np.empty((len(rows), len(columns)))
    for j, c in enumerate(columns):
        for i, row in enumerate(rows):
            try:
                x[i, j] = float(row[c])
            except ValueError:
                raise ValueError(f"{path}: row {i + 1}: {header[c]} is {clipped(row[c], 80)!r}, not a number") from None
    return x


def load_csv(request: DataRequest) -> Dataset:
    """Load csv:PATH. Raises FileNotFoundError or ValueError naming the file and the line or column."""
    path = Path(request.argument).expanduser()
    header, rows = read_table(path)
    label, picture, split = (_column(header, names) for names in (_LABEL, _PATH, _SPLIT))
    if label is None:
        raise ValueError(f"{path}: no column is called {', '.join(_LABEL)}; it has {listed(header, 12)}")
    chosen = {"train": list(range(len(rows)))}
    if split is not None:
        chosen = {}
        for i, row in enumerate(rows):
            part = _PARTS.get(row[split].strip().lower())
            if part is None:
                raise ValueError(
                    f"{path}: row {i + 1}: {header[split]} is {clipped(row[split], 80)!r}, not train, val or test"
                )
            chosen.setdefault(part, []).append(i)
        if "train" not in chosen:
            raise ValueError(f"{path}: {header[split]} says train in no row")
        if "test" not in chosen and "val" in chosen:
            chosen["test"] = chosen.pop("val")
    if picture is not None:
        pairs = {part: [(rows[i][picture], rows[i][label].strip()) for i in index] for part, index in chosen.items()}
        return _pictures(request, path, "csv", pairs, [])
    return _vectors(request, path, header, rows, chosen, label)


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in names if name in lower), None)


def _vectors(
    request: DataRequest,
    path: Path,
    header: list[str],
    rows: list[list[str]],
    chosen: dict[str, list[int]],
    label: int,
) -> Dataset:
    x = read_numbers(path, header, rows)
    labels, names = _classes({part: [rows[i][label].strip() for i in index] for part, index in chosen.items()}, path)
    if request.imbalance is not None:
        if "test" not in chosen:
            raise ValueError(f"{path}: imbalance thins the training set; a column split must name a test set")
        kept = make_long_tailed(labels["train"], request.imbalance, request.profile, request.seed)
        chosen = {**chosen, "train": [chosen["train"][i] for i in kept]}
        labels = {**labels, "train": labels["train"][kept]}
    arrays = {}
    for part, index in chosen.items():
        arrays |= {f"x_{part}": x[index], f"y_{part}": labels[part]}
    try:
        return Dataset.from_arrays(
            **arrays,
            class_names=names,
            name=f"csv:{path.name}",
            test_split=request.test_split,
            seed=request.seed,
            column_names=[header[c] for c in _numeric(header)],
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
