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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltkernels.train.data._archive import clipped
from ltkernels.train.data._dataset import DataRequest, Dataset, naming
from ltkernels.train.data._images import Source, of_file
from ltkernels.train.data._pictures import build
from ltkernels.train.data._split import listed, with_test

_LABEL = ("label", "class", "target", "category", "y")
_PATH = ("path", "file", "filename", "image")
_SPLIT = ("split", "subset", "partition")
_PARTS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_MAX_LINE = 1 << 16


def load_list(request: DataRequest) -> Dataset:
    """Load list:PATH. Raises FileNotFoundError or ValueError naming the file and line."""
    path = Path(request.argument).expanduser()
    rows, notes = {"train": _pairs(path)}, []
    for part in ("test", "val"):
        beside = path.with_name(re.sub("train", part, path.name, flags=re.IGNORECASE))
        if beside != path and beside.is_file():
            rows[part] = _pairs(beside)
            notes.append(f"the {part} set is {beside.name}")
    return _pictures(request, path, f"list:{path.name}", rows, notes)


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Path and label of each line that is not blank: the label is what follows the last space, so that paths may hold spaces."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    pairs = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            parts = line.strip().rsplit(maxsplit=1)
            if len(line) > _MAX_LINE:
                raise ValueError(f"{path}: line {number} is longer than {_MAX_LINE} characters")
            if len(parts) == 1:
                raise ValueError(f"{path}: line {number}: not `path label`: {clipped(parts[0], 80)!r}")
            if parts:
                pairs.append((parts[0], parts[1]))
    if not pairs:
        raise ValueError(f"{path}: holds no line")
    return pairs


def _pictures(
    request: DataRequest, path: Path, name: str, rows: dict[str, list[tuple[str, str]]], notes: Sequence[str] = ()
) -> Dataset:
    root = (request.data_dir or path.parent).resolve()
    inside: dict[str, bool] = {}
    sources = {part: [_source(root, file, path, inside) for file, _ in pairs] for part, pairs in rows.items()}
    labels = _labels({part: [label for _, label in pairs] for part, pairs in rows.items()})
    return build(request, name, path, {part: (sources[part], labels[part]) for part in rows}, None, notes)


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
    return of_file(place, name)


def _labels(given: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Labels in a text file as names, or as numbers where all are."""
    number = re.compile(r"[0-9]{1,18}(\.0+)?")
    numeric = all(number.fullmatch(label) for labels in given.values() for label in labels)
    return {part: np.array(labels).astype(np.float64 if numeric else np.str_) for part, labels in given.items()}


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file, with commas, semicolons or tabs. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.read(_MAX_LINE).partition("\n")[0]
            file.seek(0)
            table = list(csv.reader(file, delimiter=max(",;\t", key=first.count)))
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    header, *rows = [row for row in table if any(cell.strip() for cell in row)] or [[]]
    if not rows:
        raise ValueError(f"{path}: holds no row below a header")
    short = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if short is not None:
        raise ValueError(f"{path}: row {short + 1} has {len(rows[short])} cells, the header {len(header)}")
    return [cell.strip() for cell in header], rows


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in names if name in lower), None)


def _numeric(header: Sequence[str]) -> list[int]:
    """The columns but those of labels and split."""
    others = {_column(header, _LABEL), _column(header, _SPLIT)}
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
    index = {"train": list(range(len(rows)))}
    if split is not None:
        index = {}
        for i, row in enumerate(rows):
            part = _PARTS.get(row[split].strip().lower())
            if part is None:
                said = clipped(row[split], 80)
                raise ValueError(f"{path}: row {i + 1}: {header[split]} is {said!r}, not train, val or test")
            index.setdefault(part, []).append(i)
        if "train" not in index:
            raise ValueError(f"{path}: {header[split]} says train in no row")
    name = f"csv:{path.name}"
    if picture is not None:
        pairs = {part: [(rows[i][picture], rows[i][label].strip()) for i in chosen] for part, chosen in index.items()}
        return _pictures(request, path, name, pairs)
    x = read_numbers(path, header, rows)
    index, notes = with_test(index)
    labels = _labels({part: [rows[i][label].strip() for i in chosen] for part, chosen in index.items()})
    arrays: dict[str, Any] = {f"x_{part}": x[chosen] for part, chosen in index.items()}
    with naming(path):
        return Dataset.from_arrays(
            **arrays,
            **{f"y_{part}": y for part, y in labels.items()},
            name=name,
            notes=notes,
            column_names=[header[c] for c in _numeric(header)],
            **request.division(),
        )
