"""Parameter builders: from integer class counts to the per-class vectors of a loss.

Tables are computed on the host in float64 and stored in float32. The builders are those of the records in `ltkernels.losses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .losses import LOSSES, Adjustment

if TYPE_CHECKING:
    from ._declared.adjustments import *

globals().update({loss.build.__name__: loss.build for loss in LOSSES.values()})

__all__ = ["Adjustment", *(loss.build.__name__ for loss in LOSSES.values())]
