"""Rows of features: argument checks and log-determinants, which diversity and selection share."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arrays, _backends

CENTERINGS = ("joint", "separate", "none")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_tensor(features: Any, name: str) -> Tensor:
    """`features` as a tensor: itself, or what numpy makes of it, read for its values and in the same memory where that is possible."""
    if isinstance(features, Tensor):
        return features
    try:
        return _arrays.tensor(features)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {error}") from error


def check_reals(values: Any, name: str) -> Tensor:
    """`values`, a few real numbers, as a float64 tensor where they are: an imaginary part is refused, not dropped."""
    x = as_tensor(values, name)
    if x.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return x.to(torch.float64)


def check_features(features: Any, name: str) -> Tensor:
    """The (n, d) float64 tensor of `features` (a tensor or anything numpy-like), on the device it came from; n may be
    0."""
    x = as_tensor(features, name)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (samples, features), got {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has no features: shape {tuple(x.shape)}")
    check_finite(x.detach(), name)
    return x.to(torch.float64).contiguous()  # one memory order, so that equal values give equal bits


def check_rows(features: Any, name: str, width: int, whose: str, step: int) -> Tensor:
    """Rows (n, `width`) of features in their own type, looked at `step` rows at a time: a large set is not copied. `whose`
    names what has that width already."""
    x = as_tensor(features, name).detach()
    check_features(x[:0], name)  # dtype and shape, before any row is looked at
    if x.shape[1] != width:
        raise ValueError(f"{name} has {x.shape[1]} features per sample, {whose} {width}")
    for number, block in enumerate(x.split(step) if len(x) else ()):
        check_finite(block, name, number * step)
    return x


def check_finite(x: Tensor, name: str, first_row: int = 0) -> None:
    """ValueError naming the first row of x (n, d) that holds NaN or infinity, counted from `first_row`."""
    if math.isfinite(float(x.sum())):
        return  # one pass; a finite sum has finite terms, and an overflow only leads to the closer look below
    finite = torch.isfinite(x).all(dim=1)
    if not bool(finite.all()):
        row = first_row + int((~finite).nonzero()[0])
        raise ValueError(f"{name} holds NaN or infinity, first in row {row}")


def check_original(features: Any) -> Tensor:
    """`original` as float64, with at least one row."""
    x = check_features(features, "original")
    if x.shape[0] == 0:
        raise ValueError(
            "original is empty: FDG compares with the diversity of the original samples, so at least 2 are needed"
        )
    return x


def check_same_width(original: Tensor, other: Tensor, name: str) -> None:
    if original.shape[1] != other.shape[1]:
        raise ValueError(f"{name} has {other.shape[1]} features per sample, original has {original.shape[1]}")
    if original.device != other.device:
        raise ValueError(f"{name} is on {other.device}, original is on {original.device}")


def check_count(value: Any, name: str, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    count = int(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if count > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return count


def check_seed(seed: Any) -> int:
    """`seed` as an integer of up to 64 bits, as torch's generators take it."""
    return check_count(seed, "seed", 0, 2**64 - 1)


def check_number(value: Any, name: str) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_alpha(alpha: float) -> float:
    value = check_number(alpha, "alpha")
    if not value > 0.0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    return value


def check_integers(values: Any, name: str) -> Tensor:
    """`values` as an int64 tensor: torch compares and indexes by few of the integer types, and takes uint8 for a mask."""
    x = as_tensor(values, name)
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    found = x.to(torch.int64)
    if x.dtype == torch.uint64 and bool((found < 0).any()):
        raise ValueError(f"{name} holds {int(found[found < 0][0]) + 2**64}: more than 63 bits")
    return found


