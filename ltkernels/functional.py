"""Losses as functions: `adjusted_cross_entropy`, and its form with the classifier inside.

The functional form of a loss is the op with its tables, ``adjusted_cross_entropy(z, y, **adjustments.ldam(counts)._asdict())``; the
Module of the loss builds them once.
"""

from __future__ import annotations

from .contrastive import contrastive, lader, linear_logsumexp
from .heads import linear_adjusted_cross_entropy
from .losses import adjusted_cross_entropy
from .losses._row_statistics import RowStatistics, row_statistics

__all__ = [
    "RowStatistics",
    "adjusted_cross_entropy",
    "contrastive",
    "lader",
    "linear_adjusted_cross_entropy",
    "linear_logsumexp",
    "row_statistics",
]
