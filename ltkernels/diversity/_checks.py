"""Argument checks, shared with ltkernels.selection."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CENTERINGS = ("joint", "separate", "none")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_features(features: Any, name: str) -> Tensor:
    """The (n, d) float64 tensor of `features` (a tensor or anything numpy-like), on the device it came from; n may be
    0."""
    x = features if isinstance(features, Tensor) else torch.as_tensor(features)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (samples, features), got {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has no features: shape {tuple(x.shape)}")
    check_finite(x.detach(), name)
    return x.to(torch.float64).contiguous()  # one memory order, so that equal values give equal bits


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


def check_alpha(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    return float(alpha)


def check_centering(centering: str) -> str:
    if centering not in CENTERINGS:
        raise ValueError(f"unknown centering {centering!r}; known: {', '.join(CENTERINGS)}")
    return centering


def check_offsets(offsets: Tensor | Sequence[int], rows: int) -> list[int]:
    """`offsets` as a list: 0 = offsets[0] < ... < offsets[K] = rows, so that every subset has a member."""
    if rows == 0:
        raise ValueError("candidates is empty: the pool must hold at least one subset")
    x = torch.as_tensor(offsets)
    if x.dtype.is_floating_point or x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"offsets must be integers, got {x.dtype}")
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
