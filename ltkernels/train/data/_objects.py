"""Data sets of other libraries as ours: torch `Dataset`s and `DataLoader`s, Hugging Face `datasets`, loaders by import path."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels._arrays import plain
from ltkernels.train.data._dataset import DataRequest, Dataset

_IMAGE, _LABEL = ("image", "img", "picture", "features", "x"), ("label", "labels", "fine_label", "target", "y")
_VALIDATION = ("validation", "valid", "val")


def from_torch(train: Iterable[Any], test: Iterable[Any] | None = None, **settings: Any) -> Dataset:
    """A data set from torch `Dataset`s of (sample, label) pairs, or `DataLoader`s of such batches, read once into memory.

    Samples are tensors or arrays of one shape, as `Dataset.from_arrays` takes them (standardisation is ours: leave it out of the
    transform), or PIL images of one size. `settings` go to `Dataset.from_arrays` (class_names, name, test_split, ...); the names
    of classes are those of `train.classes` where it has them. Raises ValueError or TypeError in words.
    """
    names = getattr(train, "classes", None)
    if names is not None and "class_names" not in settings:
        settings["class_names"] = list(names)
    arrays = dict(zip(("x_train", "y_train"), _collected("train", train)))
    if test is not None:
        arrays |= dict(zip(("x_test", "y_test"), _collected("test", test)))
    return Dataset.from_arrays(**arrays, **settings)


def _collected(name: str, source: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    batched = isinstance(source, torch.utils.data.DataLoader)
    # A map-style Dataset need not be iterable: Python's own protocol would never end where __getitem__ raises no IndexError.
    items = source if batched or not hasattr(source, "__len__") else (source[i] for i in range(len(source)))  # type: ignore[index]
    samples, labels = [], []
    for item in items:
        if not isinstance(item, Sequence) or len(item) != 2:
            raise TypeError(f"{name} must give (sample, label) pairs, got {type(item).__name__}")
        samples.append(_sample(item[0]))
        labels.append(np.asarray(item[1]))
        if samples[-1].shape[batched:] != samples[0].shape[batched:]:
            raise ValueError(
                f"{name}: samples of shapes {samples[0].shape[batched:]} and {samples[-1].shape[batched:]}"
            )
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


def from_huggingface(source: Any, *, image_size: int | None = None, **settings: Any) -> Dataset:
    """A data set from a Hugging Face `Dataset` or `DatasetDict` (splits train, and test or validation where there are).

    The column of samples is called image (img, features, x) and holds pictures, brought to `image_size`, or equal lists of
    numbers; that of labels is called label (labels, target, y), a `ClassLabel` or plain values. `settings` go to
    `Dataset.from_arrays`. Raises ValueError in words.
    """
    parts = dict(source) if isinstance(source, Mapping) else {"train": source}
    if "train" not in parts:
        raise ValueError(f"the data set has no split train; it has {', '.join(map(str, parts))}")
    names = ["train"] + [name for name in ("test", *_VALIDATION) if name in parts]
    arrays: dict[str, Any] = {}
    pictures = False
    for name in names:
        part = parts[name]
        image, label = (
            _column(part.column_names, wanted, what) for wanted, what in ((_IMAGE, "samples"), (_LABEL, "labels"))
        )
        samples = part[image]
        key = name if name in ("train", "test") else ("val" if "test" in names else "test")
        pictures = hasattr(samples[0], "getbands")
        arrays[f"x_{key}"] = (
            _pixels(samples, image_size) if pictures else np.array([np.asarray(row) for row in samples])
        )
        arrays[f"y_{key}"] = np.asarray(part[label])
        if hasattr(part.features[label], "names"):
            settings.setdefault("class_names", list(part.features[label].names))
    return Dataset.from_arrays(**arrays, image_size=image_size if pictures else None, pictures=pictures, **settings)


def _column(columns: Sequence[str], wanted: Sequence[str], what: str) -> str:
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        raise ValueError(f"no column of {what}: none is called {', '.join(wanted)}; there are {', '.join(columns)}")
    return found


def _pixels(images: Iterable[Any], size: int | None) -> np.ndarray:
    from ltkernels.train.data._images import from_pillow

    return np.stack([from_pillow(image, size) for image in images]).transpose(0, 3, 1, 2)


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
    if request.imbalance is not None:
        raise ValueError("imbalance does not apply to hf:PATH; its training set is used as it is")
    settings = {"name": f"hf:{path.name}", "test_split": request.test_split, "seed": request.seed}
    try:
        return from_huggingface(datasets.load_from_disk(str(path)), image_size=request.image_size, **settings)
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
        given = from_torch(*given, name=name, test_split=request.test_split, seed=request.seed)
    return given
