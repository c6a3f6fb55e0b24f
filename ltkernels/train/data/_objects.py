"""Data sets of other libraries as ours: torch `Dataset`s and `DataLoader`s, Hugging Face `datasets`, loaders by import path."""

import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ltkernels._arrays import class_indices, plain
from ltkernels.train.data import _lazy
from ltkernels.train.data._archive import clipped
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import Source
from ltkernels.train.data._lazy import Raw
from ltkernels.train.data._pictures import Part, build

_IMAGE, _LABEL = ("image", "img", "picture", "features", "x"), ("label", "labels", "fine_label", "target", "y")
_VALIDATION = ("validation", "valid", "val")


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


class _Items:
    """Samples of a torch `Dataset`, read when they are asked for."""

    slow = True

    def __init__(self, source: Any) -> None:
        first = _sample(source[0][0])
        self._source, self.shape, self._dtype = source, (len(source), *first.shape), first.dtype
        # Its content is not known without reading all of it.
        self.digest = f"{type(source).__qualname__} {self.shape}".encode()

    def read(self, rows: Sequence[int]) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self._dtype)
        for i, row in enumerate(rows):
            sample = _sample(self._source[row][0])
            if sample.shape != self.shape[1:]:
                raise ValueError(f"sample {row} has the shape {sample.shape}, the first one {self.shape[1:]}")
            out[i] = sample
        return out


def _read(name: str, source: Any, workers: int | None) -> tuple[np.ndarray | Raw, np.ndarray]:
    if isinstance(source, torch.utils.data.DataLoader) or not hasattr(source, "__len__"):
        return _collected(name, source)
    if not len(source):
        raise ValueError(f"{name} is empty")
    # A map-style Dataset need not be iterable: Python's own protocol would never end where __getitem__ raises no IndexError.
    pairs = (source[i] for i in range(len(source)))
    first = _pair(name, source[0])[0]
    if len(first.shape) == 3 and first.nbytes * len(source) > _lazy.MAX_IN_MEMORY:
        targets = getattr(source, "targets", None)
        found = targets if targets is not None and len(targets) == len(source) else [item[1] for item in pairs]
        return Raw(_Items(source), workers=workers), np.asarray(found)
    return _collected(name, pairs, batched=False)


def _pair(name: str, item: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(item, Sequence) or len(item) != 2:
        raise TypeError(f"{name} must give (sample, label) pairs, got {type(item).__name__}")
    return _sample(item[0]), np.asarray(item[1])


def _collected(name: str, items: Iterable[Any], *, batched: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    batched = isinstance(items, torch.utils.data.DataLoader) if batched is None else batched
    samples, labels = [], []
    for item in items:
        sample, label = _pair(name, item)
        samples.append(sample)
        labels.append(label)
        if sample.shape[batched:] != samples[0].shape[batched:]:
            raise ValueError(f"{name}: samples of shapes {samples[0].shape[batched:]} and {sample.shape[batched:]}")
    if not samples:
        raise ValueError(f"{name} is empty")
    join = np.concatenate if batched else np.stack
    return join(samples), join(labels)


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
    parts = dict(source) if isinstance(source, Mapping) else {"train": source}
    if "train" not in parts:
        raise ValueError(f"the data set has no split train; it has {', '.join(map(str, parts))}")
    names = ["train"] + [name for name in ("test", *_VALIDATION) if name in parts]
    keys = {name: name if name in ("train", "test") else ("val" if "test" in names else "test") for name in names}
    first = parts["train"]
    label = _column(first.column_names, _LABEL)
    if label is None:
        raise ValueError(f"no column of labels: none is called {', '.join(_LABEL)}; there are {first.column_names}")
    image = _column(first.column_names, _IMAGE)
    if hasattr(first.features[label], "names"):
        settings.setdefault("class_names", list(first.features[label].names))
    labels = {keys[name]: np.asarray(parts[name][label]) for name in names}
    if image is None or type(first.features[image]).__name__ != "Image":
        columns = [image] if image else [name for name in first.column_names if name != label]
        given = {f"x_{keys[name]}": _numbers(parts[name], columns) for name in names}
        given |= {f"y_{key}": y for key, y in labels.items()}
        if image is None:
            settings.setdefault("column_names", columns)
        return Dataset.from_arrays(**given, **settings)
    request = replace(request or DataRequest(), image_size=image_size)
    numbers, found = class_indices({f"y_{key}": y for key, y in labels.items()}, settings.pop("class_names", None))
    pictures = {}
    for name in names:
        rows = _sources(parts[name], name, image, Path(request.argument) if request.argument else None)
        key = keys[name]
        pictures[key] = Part(rows, numbers[f"y_{key}"], tuple(row.name for row in rows))
    found = found or tuple(str(i) for i in range(1 + max(int(y.max()) for y in numbers.values())))
    return build(request, settings.pop("name", "custom"), pictures, found)


def _column(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in columns), None)


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
    settings = {"name": f"hf:{path.name}", "test_split": request.test_split, "seed": request.seed}
    try:
        given = datasets.load_from_disk(str(path))
        return from_huggingface(
            given, image_size=request.image_size, request=request.with_argument(str(path)), **settings
        )
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
    if isinstance(given, torch.utils.data.Dataset | torch.utils.data.DataLoader):
        given = (given,)
    if isinstance(given, tuple) and 1 <= len(given) <= 2:
        given = from_torch(*given, name=name, test_split=request.test_split, seed=request.seed, workers=request.workers)
    return given
