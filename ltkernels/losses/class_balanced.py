"""Class-balanced weights by the effective number of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Adjustment, Loss, float32


def class_balanced(
    class_counts: Sequence[int] | Tensor, beta: float | None = 0.9999, *, empty: str = "error"
) -> Adjustment:
    """Class-balanced softmax loss, Cui et al. 2019 (arXiv:1901.05555), equation 10: weight ``(1 - beta) / (1 - beta^n)``.

    The weights are scaled to sum to the number of non-empty classes. The paper divides the batch's loss by its number of rows:
    that is ``reduction="batch_mean"``; torch's ``"mean"`` divides by the sum of the batch's weights.

    Args:
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
    """
    counts = _checks.class_counts(class_counts, empty)
    if beta is None:
        weight = 1.0 / counts.n
    else:
        beta = _checks.number("beta", beta, low=0.0)
        if beta >= 1.0:
            raise ValueError(f"beta is {beta!r}; it must be below 1 (None stands for the limit, weights 1 / n)")
        # 1 - beta^n = -expm1(n log beta): no digits are lost where beta^n is close to 1.
        weight = torch.ones_like(counts.n) if beta == 0.0 else (1.0 - beta) / -torch.expm1(counts.n * _log(beta))
    weight = weight.masked_fill(counts.empty, 0.0)
    present = len(counts.n) - int(counts.empty.sum())
    return Adjustment(weight=float32(weight * (present / weight.sum())))


def _log(beta: float) -> Tensor:
    """log beta, exact next to 1."""
    return torch.log1p(torch.tensor(-(1.0 - beta), dtype=torch.float64))


LOSSES = (Loss("class_balanced", "class-balanced", "class_balanced", "ClassBalanced", class_balanced),)
