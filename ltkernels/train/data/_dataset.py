"""What every data set gives the trainer: two labelled tensors, class names, and defaults for the recipe."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DataRequest:
    """What the user asked of a data set; None means the data set's own default. `image_size` is the side in pixels that
    images from files are brought to."""

    argument: str = ""
    data_dir: Path | None = None
    imbalance: float | None = None
    profile: str = "exp"
    seed: int = 0
    image_size: int | None = None

    def with_argument(self, argument: str) -> "DataRequest":
        return replace(self, argument=argument)


@dataclass(frozen=True)
class Dataset:
    """A labelled training and test set, in memory.

    `x_train` (n, ...) and `x_test` (m, ...) are float32, standardised; images are (n, channels, height, width).
    `y_train` and `y_test` are int64 class indices. `defaults` holds what suits this data where the user says nothing
    (epochs, batch_size, lr, threads). `mean` and `std` are what the samples were standardised by, (channels,) for images
    and (1,) for vectors: -mean / std is the value of a black pixel, which a crop with padding brings in.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]
    defaults: dict[str, float | int] = field(default_factory=dict)
    mean: Tensor | None = None
    std: Tensor | None = None

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

    def save_npz(self, path: str | Path) -> None:
        """Write what was loaded to an .npz file that `npz:PATH` reads back: image files are then decoded once, not in
        every run. Samples are stored before standardisation, as bytes where all are. Raises FileExistsError."""
        samples = {"x_train": self._raw(self.x_train), "x_test": self._raw(self.x_test)}
        labels = {"y_train": self.y_train.numpy(), "y_test": self.y_test.numpy()}
        with Path(path).open("xb") as file:
            np.savez(file, **samples, **labels, class_names=np.array(self.class_names))

    def _raw(self, x: Tensor) -> np.ndarray:
        if self.mean is None or self.std is None:
            return x.numpy()
        shape = (1, -1, *[1] * (x.dim() - 2)) if x.dim() == 4 else (1,) * x.dim()
        raw = x.double() * self.std.double().view(shape) + self.mean.double().view(shape)
        whole = raw.round()
        # Standardisation in float32 moves a byte by less than 1e-4.
        is_bytes = bool(((raw - whole).abs() < 1e-3).all() and (whole >= 0).all() and (whole <= 255).all())
        return whole.byte().numpy() if is_bytes else raw.float().numpy()

    @classmethod
    def from_arrays(
        cls,
        x_train: np.ndarray | Tensor,
        y_train: np.ndarray | Tensor,
        x_test: np.ndarray | Tensor,
        y_test: np.ndarray | Tensor,
        *,
        class_names: list[str] | tuple[str, ...] | None = None,
        name: str = "custom",
        defaults: dict[str, float | int] | None = None,
    ) -> "Dataset":
        """Build a data set from arrays or tensors: samples first, integer labels 0..C-1.

        Images are (n, height, width) or (n, channels, height, width), vectors (n, features), of any real dtype; they
        become float32, standardised by the training set's mean and standard deviation (per channel for images, over
        everything for vectors). Raises ValueError or TypeError naming the argument for shapes that disagree, labels
        out of range, non-finite values, and classes without a training or test sample.
        """
        x_train, x_test = _samples("x_train", x_train), _samples("x_test", x_test)
        y_train, y_test = _labels("y_train", y_train, len(x_train)), _labels("y_test", y_test, len(x_test))
        if x_train.shape[1:] != x_test.shape[1:]:
            raise ValueError(
                f"x_test has samples of shape {tuple(x_test.shape[1:])}, x_train {tuple(x_train.shape[1:])}"
            )
        num_classes = len(class_names) if class_names is not None else int(max(y_train.max(), y_test.max())) + 1
        for argument, labels in (("y_train", y_train), ("y_test", y_test)):
            if int(labels.max()) >= num_classes:
                raise ValueError(f"{argument} holds label {int(labels.max())}, but there are {num_classes} classes")
            # Before a table of all classes is made: one forged label would make it as large as it likes.
            if num_classes > len(labels):
                raise ValueError(f"{argument} has {len(labels)} samples for {num_classes} classes: some have none")
            empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
            if empty:
                raise ValueError(f"{argument} has no sample of class {', '.join(map(str, empty))}")
        axes = (0, 2, 3) if x_train.dim() == 4 else tuple(range(x_train.dim()))
        mean = x_train.mean(axes, keepdim=True)
        std = x_train.std(axes, keepdim=True).clamp_min(1e-6)
        x_train, x_test = (x_train - mean) / std, (x_test - mean) / std
        for argument, samples in (("x_train", x_train), ("x_test", x_test)):
            if not bool(torch.isfinite(samples).all()):
                raise ValueError(f"{argument} cannot be standardised in float32: its values are too large")
        return cls(
            name=name,
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            class_names=tuple(map(str, class_names)) if class_names is not None else _digits_of(num_classes),
            defaults=dict(defaults or {}),
            mean=mean.flatten(),
            std=std.flatten(),
        )


def _digits_of(num_classes: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(num_classes))


def _tensor(argument: str, value: np.ndarray | Tensor) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} must hold numbers, got {getattr(value, 'dtype', type(value).__name__)}") from error


def _samples(argument: str, value: np.ndarray | Tensor) -> Tensor:
    tensor = _tensor(argument, value)
    if tensor.is_complex():
        raise TypeError(f"{argument} must be real, got {tensor.dtype}")
    if tensor.dim() not in (2, 3, 4) or tensor.numel() == 0:
        raise ValueError(
            f"{argument} must be (n, features), (n, height, width) or (n, channels, height, width), "
            f"got shape {tuple(tensor.shape)}"
        )
    tensor = tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{argument} holds NaN or infinite values")
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor


def _labels(argument: str, value: np.ndarray | Tensor, length: int) -> Tensor:
    tensor = _tensor(argument, value)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{argument} must hold integers, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{argument} must have shape ({length},), got {tuple(tensor.shape)}")
    tensor = tensor.to(torch.int64)
    if int(tensor.min()) < 0:
        raise ValueError(f"{argument} holds the negative label {int(tensor.min())}")
    return tensor
