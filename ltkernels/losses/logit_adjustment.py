"""Logit adjustment and its relatives: additive log priors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from ._adjustment import Adjustment, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


def logit_adjustment(
    class_counts: _checks.ClassCounts,
    tau: float = 1.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """Logit-adjusted cross-entropy, Menon et al. 2021 (arXiv:2007.07314), equation 10: shift ``tau * log(n / N)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: strength of the prior; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with the shift (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.logit_adjustment([500, 50, 5]).shift
        tensor([-0.1044, -2.4069, -4.7095])
    """
    counts = _checks.class_counts(class_counts, empty)
    tau = _checks.number("tau", tau)
    return rounded(Adjustment(shift=_log_prior(counts, tau * torch.log(counts.n / counts.total))), table_dtype)


class LogitAdjustedCrossEntropy(AdjustedCrossEntropy):
    """Logit-adjusted cross-entropy, Menon et al. 2021 (arXiv:2007.07314), equation 10: the logits plus ``tau * log(n / N)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: strength of the prior; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the raw logits, without the prior.

    Example:
        >>> loss = ltk.nn.LogitAdjustedCrossEntropy([500, 50, 5])
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        7.6277
    """

    name = "logit_adjusted"
    title = "logit adjustment"
    predict = "the raw logits, without the prior"
    build = staticmethod(logit_adjustment)

    def __init__(
        self, class_counts: _checks.ClassCounts, tau: float = 1.0, *, empty: str = "error", **common: Unpack[Common]
    ) -> None:
        super().__init__(class_counts=class_counts, options={"tau": tau, "empty": empty}, **common)


def balanced_softmax(
    class_counts: _checks.ClassCounts, *, empty: str = "error", table_dtype: torch.dtype = torch.float32
) -> Adjustment:
    """Balanced softmax, Ren et al. 2020 (arXiv:2007.10740), equation 3: shift ``log n``. Equals logit adjustment with tau = 1.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with the shift (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.balanced_softmax([500, 50, 5]).shift
        tensor([6.2146, 3.9120, 1.6094])
    """
    counts = _checks.class_counts(class_counts, empty)
    return rounded(Adjustment(shift=_log_prior(counts, torch.log(counts.n))), table_dtype)


class BalancedSoftmax(AdjustedCrossEntropy):
    """Balanced softmax, Ren et al. 2020 (arXiv:2007.10740), equation 3: the logits plus ``log n``. Equals logit adjustment with tau = 1.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the raw logits, without the prior.

    Example:
        >>> loss = ltk.nn.BalancedSoftmax([500, 50, 5])
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        7.6277
    """

    name = "balanced_softmax"
    title = "balanced softmax"
    predict = "the raw logits, without the prior"
    build = staticmethod(balanced_softmax)

    def __init__(self, class_counts: _checks.ClassCounts, *, empty: str = "error", **common: Unpack[Common]) -> None:
        super().__init__(class_counts=class_counts, options={"empty": empty}, **common)


def logit_adjusted_adaptive_margin(
    class_counts: _checks.ClassCounts, *, empty: str = "error", table_dtype: torch.dtype = torch.float32
) -> Adjustment:
    """Logit adjustment with an adaptive margin, Menon et al. 2021 (arXiv:2007.07314), section 6.2: shift ``log(n / N)``, margin ``(n /
    N)^(-1/4)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 and the rarest class' margin.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with shift and margin (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.logit_adjusted_adaptive_margin([500, 50, 5]).margin
        tensor([1.0264, 1.8253, 3.2459])
    """
    counts = _checks.class_counts(class_counts, empty)
    prior = counts.n / counts.total
    return rounded(Adjustment(shift=_log_prior(counts, torch.log(prior)), margin=prior**-0.25), table_dtype)


class LogitAdjustedAdaptiveMargin(AdjustedCrossEntropy):
    """Logit adjustment with a margin that grows with rarity as LDAM's, Menon et al. 2021 (arXiv:2007.07314), section 6.2: shift ``log(n /
    N)``, margin ``(n / N)^(-1/4)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 and the rarest class' margin.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the raw logits, without the prior.

    Example:
        >>> loss = ltk.nn.LogitAdjustedAdaptiveMargin([500, 50, 5])
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        10.8731
    """

    name = "la_adaptive_margin"
    title = "logit adjustment + adaptive margin"
    predict = "the raw logits, without the prior"
    build = staticmethod(logit_adjusted_adaptive_margin)

    def __init__(self, class_counts: _checks.ClassCounts, *, empty: str = "error", **common: Unpack[Common]) -> None:
        super().__init__(class_counts=class_counts, options={"empty": empty}, **common)


def _log_prior(counts: _checks.Counts, shift: Tensor) -> Tensor:
    return shift.masked_fill(counts.empty, -torch.inf)
