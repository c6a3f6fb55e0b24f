"""Multiplicative adjustments: class-dependent temperatures and vector scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import Adjustment, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cdt(
    class_counts: _checks.ClassCounts,
    gamma: float = 0.3,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """Class-dependent temperatures, Ye et al. 2020 (arXiv:2001.01385): scale ``(n / n_max)^gamma``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        gamma: exponent, at least 0; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with the scale (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.cdt([500, 50, 5]).scale
        tensor([1.0000, 0.5012, 0.2512])
    """
    counts = _checks.class_counts(class_counts, empty)
    gamma = _checks.number("gamma", gamma, low=0.0)
    return rounded(Adjustment(scale=(counts.n / counts.n.max()) ** gamma), table_dtype)


class CDT(AdjustedCrossEntropy):
    """Class-dependent temperatures, Ye et al. 2020 (arXiv:2001.01385): the logits times ``(n / n_max)^gamma``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        gamma: exponent, at least 0; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the raw logits, without scale.

    Example:
        >>> loss = ltk.nn.CDT([500, 50, 5])
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        2.4974
    """

    name = "cdt"
    title = "class-dependent temperatures"
    predict = "the raw logits, without scale"
    build = staticmethod(cdt)

    def __init__(
        self, class_counts: _checks.ClassCounts, gamma: float = 0.3, *, empty: str = "error", **common: Unpack[Common]
    ) -> None:
        super().__init__(class_counts=class_counts, options={"gamma": gamma, "empty": empty}, **common)


def vector_scaling(
    class_counts: _checks.ClassCounts,
    gamma: float = 0.3,
    tau: float = 1.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """VS loss, Kini et al. 2021 (arXiv:2103.01550): scale ``(n / n_max)^gamma``, shift ``tau * log(n / N)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        gamma: exponent of the multiplicative part, at least 0.
        tau: strength of the additive part.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with shift and scale (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.vector_scaling([500, 50, 5]).scale
        tensor([1.0000, 0.5012, 0.2512])
    """
    counts = _checks.class_counts(class_counts, empty)
    gamma = _checks.number("gamma", gamma, low=0.0)
    tau = _checks.number("tau", tau)
    shift = (tau * torch.log(counts.n / counts.total)).masked_fill(counts.empty, -torch.inf)
    return rounded(Adjustment(shift=shift, scale=(counts.n / counts.n.max()) ** gamma), table_dtype)


class VectorScaling(AdjustedCrossEntropy):
    """VS loss, Kini et al. 2021 (arXiv:2103.01550): the logits times ``(n / n_max)^gamma`` plus ``tau * log(n / N)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        gamma: exponent of the multiplicative part, at least 0.
        tau: strength of the additive part.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the raw logits, without scale and prior.

    Example:
        >>> loss = ltk.nn.VectorScaling([500, 50, 5])
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        6.8746
    """

    name = "vector_scaling"
    title = "vector scaling"
    predict = "the raw logits, without scale and prior"
    build = staticmethod(vector_scaling)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        gamma: float = 0.3,
        tau: float = 1.0,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(class_counts=class_counts, options={"gamma": gamma, "tau": tau, "empty": empty}, **common)
