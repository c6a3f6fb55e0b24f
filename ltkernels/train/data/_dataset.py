"""What every data set gives the trainer: labelled tensors, class names, how samples are prepared, defaults for the recipe."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels._arrays import plain, tensor, text
from ltkernels._features import check_seed
from ltkernels.train.data._lazy import LazySamples, Samples, rows_of
from ltkernels.train.data._split import arrange, chosen, listed

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

    def division(self, imbalance: float | None = None) -> dict[str, Any]:
        """What divides and thins the samples, as `Dataset.from_arrays` takes it; `imbalance` where none was asked for."""
        asked = imbalance if self.imbalance is None else self.imbalance
        return {"test_split": self.test_split, "seed": self.seed, "imbalance": asked, "profile": self.profile}


@contextmanager
def naming(place: object) -> Iterator[None]:
    """ValueError and TypeError of the block begin with the file or folder that is read."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise (ValueError if isinstance(error, ValueError) else TypeError)(f"{place}: {error}") from error


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
        imbalance: float | None = None,
        profile: str = "exp",
        column_names: Sequence[str] | None = None,
        **about: Any,
    ) -> "Dataset":
        """Build a data set from arrays or tensors, of any byte order and strides.

        Images are (n, height, width), (n, channels, height, width) or, recognised by a last size of 1, 3 or 4 where the second
        is none of these, (n, height, width, channels); vectors are (n, features); of any real dtype. They become float32,
        standardised in float64 by the training set's mean and standard deviation, per channel for images and per column for
        vectors. Labels are class indices from 0 or from 1, also as floats, or names of classes (see
        `ltkernels._arrays.class_indices`). Without x_test and y_test, a share `test_split` of every class is held out, drawn by
        `seed`; a class of one sample is then left out. `imbalance` and `profile` thin the training set (see `make_long_tailed`).
        `column_names` are those of vectors, for notes. `about` are further fields (image_size, train_files, ...).

        Raises ValueError or TypeError naming the argument for shapes that disagree, labels out of range, non-finite values, and
        classes without a training or test sample.
        """
        if (x_test is None) != (y_test is None) or (x_val is None) != (y_val is None):
            raise ValueError("samples and labels go together: x_test with y_test, x_val with y_val")
        seed = check_seed(seed)
        given = {"train": (x_train, y_train), "test": (x_test, y_test), "val": (x_val, y_val)}
        notes = list(about.pop("notes", ()))
        samples, labels = {}, {}
        for part, (x, y) in given.items():
            if x is None:
                continue
            samples[part], last = (x, False) if isinstance(x, LazySamples) else read_samples(f"x_{part}", x)
            labels[part] = _array(f"y_{part}", y)
            if labels[part].shape != (len(samples[part]),):
                raise ValueError(f"y_{part} must have shape ({len(samples[part])},), got {labels[part].shape}")
            shape, wanted = samples[part].shape[1:], samples["train"].shape[1:]
            if shape != wanted:
                raise ValueError(f"x_{part} has samples of shape {shape}, x_train {wanted}")
            if last and part == "train":
                notes.append("images are read as (n, height, width, channels)")
        arranged = arrange(labels, class_names, test_split=test_split, seed=seed, imbalance=imbalance, profile=profile)
        files = {part: about.pop(f"{part}_files", ()) for part in ("train", "test")}
        about |= {f"{part}_files": chosen(files[arranged.rows[part][0]], arranged.rows[part][1]) for part in files}
        samples = {part: rows_of(samples[origin], rows) for part, (origin, rows) in arranged.rows.items()}
        some, sampled = _some(samples["train"], seed)
        mean, std, strange = moments(some, column_names)
        tensors = {f"x_{part}": standardised(f"x_{part}", x, mean, std) for part, x in samples.items()}
        tensors |= {f"y_{part}": torch.from_numpy(y) for part, y in arranged.labels.items()}
        notes += [*arranged.notes, *sampled, *strange]
        return cls(
            name=name, class_names=arranged.names, defaults=dict(defaults or {}), mean=mean, std=std, notes=tuple(notes),
            **tensors, **about,
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


def standardised(argument: str, samples: np.ndarray | LazySamples, mean: Tensor, std: Tensor) -> Samples:
    """(n, ...) float32: (samples - mean) / std in float64. ValueError where the result has no place in float32."""
    if isinstance(samples, LazySamples):
        return samples.standardised(partial(_standardise, mean, std))
    result = _standardise(mean, std, tensor(samples))
    if not bool(torch.isfinite(result).all()):
        raise ValueError(f"{argument} cannot be standardised in float32: its values are too large")
    return result


def _standardise(mean: Tensor, std: Tensor, samples: Tensor) -> Tensor:
    along = (1, -1, *[1] * (samples.dim() - 2))
    shift, scale = (values.to(samples.device).double().view(along) for values in (mean, std))
    result = torch.empty(samples.shape, dtype=torch.float32, device=samples.device)
    rows = max(1, _BLOCK_VALUES // max(1, samples[:1].numel()))
    for block, out in zip(samples.split(rows), result.split(rows)):
        out.copy_((block.double() - shift).div_(scale))
    return result


def _some(samples: np.ndarray | LazySamples, seed: int) -> tuple[np.ndarray, list[str]]:
    """What mean and standard deviation are taken of: everything, or as many as are soon read."""
    if not isinstance(samples, LazySamples):
        return samples, []
    notes = []
    if len(samples) > _SAMPLED:
        notes = [f"mean and standard deviation are those of {_SAMPLED} of the {len(samples)} training samples"]
        samples = samples.rows(np.sort(np.random.default_rng([seed, 30_000]).permutation(len(samples))[:_SAMPLED]))
    return np.concatenate([batch.numpy() for batch in samples.split()]), notes


def moments(samples: np.ndarray, names: Sequence[str] | None = None) -> tuple[Tensor, Tensor, list[str]]:
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
