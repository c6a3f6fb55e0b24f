"""What every data set gives the trainer: labelled tensors, class names, how samples are prepared, defaults for the recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels._arrays import class_indices, plain, text
from ltkernels.train.data._lazy import LazySamples, Raw, Samples
from ltkernels.train.data._split import listed, split_off

MAX_VALUES = 1 << 28
"""Of one sample."""

Array = np.ndarray | Tensor
_BLOCK_VALUES = 1 << 22  # looked at together in float64
_CHANNELS = (1, 3, 4)  # of pictures as arrays
_FAR_APART = 100.0  # spreads of columns
_SAMPLED = 1024  # training samples that mean and deviation are taken of, where not all are in memory


@dataclass(frozen=True)
class DataRequest:
    """What the user asked of a data set; None means the data set's own default. `image_size` is the side in pixels that
    images from files are brought to; `test_split` the share of each class that becomes the test set where there is none. `cache` is
    a folder for decoded images, `workers` the number of processes that decode while a model trains, and `progress(phase, done,
    total, {})` is told of what is decoded."""

    argument: str = ""
    data_dir: Path | None = None
    imbalance: float | None = None
    profile: str = "exp"
    seed: int = 0
    image_size: int | None = None
    test_split: float = 0.2
    cache: Path | None = None
    workers: int | None = None
    progress: Callable[[str, int, int, dict[str, Any]], None] | None = None

    def with_argument(self, argument: str) -> "DataRequest":
        return replace(self, argument=argument)


@dataclass(frozen=True)
class Preprocessing:
    """What makes a model's input of a raw sample: (sample - mean) / std, in float64, rounded to float32 at the end.

    `mean` and `std` are float64, (channels,) for images of `input_shape` (channels, height, width), (features,) or (1,) for
    vectors. `pictures`: samples were decoded from image files, with `image_size` where it is not None.
    """

    input_shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    image_size: int | None = None
    pictures: bool = False

    def __call__(self, raw: Array) -> Tensor:
        """(n, *input_shape) float32 of raw samples (images: also (n, height, width), and channels last). ValueError in words."""
        samples, _ = read_samples("samples", raw)
        if samples.shape[1:] != self.input_shape:
            raise ValueError(f"samples have the shape {samples.shape[1:]}; the model takes {self.input_shape}")
        return standardised("samples", samples, self.mean, self.std)


@dataclass(frozen=True)
class Dataset:
    """A labelled training and test set, and a validation set where there is one, in memory or read from files batch by batch.

    `x_train` (n, ...) and `x_test` (m, ...) are float32, standardised; images are (n, channels, height, width).
    `y_train` and `y_test` are int64 class indices. `defaults` holds what suits this data where the user says nothing
    (epochs, batch_size, lr, threads). `mean` and `std` are what the samples were standardised by, (channels,) for images
    and (features,) for vectors: -mean / std is the value of a black pixel, which a crop with padding brings in. `notes` are
    sentences on what was done to the data; `train_files` and `test_files` name the samples' files.
    """

    name: str
    x_train: Samples
    y_train: Tensor
    x_test: Samples
    y_test: Tensor
    class_names: tuple[str, ...]
    defaults: dict[str, float | int] = field(default_factory=dict)
    mean: Tensor | None = None
    std: Tensor | None = None
    x_val: Samples | None = None
    y_val: Tensor | None = None
    image_size: int | None = None
    pictures: bool = False
    notes: tuple[str, ...] = ()
    train_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Training samples per class, in label order."""
        return torch.bincount(self.y_train, minlength=self.num_classes).tolist()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_train.shape[1:])

    @property
    def preprocessing(self) -> Preprocessing:
        """What was done to the samples: a data set that brings no mean was prepared by its maker."""
        mean = torch.zeros(1) if self.mean is None else self.mean
        std = torch.ones(1) if self.std is None else self.std
        return Preprocessing(self.input_shape, mean.double(), std.double(), self.image_size, self.pictures)

    @classmethod
    def from_arrays(
        cls,
        x_train: Array,
        y_train: Array | Sequence[Any],
        x_test: Array | None = None,
        y_test: Array | Sequence[Any] | None = None,
        *,
        x_val: Array | None = None,
        y_val: Array | Sequence[Any] | None = None,
        class_names: Sequence[Any] | None = None,
        name: str = "custom",
        defaults: dict[str, float | int] | None = None,
        test_split: float = 0.2,
        seed: int = 0,
        column_names: Sequence[str] | None = None,
        **about: Any,
    ) -> "Dataset":
        """Build a data set from arrays or tensors, of any byte order and strides.

        Images are (n, height, width), (n, channels, height, width) or, recognised by a last size of 1, 3 or 4 where the second
        is none of these, (n, height, width, channels); vectors are (n, features); of any real dtype. They become float32,
        standardised in float64 by the training set's mean and standard deviation, per channel for images and per column for
        vectors. Labels are class indices from 0 or from 1, also as floats, or names of classes (see
        `ltkernels._arrays.class_indices`). Without x_test and y_test, a share `test_split` of every class is held out, drawn by
        `seed`; a class of one sample is then left out. `column_names` are those of vectors, for notes.
        `about` are further fields (image_size, train_files, ...).

        Raises ValueError or TypeError naming the argument for shapes that disagree, labels out of range, non-finite values, and
        classes without a training or test sample.
        """
        if (x_test is None) != (y_test is None) or (x_val is None) != (y_val is None):
            raise ValueError("samples and labels go together: x_test with y_test, x_val with y_val")
        given = {"train": (x_train, y_train), "test": (x_test, y_test), "val": (x_val, y_val)}
        given = {part: pair for part, pair in given.items() if pair[0] is not None}
        notes = list(about.pop("notes", ()))
        samples = {
            part: (x, False) if isinstance(x, Raw) else read_samples(f"x_{part}", x) for part, (x, _) in given.items()
        }
        if samples["train"][1]:
            notes.append("images are read as (n, height, width, channels)")
        samples_of = {part: x for part, (x, _) in samples.items()}
        numbers, found = class_indices(
            {f"y_{part}": _array(f"y_{part}", y) for part, (_, y) in given.items()}, class_names
        )
        labels = {part: _labels(f"y_{part}", numbers[f"y_{part}"], len(samples_of[part])) for part in given}
        num_classes = len(found) if found is not None else 1 + max(int(y.max()) for y in labels.values())
        for part, x in samples_of.items():
            if x.shape[1:] != samples_of["train"].shape[1:]:
                raise ValueError(
                    f"x_{part} has samples of shape {x.shape[1:]}, x_train {samples_of['train'].shape[1:]}"
                )
            _check_classes(f"y_{part}", labels[part], num_classes, all_there=part != "val")
        names: Sequence[str] = found if found is not None else [str(i) for i in range(num_classes)]
        if "test" not in given:
            split, names, said = split_off(labels["train"], names, test_split, seed)
            notes += said
            x, y, files = samples_of["train"], split.renumbered[labels["train"]], about.get("train_files")
            for part, rows in (("train", split.kept), ("test", split.held)):
                samples_of[part], labels[part] = x[rows], y[rows]
                if files:
                    about[f"{part}_files"] = tuple(files[i] for i in rows)
            if "val" in labels:
                y = split.renumbered[labels["val"]]
                samples_of["val"], labels["val"] = samples_of["val"][y >= 0], y[y >= 0]
        some, more = _some(samples_of["train"], seed)
        mean, std, said = _moments(some, column_names)
        notes += more
        tensors = {f"x_{part}": standardised(f"x_{part}", x, mean, std) for part, x in samples_of.items()}
        tensors |= {f"y_{part}": torch.from_numpy(y) for part, y in labels.items()}
        about["notes"] = (*notes, *said)
        return cls(
            name=name, class_names=tuple(names), defaults=dict(defaults or {}), mean=mean, std=std, **tensors, **about
        )  # fmt: skip


