"""Logit adjustment and its relatives: additive log priors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Adjustment, Loss, float32


def logit_adjustment(class_counts: Sequence[int] | Tensor, tau: float = 1.0, *, empty: str = "error") -> Adjustment:
    """Logit-adjusted cross-entropy, Menon et al. 2021 (arXiv:2007.07314), equation 10: shift ``tau * log(n / N)``.

    Args:
        tau: strength of the prior; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
    """
    counts = _checks.class_counts(class_counts, empty)
    tau = _checks.number("tau", tau)
    return Adjustment(shift=_log_prior(counts, tau * torch.log(counts.n / counts.total)))


def balanced_softmax(class_counts: Sequence[int] | Tensor, *, empty: str = "error") -> Adjustment:
    """Balanced softmax, Ren et al. 2020 (arXiv:2007.10740), equation 3: shift ``log n``. Equals logit adjustment with tau = 1.

    Args:
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
    """
    counts = _checks.class_counts(class_counts, empty)
    return Adjustment(shift=_log_prior(counts, torch.log(counts.n)))


def logit_adjusted_adaptive_margin(class_counts: Sequence[int] | Tensor, *, empty: str = "error") -> Adjustment:
    """Logit adjustment with an adaptive margin: shift ``log(n / N)``, margin ``(n / N)^(-1/4)``.

    Args:
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 and the rarest class' margin.
    """
    counts = _checks.class_counts(class_counts, empty)
    prior = counts.n / counts.total
    return Adjustment(shift=_log_prior(counts, torch.log(prior)), margin=float32(prior**-0.25))


def _log_prior(counts: _checks.Counts, shift: Tensor) -> Tensor:
    return float32(shift.masked_fill(counts.empty, -torch.inf))


_RAW = "the raw logits, without the prior"

LOSSES = (
    Loss(
        "logit_adjusted",
        "logit adjustment",
        "logit_adjusted_cross_entropy",
        "LogitAdjustedCrossEntropy",
        logit_adjustment,
        predict=_RAW,
    ),
    Loss("balanced_softmax", "balanced softmax", "balanced_softmax", "BalancedSoftmax", balanced_softmax, predict=_RAW),
    Loss(
        "la_adaptive_margin",
        "logit adjustment + adaptive margin",
        "logit_adjusted_adaptive_margin",
        "LogitAdjustedAdaptiveMargin",
        logit_adjusted_adaptive_margin,
        predict=_RAW,
    ),
)
