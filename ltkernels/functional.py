"""Losses as functions: `adjusted_cross_entropy`, and its form with the classifier inside.

The functional form of a loss is the op with its tables, ``adjusted_cross_entropy(z, y, **adjustments.ldam(counts)._asdict())``; the
Module of the loss builds them once.
"""

from __future__ import annotations

from .heads import linear_adjusted_cross_entropy
from .losses import adjusted_cross_entropy
from .losses._sigmoid import sigmoid_cross_entropy

__all__ = ["adjusted_cross_entropy", "linear_adjusted_cross_entropy", "sigmoid_cross_entropy"]
