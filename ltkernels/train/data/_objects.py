"""Data sets of other libraries as ours: torch `Dataset`s and `DataLoader`s, Hugging Face `datasets`, loaders by import path."""

import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ltkernels._arrays import plain
from ltkernels.train.data import _lazy
from ltkernels.train.data._archive import clipped
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import Source
from ltkernels.train.data._pictures import build
from ltkernels.train.data._split import with_test

_IMAGE, _LABEL = ("image", "img", "picture", "features", "x"), ("label", "labels", "fine_label", "target", "y")
_PARTS = {"train": "train", "test": "test", "validation": "val", "valid": "val", "val": "val"}


def from_torch(
    train: Iterable[Any], test: Iterable[Any] | None = None, *, workers: int | None = None, **settings: Any
) -> Dataset:
    """A data set from torch `Dataset`s of (sample, label) pairs, or `DataLoader`s of such batches.

    Samples are tensors or arrays of one shape, as `Dataset.from_arrays` takes them (standardisation is ours: leave it out of the
    transform), or PIL images of one size. They are read once into memory; those of a `Dataset` with a length that are more than
    fit are read batch by batch, by `workers` processes (None: by the cores), and their labels from its attribute `targets` where
    it has one. `settings` go to `Dataset.from_arrays` (class_names, name, test_split, ...); the names of classes are those of
    `train.classes` where it has them. Raises ValueError or TypeError in words.
    """
    names = getattr(train, "classes", None)
    if names is not None and "class_names" not in settings:
        settings["class_names"] = list(names)
    arrays: dict[str, Any] = {}
    for part, source in (("train", train), ("test", test)):
        if source is not None:
            arrays[f"x_{part}"], arrays[f"y_{part}"] = _read(part, source, workers)
    return Dataset.from_arrays(**arrays, **settings)


def _item(source: Any, row: int) -> np.ndarray:
    return _sample(source[row][0])


def _read(name: str, source: Any, workers: int | None) -> tuple[np.ndarray | _lazy.LazySamples, np.ndarray]:
    batched = isinstance(source, DataLoader)
    pairs: Iterable[Any] = source
    if hasattr(source, "__len__") and not batched:
        # A map-style Dataset need not be iterable: Python's own protocol would never end where __getitem__ raises no IndexError.
        first = _pair(name, source[0])[0] if len(source) else np.empty(0)
        if first.ndim == 3 and first.nbytes * len(source) > _lazy.MAX_IN_MEMORY:
            targets = getattr(source, "targets", None)
            known = targets is not None and len(targets) == len(source)
            labels = targets if known else [source[i][1] for i in range(len(source))]
            # Its content is not known without reading all of it.
            digest = f"{type(source).__qualname__} {(len(source), *first.shape)}".encode()
            items = _lazy.Items(partial(_item, source), len(source), first, digest)
            return _lazy.LazySamples(items, workers), np.asarray(labels)
        pairs = (source[i] for i in range(len(source)))
    samples, labels = [], []
    for item in pairs:
        sample, label = _pair(name, item)
        samples.append(sample)
        labels.append(label)
        if sample.shape[batched:] != samples[0].shape[batched:]:
            raise ValueError(f"{name}: samples of shapes {samples[0].shape[batched:]} and {sample.shape[batched:]}")
    if not samples:
        raise ValueError(f"{name} is empty")
    join = np.concatenate if batched else np.stack
    return join(samples), join(labels)