def _array(argument: str, value: Any) -> np.ndarray:
    """Any array, tensor or list as a plain array of numbers or strings."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"{argument} must be real, got {value.dtype}")
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value.resolve_neg()).numpy()
    array = np.asarray(value)
    if array.dtype.kind == "O" and all(isinstance(item, str | bytes) for item in array.flat):
        array = np.array([text(item) for item in array.flat]).reshape(array.shape)
    if array.dtype.kind not in "biufSUc":
        raise TypeError(f"{argument} must hold numbers or names, got {array.dtype}")
    return plain(array)


def read_samples(argument: str, value: Any) -> tuple[np.ndarray, bool]:
    """Samples as (n, features) or (n, channels, height, width), finite, and whether the channels came last.

    Raises TypeError or ValueError naming the argument.
    """
    array = _array(argument, value)
    if array.dtype.kind not in "biuf":
        what = "real" if array.dtype.kind == "c" else "numbers"
        raise TypeError(f"{argument} must {'be' if what == 'real' else 'hold'} {what}, got {array.dtype}")
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(
            f"{argument} must be (n, features), (n, height, width) or (n, channels, height, width), got shape {array.shape}"
        )
    last = array.ndim == 4 and array.shape[3] in _CHANNELS and array.shape[1] not in _CHANNELS
    if last:
        array = array.transpose(0, 3, 1, 2)
    if array.dtype.kind == "f" and not all(np.isfinite(block).all() for block in _blocks(array)):
        raise ValueError(f"{argument} holds NaN or infinite values")
    return (array[:, None] if array.ndim == 3 else array), last


def _blocks(array: np.ndarray) -> list[np.ndarray]:
    rows = max(1, _BLOCK_VALUES // max(1, array[0].size))
    return [array[i : i + rows] for i in range(0, len(array), rows)]


def _along(values: Tensor, dim: int) -> Tensor:
    """(C,) values along axis 1 of samples of `dim` axes."""
    return values.double().view(1, -1, *[1] * (dim - 2))


def standardised(argument: str, samples: np.ndarray | Raw, mean: Tensor, std: Tensor) -> Samples:
    """(n, ...) float32: (samples - mean) / std in float64. ValueError where the result has no place in float32."""
    if isinstance(samples, Raw):
        return LazySamples(samples, partial(_standardise, mean, std))
    result = torch.empty(samples.shape, dtype=torch.float32)
    at = 0
    for block in _blocks(samples):
        result[at : at + len(block)] = _standardise(
            mean, std, torch.from_numpy(np.ascontiguousarray(block, np.float64))
        )
        at += len(block)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(f"{argument} cannot be standardised in float32: its values are too large")
    return result


def _standardise(mean: Tensor, std: Tensor, samples: Tensor) -> Tensor:
    shift, scale = (_along(values.to(samples.device), samples.dim()) for values in (mean, std))
    result = torch.empty(samples.shape, dtype=torch.float32, device=samples.device)
    rows = max(1, _BLOCK_VALUES // max(1, samples[:1].numel()))
    for block, out in zip(samples.split(rows), result.split(rows)):
        out.copy_((block.double() - shift).div_(scale))
    return result


def _some(samples: np.ndarray | Raw, seed: int) -> tuple[np.ndarray, list[str]]:
    """What mean and standard deviation are taken of: everything, or as many as are soon read."""
    if not isinstance(samples, Raw) or len(samples) <= _SAMPLED:
        return (samples.read() if isinstance(samples, Raw) else samples), []
    chosen = np.sort(np.random.default_rng([seed, 30_000]).permutation(len(samples))[:_SAMPLED])
    notes = [f"mean and standard deviation are those of {_SAMPLED} of the {len(samples)} training samples"]
    return np.concatenate(list(samples[chosen].in_order())), notes


def _moments(samples: np.ndarray, names: Sequence[str] | None) -> tuple[Tensor, Tensor, list[str]]:
    """Mean and standard deviation (n - 1) by channel or column, in two float64 passes, and what is strange about them."""
    axes = (0, *range(2, samples.ndim))
    count = samples.size // samples.shape[1]
    shape = (1, -1, *[1] * (samples.ndim - 2))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = sum(block.sum(axes, dtype=np.float64) for block in _blocks(samples)) / count
        square = sum(np.square(block - mean.reshape(shape)).sum(axes) for block in _blocks(samples))
        std = np.sqrt(square / max(1, count - 1))
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise ValueError("x_train cannot be standardised: its values are too large for float64")
    largest = np.max([np.abs(block.astype(np.float64)).max(axes) for block in _blocks(samples)], 0)
    # The mean of equal numbers need not be that number in the last place.
    constant = std <= 8 * np.finfo(np.float64).eps * largest
    notes = []
    if samples.ndim == 2:
        names = names or [str(c) for c in range(samples.shape[1])]
        columns = np.flatnonzero(constant)
        if len(columns):
            notes.append(f"constant, and of no use: column {listed([names[c] for c in columns])} of {samples.shape[1]}")
        spread = std[~constant]
        if len(spread) and spread.max() > _FAR_APART * spread.min():
            wide, narrow = (int(np.flatnonzero(std == value)[0]) for value in (spread.max(), spread.min()))
            notes.append(
                f"column {names[wide]} spreads {spread.max() / spread.min():.3g} times as far as column {names[narrow]}: each column is "
                "standardised by itself"
            )
    elif constant.all():
        notes.append("all pixels have one and the same value")
    return torch.from_numpy(mean), torch.from_numpy(np.where(constant, 1.0, std)), notes


def _labels(argument: str, labels: np.ndarray, length: int) -> np.ndarray:
    if labels.shape != (length,):
        raise ValueError(f"{argument} must have shape ({length},), got {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"{argument} holds the negative label {labels.min()}")
    return labels


def _check_classes(argument: str, labels: np.ndarray, num_classes: int, *, all_there: bool) -> None:
    if labels.max() >= num_classes:
        raise ValueError(f"{argument} holds label {labels.max()}, but there are {num_classes} classes")
    if not all_there:
        return
    # Before a table of all classes is made: one forged label would make it as large as it likes.
    if num_classes > len(labels):
        raise ValueError(f"{argument} has {len(labels)} samples for {num_classes} classes: some have none")
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0).tolist()
    if empty:
        raise ValueError(f"{argument} has no sample of class {', '.join(map(str, empty))}")
