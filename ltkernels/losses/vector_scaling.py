"""Multiplicative adjustments: class-dependent temperatures and vector scaling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Adjustment, Loss, float32


def cdt(class_counts: Sequence[int] | Tensor, gamma: float = 0.3, *, empty: str = "error") -> Adjustment:
    """Class-dependent temperatures, Ye et al. 2020 (arXiv:2001.01385): scale ``(n / n_max)^gamma``.

    Args:
        gamma: exponent, at least 0; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale.
    """
    counts = _checks.class_counts(class_counts, empty)
    gamma = _checks.number("gamma", gamma, low=0.0)
    return Adjustment(scale=float32((counts.n / counts.n.max()) ** gamma))


def vector_scaling(
    class_counts: Sequence[int] | Tensor, gamma: float = 0.3, tau: float = 1.0, *, empty: str = "error"
) -> Adjustment:
    """VS loss, Kini et al. 2021 (arXiv:2103.01550): scale ``(n / n_max)^gamma``, shift ``tau * log(n / N)``.

    Args:
        gamma: exponent of the multiplicative part, at least 0.
        tau: strength of the additive part.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
    """
    counts = _checks.class_counts(class_counts, empty)
    gamma = _checks.number("gamma", gamma, low=0.0)
    tau = _checks.number("tau", tau)
    shift = (tau * torch.log(counts.n / counts.total)).masked_fill(counts.empty, -torch.inf)
    return Adjustment(shift=float32(shift), scale=float32((counts.n / counts.n.max()) ** gamma))


LOSSES = (
    Loss("cdt", "class-dependent temperatures", "cdt", "CDT", cdt, predict="the raw logits, without scale"),
    Loss(
        "vector_scaling",
        "vector scaling",
        "vector_scaling",
        "VectorScaling",
        vector_scaling,
        predict="the raw logits, without scale and prior",
    ),
)
