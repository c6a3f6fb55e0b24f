"""What a builder makes of class counts: the per-class vectors of a loss, or its closed form."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _checks
from .._call import TABLES
from ._terms import ClosedForm


class Adjustment(NamedTuple):
    """The per-class vectors of a loss, (C,) on the CPU each, or None for the neutral value; float32 unless the builder is told otherwise.

    ``adjusted_cross_entropy(logits, target, **adjustment._asdict())`` is the loss.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    margin: Tensor | None = None
    row_scale: Tensor | None = None
    weight: Tensor | None = None
    focal_gamma: float = 0.0
    label_scale: Tensor | None = None


class Smoothed(NamedTuple):
    """A loss that is a label smoothing: a number, or (C,) on the CPU, an entry per class.

    Not a field of `Adjustment`: beside every other loss' tables a caller says their own.
    """

    label_smoothing: float | Tensor


NEUTRAL = {"shift": 0.0, "scale": 1.0, "margin": 0.0, "row_scale": 1.0, "weight": 1.0}
_TABLE_DTYPES = (torch.float32, torch.float64)

_Built = TypeVar("_Built", bound=Adjustment | ClosedForm | Smoothed)


def rounded(built: _Built, table_dtype: torch.dtype) -> _Built:
    """What a builder has computed in float64, its tables in the dtype that was asked for."""
    if table_dtype not in _TABLE_DTYPES:
        raise ValueError(f"table_dtype is {table_dtype}; it must be torch.float32 or torch.float64")
    fields: dict[str, Any] = {
        name: value.to(table_dtype) if isinstance(value, Tensor) else value for name, value in built._asdict().items()
    }
    if isinstance(built, ClosedForm) and built.term.table is not None:
        fields["term"] = built.term._replace(table=built.term.table.to(table_dtype))
    made: Any = built._replace(**fields)
    result: _Built = made
    return result


def built_classes(adjustment: Adjustment | ClosedForm | Smoothed) -> int | None:
    """Number of classes of an adjustment, None where it has no table."""
    tables = [getattr(adjustment, name, None) for name in (*TABLES, "label_scale", "label_smoothing")]
    if isinstance(adjustment, ClosedForm):
        tables.append(adjustment.term.table)
    return next((table.shape[-1] for table in tables if isinstance(table, Tensor)), None)


def full(classes: int, value: float) -> Tensor:
    """(C,) float64 on the CPU, whatever torch's default dtype and device are."""
    return torch.full((classes,), value, dtype=torch.float64, device="cpu")


def tail_classes(class_counts: _checks.ClassCounts, tail_frequency: float | None, empty: str) -> Tensor:
    """(C,) float64: 1 for the tail classes, ``n / N`` below `tail_frequency` (None: ``0.3 / C``), 0 for the others."""
    counts = _checks.class_counts(class_counts, empty)
    if tail_frequency is None:
        tail_frequency = 0.3 / len(counts.n)
    tail_frequency = _checks.number("tail_frequency", tail_frequency, low=0.0, high=1.0)
    frequency = torch.where(counts.empty, 0.0, counts.n / counts.total)
    return (frequency < tail_frequency).double()