def _pair(name: str, item: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(item, Sequence) or len(item) != 2:
        raise TypeError(f"{name} must give (sample, label) pairs, got {type(item).__name__}")
    return _sample(item[0]), np.asarray(item[1])


def _sample(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    array = np.asarray(value)
    # PIL gives (height, width, channels).
    return array.transpose(2, 0, 1) if hasattr(value, "getbands") and array.ndim == 3 else plain(array)


def from_huggingface(
    source: Any, *, image_size: int | None = None, request: DataRequest | None = None, **settings: Any
) -> Dataset:
    """A data set from a Hugging Face `Dataset` or `DatasetDict` (splits train, and test or validation where there are).

    The column of labels is called label (labels, target, y), a `ClassLabel` or plain values. That of samples is called image (img,
    features, x) and holds pictures, brought to `image_size` (see `data.load` for what else `request` says of them), or equal lists
    of numbers; without one, all other columns are numbers. `settings` go to `Dataset.from_arrays`. Raises ValueError in words.
    """
    given = dict(source) if isinstance(source, Mapping) else {"train": source}
    if "train" not in given:
        raise ValueError(f"the data set has no split train; it has {', '.join(map(str, given))}")
    parts, notes = with_test({part: (name, given[name]) for name, part in _PARTS.items() if name in given})
    first = given["train"]
    label, image = (next((c for c in names if c in first.column_names), None) for names in (_LABEL, _IMAGE))
    if label is None:
        raise ValueError(f"no column of labels: none is called {', '.join(_LABEL)}; there are {first.column_names}")
    if hasattr(first.features[label], "names"):
        settings.setdefault("class_names", list(first.features[label].names))
    labels = {part: np.asarray(rows[label]) for part, (_, rows) in parts.items()}
    if image is not None and type(first.features[image]).__name__ == "Image":
        request = replace(
            request or DataRequest(),
            image_size=image_size,
            **{key: settings.pop(key) for key in DataRequest().division() if key in settings},
        )
        root = Path(request.argument) if request.argument else None
        pictures = {part: (_sources(rows, name, image, root), labels[part]) for part, (name, rows) in parts.items()}
        name, names = settings.pop("name", "custom"), settings.pop("class_names", None)
        return build(request, name, name, pictures, names, notes)
    columns = [image] if image else [name for name in first.column_names if name != label]
    if image is None:
        settings.setdefault("column_names", columns)
    arrays = {f"x_{part}": _numbers(rows, columns) for part, (_, rows) in parts.items()}
    arrays |= {f"y_{part}": y for part, y in labels.items()}
    return Dataset.from_arrays(**arrays, notes=notes, **settings)


def _numbers(part: Any, columns: Sequence[str]) -> np.ndarray:
    # Its own numpy format would round float64 to float32.
    given = part.select_columns(list(columns)).with_format("arrow")[:]
    parts = [given.column(name).to_numpy() for name in columns]
    if len(parts) == 1 and parts[0].dtype == object and len({np.shape(row) for row in parts[0]}) == 1:
        parts = [np.array(parts[0].tolist())]
    strange = next((name for name, x in zip(columns, parts) if x.dtype.kind not in "biuf"), None)
    if strange is not None:
        raise ValueError(f"column {strange} holds no numbers of one shape; samples are a column {', '.join(_IMAGE)}")
    return parts[0] if len(parts) == 1 and parts[0].ndim > 1 else np.column_stack(parts)


def _sources(part: Any, split: str, column: str, root: Path | None) -> list[Source]:
    """The pictures of a column as they were stored: decoded by us, within the bounds of all files."""
    from datasets import Image

    stored = part.select_columns([column]).cast_column(column, Image(decode=False))
    return [
        Source(f"{split}[{i}]", partial(_stored, stored, column, i, root), stamp=f"{part._fingerprint}")
        for i in range(len(stored))
    ]


def _stored(stored: Any, column: str, row: int, root: Path | None) -> BinaryIO:
    entry = stored[row][column]
    if entry["bytes"] is not None:
        return io.BytesIO(entry["bytes"])
    place = Path(entry["path"])
    if root is not None and not place.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"its picture {clipped(place)} lies outside of the data set's folder")
    return place.open("rb")


def load_huggingface(request: DataRequest) -> Dataset:
    """Load hf:PATH, a folder that `datasets`' save_to_disk wrote. Nothing is downloaded. Raises ValueError naming the folder,
    ImportError without the package."""
    path = Path(request.argument).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder (hf:PATH is a folder of `save_to_disk`; nothing is downloaded)"
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hf:PATH needs the package datasets: pip install datasets") from error
    settings = {"name": f"hf:{path.name}", **request.division()}
    request = replace(request, argument=str(path))
    try:
        given = datasets.load_from_disk(str(path))
        return from_huggingface(given, image_size=request.image_size, request=request, **settings)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise ValueError(f"{path}: {str(error)[:300]}") from error


def load_by_import(name: str, request: DataRequest) -> Dataset:
    """The data set that the function `package.module:function` gives for `request`. ValueError where it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        loader = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data set {name!r} cannot be imported: {error}") from error
    given = loader(request)
    if isinstance(given, TorchDataset | DataLoader):
        given = (given,)
    if isinstance(given, tuple) and 1 <= len(given) <= 2:
        given = from_torch(*given, name=name, workers=request.workers, **request.division())
    return given
