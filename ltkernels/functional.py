"""Losses as functions: `adjusted_cross_entropy`, and its form with the classifier inside; and what losses are made of: the LADER
regulariser, ISDA as a wider head, balanced soft labels.

The functional form of a loss is the op with its tables, ``adjusted_cross_entropy(z, y, **adjustments.ldam(counts)._asdict())``; the
Module of the loss builds them once.
"""

from __future__ import annotations

from ._sinkhorn import SinkhornLabels, sinkhorn
from .contrastive import contrastive, linear_logsumexp
from .heads import linear_adjusted_cross_entropy
from .losses import adjusted_cross_entropy
from .losses._row_statistics import RowStatistics, row_statistics
from .losses._sigmoid import sigmoid_cross_entropy
from .losses.distillation import distillation
from .losses.experts import experts_cross_entropy
from .losses.isda import isda_head
from .losses.lade import lader
from .losses.linear_distillation import linear_distillation

__all__ = [
    "RowStatistics",
    "SinkhornLabels",
    "adjusted_cross_entropy",
    "contrastive",
    "distillation",
    "experts_cross_entropy",
    "isda_head",
    "lader",
    "linear_adjusted_cross_entropy",
    "linear_distillation",
    "linear_logsumexp",
    "row_statistics",
    "sigmoid_cross_entropy",
    "sinkhorn",
]
