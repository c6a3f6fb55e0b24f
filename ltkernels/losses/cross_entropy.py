"""Plain cross-entropy and the softmax focal loss: no class counts."""

from __future__ import annotations

from .. import _checks
from ._record import Adjustment, Loss


def cross_entropy() -> Adjustment:
    """Softmax cross-entropy: every vector at its neutral value."""
    return Adjustment()


def focal(gamma: float = 2.0) -> Adjustment:
    """Softmax focal loss, Lin et al. 2017 (arXiv:1708.02002), equation 4: ``(1 - p_y)^gamma * -log p_y``.

    Args:
        gamma: focusing parameter, at least 0; 0 is cross-entropy. The gradient is exact for gamma < 1 and p_y = 1 too.
    """
    return Adjustment(focal_gamma=_checks.number("gamma", gamma, low=0.0))


LOSSES = (
    Loss("ce", "cross-entropy", "cross_entropy", "CrossEntropy", cross_entropy),
    Loss("focal", "focal", "focal", "Focal", focal),
)
