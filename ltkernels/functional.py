"""Losses as functions: `adjusted_cross_entropy`, its form with the classifier inside, and one function for each record of
`ltkernels.losses`.

A named function builds its tables on every call. In a training loop the Module of the same loss, which builds them once, is
faster; under ``torch.compile`` pass the class counts as a list of ints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .heads import linear_adjusted_cross_entropy
from .losses import LOSSES, adjusted_cross_entropy

if TYPE_CHECKING:
    from ._declared.functional import *

globals().update({loss.function: loss.functional() for loss in LOSSES.values()})

__all__ = ["adjusted_cross_entropy", "linear_adjusted_cross_entropy", *(loss.function for loss in LOSSES.values())]
