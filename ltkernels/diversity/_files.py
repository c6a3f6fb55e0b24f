"""Feature statistics in files: written by one party, read by another, so every byte read is judged first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._npz import map_arrays, write_npz

if TYPE_CHECKING:
    from ._stream import FeatureStatistics

# Of the file format. Version 1: arrays version (); count int64, mean (d,) and scatter (d, d) float64; in files of classes
# count (C,), mean (C, d), scatter (C, d, d) and class_names (C,). Stored without compression.
VERSION = 1
_MOST = 2**53  # samples: counts enter float64 arithmetic
# What rounding may leave of a scatter's symmetry and of its zero eigenvalues, relative to its largest entry.
_ROUNDING = 1e-9


def write_statistics(path: Path, parts: Sequence[FeatureStatistics], names: Sequence[str] | None = None) -> None:
    """A file of the statistics of classes called `names`, or of a single set (one part, no names)."""
    arrays = {
        "count": np.array([part.count for part in parts], dtype=np.int64),
        "mean": torch.stack([part.mean for part in parts]).cpu().numpy(),
        "scatter": torch.stack([part.scatter for part in parts]).cpu().numpy(),
    }
    if names is None:
        arrays = {name: array[0] for name, array in arrays.items()}
    else:
        arrays["class_names"] = np.array(list(names), dtype=np.str_)
    write_npz(path, version=np.int64(VERSION), **arrays)


def read_statistics(path: Path, classes: bool) -> tuple[list[str], list[tuple[int, Tensor, Tensor]]]:
    """The class names (none in a file of a single set), and (count, mean (d,), scatter (d, d)) of each.

    FileNotFoundError, or ValueError naming the file and what is wrong: no .npz file or a compressed one, arrays that lack
    or do not fit together, another format version, NaN or infinity, a scatter that is not symmetric or has negative
    eigenvalues, class names that are double or not printable. Nothing is unpickled, and no array can be larger than the
    file.
    """
    wanted = ("version", "count", "mean", "scatter", *(("class_names",) if classes else ()))
    arrays: dict[str, np.ndarray] = dict(map_arrays(path, (*wanted, "class_names")))
    try:
        if not classes and "class_names" in arrays:
            raise ValueError("holds statistics of classes, not of one set")
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise ValueError(f"not a file of feature statistics: lacks {', '.join(missing)} (or they are compressed)")
        if not classes:
            arrays = {name: array if name == "version" else array[None] for name, array in arrays.items()}
        return _checked(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(arrays: dict[str, np.ndarray]) -> tuple[list[str], list[tuple[int, Tensor, Tensor]]]:
    version, count, mean, scatter = (arrays[name] for name in ("version", "count", "mean", "scatter"))
    if version.shape != () or version.dtype.kind not in "iu" or int(version) != VERSION:
        raise ValueError(f"format version {version.tolist()!r:.40} is not known; this release reads version {VERSION}")
    shapes = f"count {count.shape}, mean {mean.shape}, scatter {scatter.shape}"
    fit = count.ndim == 1 and mean.shape == (*count.shape, *mean.shape[1:2]) and mean.ndim == 2
    if not fit or scatter.shape != (*mean.shape, mean.shape[1]):
        raise ValueError(f"count, mean (d,) and scatter (d, d) do not fit together: {shapes}")
    if not (mean.dtype == scatter.dtype == np.float64 and count.dtype.kind in "iu"):
        raise ValueError(
            f"count must be integer, mean and scatter float64, got {count.dtype}, {mean.dtype} and {scatter.dtype}"
        )
    names = _names(arrays["class_names"], len(count)) if "class_names" in arrays else []
    parts = []
    for c, number in enumerate(count.tolist()):
        # A copy, so that what is used is what was checked, whatever becomes of the file.
        part = torch.from_numpy(np.array(mean[c])), torch.from_numpy(np.array(scatter[c]))
        try:
            _check_moments(number, *part)
        except ValueError as error:
            raise ValueError(f"class {names[c]!r}: {error}" if names else str(error)) from None
        parts.append((number, *part))
    return names, parts


def _names(array: np.ndarray, classes: int) -> list[str]:
    if array.shape != (classes,) or array.dtype.kind != "U":
        raise ValueError(f"class_names must hold {classes} strings, got {array.dtype} {array.shape}")
    names: list[str] = array.tolist()
    check_names(names, "class_names")
    return names


def check_names(names: Sequence[str], what: str) -> None:
    """ValueError unless every class has a name of its own that can be printed."""
    for name in names:
        if not name or not name.isprintable():
            raise ValueError(f"{what} holds {name!r:.80}; names must be printable and not empty")
    if len(set(names)) < len(names):
        double = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{what} holds {double!r:.80} twice")


def _check_moments(count: int, mean: Tensor, scatter: Tensor) -> None:
    """ValueError unless some `count` samples can have this mean and scatter."""
    if not 0 <= count <= _MOST:
        raise ValueError(f"count must be between 0 and 2^53, got {count}")
    for name, x in (("mean", mean), ("scatter", scatter)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    largest = float(scatter.abs().max())
    slack = _ROUNDING * (largest + count * float(mean.square().max()) * 1e-3)
    if not math.isfinite(slack):
        raise ValueError(f"mean reaches {float(mean.abs().max()):.3g}: its square overflows float64")
    if count == 0 and (largest > 0.0 or bool(mean.any())):
        raise ValueError("count is 0, but mean or scatter is not")
    if count == 1 and largest > slack:
        raise ValueError(f"count is 1, but scatter reaches {largest:.3g}: a single sample has none")
    if float((scatter - scatter.T).abs().max()) > slack:
        raise ValueError("scatter is not symmetric")
    shifted = scatter / (largest or 1.0)
    shifted.diagonal().add_((slack / (largest or 1.0)) or _ROUNDING)
    if int(torch.linalg.cholesky_ex(shifted)[1]) != 0:
        raise ValueError("scatter has a negative eigenvalue: no samples have such a scatter")