def check_labels(labels: Any, rows: int, classes: int | None, limit: str, name: str = "labels") -> tuple[Tensor, int]:
    """`labels` as an int64 tensor, and C: `classes`, or the largest label plus 1."""
    y = check_integers(labels, name)
    if y.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(y.shape)}")
    largest = int(y.max()) if rows else -1
    if rows and int(y.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {int(y.min())}")
    if classes is not None and classes <= largest:
        raise ValueError(f"{name} must be below {limit} = {classes}, got {largest}")
    return y, largest + 1 if classes is None else classes


def check_centering(centering: str) -> str:
    if centering not in CENTERINGS:
        raise ValueError(f"unknown centering {centering!r}; known: {', '.join(CENTERINGS)}")
    return centering


def check_offsets(offsets: Tensor | Sequence[int], rows: int) -> list[int]:
    """`offsets` as a list: 0 = offsets[0] < ... < offsets[K] = rows, so that every subset has a member."""
    if rows == 0:
        raise ValueError("candidates is empty: the pool must hold at least one subset")
    x = check_integers(offsets, "offsets")
    if x.ndim != 1 or x.shape[0] < 2:
        raise ValueError(f"offsets must have shape (subsets + 1,) with at least one subset, got {tuple(x.shape)}")
    values: list[int] = x.tolist()
    if values[0] != 0:
        raise ValueError(f"offsets must start at 0, got offsets[0] = {values[0]}")
    for c, (begin, end) in enumerate(itertools.pairwise(values)):
        if end == begin:
            raise ValueError(f"subset {c} is empty: offsets[{c}] = offsets[{c + 1}] = {begin}")
        if end < begin:
            raise ValueError(f"offsets must increase: offsets[{c}] = {begin}, offsets[{c + 1}] = {end}")
    if values[-1] != rows:
        raise ValueError(
            f"offsets must end at the {rows} rows of candidates, got offsets[{len(values) - 1}] = {values[-1]}"
        )
    return values


def cholesky_log_det(matrix: Tensor) -> Tensor:
    """log det of symmetric positive definite matrices (..., n, n) in nats, from their Cholesky factors; NaN where a
    matrix is not positive definite. Never waits for a GPU. Batches of small ones go to the CUDA kernel, where it can serve them."""
    kernel = _backends.log_det_kernel(matrix)
    if kernel is not None:
        values: Tensor = kernel(matrix.flatten(0, -3)).unflatten(0, matrix.shape[:-2])
        return values
    factor, failed = torch.linalg.cholesky_ex(matrix)
    value: Tensor = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return value.masked_fill(failed != 0, torch.nan)


def diversity_nats(rows: Tensor, ridge: float) -> Tensor:
    """log det(I + rows^T rows / ridge), by the smaller of the d x d and n x n forms (equal by Sylvester's identity)."""
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    gram = gram / ridge
    gram.diagonal().add_(1.0)
    return cholesky_log_det(gram)


def centred(x: Tensor, centering: str) -> Tensor:
    return x if centering == "none" or x.shape[0] == 0 else x - x.mean(0)


def original_diversity(original: Tensor, centering: str, alpha: float) -> Tensor:
    """log det(I + alpha C_Z) in nats, the denominator of every FDG; ValueError where it is 0, because FDG is undefined
    there."""
    n = original.shape[0]
    if centering != "none" and n == 1:
        raise ValueError(
            "original has N = 1 sample: its diversity is 0 and FDG, a ratio to it, is undefined; give at least 2"
        )
    equal = bool((original == (0.0 if centering == "none" else original[:1])).all())
    value = diversity_nats(centred(original, centering), n / alpha)
    if not math.isfinite(float(value.detach())):
        raise ValueError(
            f"original overflows float64 (largest magnitude {float(original.detach().abs().max()):.3g}); scale it down"
        )
    if equal or not float(value.detach()) > 0.0:
        what = "zero" if centering == "none" else "equal"
        raise ValueError(
            f"all {n} samples of original are {what} (or too close to it for float64): their diversity is 0 and FDG, a "
            "ratio to it, is undefined"
        )
    return value
