"""Class-balanced weights by the effective number of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from ._adjustment import Adjustment, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


def class_balanced(
    class_counts: _checks.ClassCounts,
    beta: float | None = 0.9999,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """Class-balanced softmax loss, Cui et al. 2019 (arXiv:1901.05555), equation 10: weight ``(1 - beta) / (1 - beta^n)``.

    The weights are scaled to sum to the number of non-empty classes. The paper divides the batch's loss by its number of rows: that is
    ``reduction="batch_mean"``; torch's ``"mean"`` divides by the sum of the batch's weights.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with the weight (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.class_balanced([500, 50, 5], beta=None).weight
        tensor([0.0270, 0.2703, 2.7027])
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
    return rounded(Adjustment(weight=weight * (present / weight.sum())), table_dtype)


class ClassBalanced(AdjustedCrossEntropy):
    """Class-balanced softmax loss, Cui et al. 2019 (arXiv:1901.05555), equation 10: cross-entropy with the weights of
    `ltkernels.adjustments.class_balanced`.

    The paper divides by the number of rows: ``reduction="batch_mean"``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.ClassBalanced([500, 50, 5], reduction="batch_mean")
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        8.7566
    """

    name = "class_balanced"
    title = "class-balanced"
    build = staticmethod(class_balanced)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        beta: float | None = 0.9999,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(class_counts=class_counts, options={"beta": beta, "empty": empty}, **common)


def _log(beta: float) -> Tensor:
    """log beta, exact next to 1."""
    return torch.log1p(torch.tensor(-(1.0 - beta), dtype=torch.float64, device="cpu"))
