"""Key point sensitive loss, and its gradient adjustment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import Adjustment, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MAX_TEMPERATURE = 50.0


def kps(
    class_counts: _checks.ClassCounts,
    max_margin: float = 0.2,
    s: float = 15.0,
    gradient_adjustment: bool = False,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """KPS, Li, Cheung and Hu 2022 (doi:10.1109/TPAMI.2022.3196044): scale ``s r``, margin ``s m`` with ``r = log(50 n / n_min) / log 50``
    and ``m = max_margin * log(50 n_max / n) / log(50 n_max / n_min)``.

    With gradient adjustment the row's temperature depends on its label: scale ``r``, margin ``m``, row scale ``clamp(s * log(50 n_max /
    n) / log 50, s, 50)``. The logits are cosines (`ltkernels.nn.CosineLinear`).

    The vectors come from the counts. The authors' code reverses r by class index to get m and the row scale. That equals the formula for
    exactly geometric counts in descending order only; on other sorted counts it is near to it, on unsorted ones it is another loss.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, in (0, 50].
        gradient_adjustment: the second stage of the published schedule, from epoch 120 of 200.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale and margin.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with scale and margin (C,), and row_scale (C,) with gradient adjustment.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.kps([500, 50, 5]).scale
        tensor([32.6578, 23.8289, 15.0000])
    """
    counts = _checks.class_counts(class_counts, empty)
    max_margin = _checks.number("max_margin", max_margin)
    s = _checks.number("s", s, above=0.0, high=_MAX_TEMPERATURE)
    n, log50 = counts.n, math.log(50.0)
    rarity = torch.log(50.0 * n.max() / n)
    r = torch.log(50.0 * n / n.min()) / log50
    m = max_margin * rarity / torch.log(50.0 * n.max() / n.min())
    if gradient_adjustment:
        row_scale = (s * rarity / log50).clamp(s, _MAX_TEMPERATURE)
        return rounded(Adjustment(scale=r, margin=m, row_scale=row_scale), table_dtype)
    return rounded(Adjustment(scale=s * r, margin=s * m), table_dtype)


class KPS(AdjustedCrossEntropy):
    """KPS, Li, Cheung and Hu 2022 (doi:10.1109/TPAMI.2022.3196044): scale ``s r``, margin ``s m``, both from the counts as in
    `ltkernels.adjustments.kps`; `ltkernels.schedules.GradientAdjustment` changes it to the second stage.

    The authors' code reverses r by class index instead, which equals this formula for exactly geometric counts in descending order only.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, in (0, 50].
        gradient_adjustment: the second stage of the published schedule, from epoch 120 of 200.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale and margin.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...), cosines (`ltkernels.nn.CosineLinear`); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the cosines, without r and margin.

    Example:
        >>> loss = ltk.nn.KPS([500, 50, 5])
        >>> logits = torch.tensor([[0.7, 0.1, -0.2]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0
    """

    name = "kps"
    title = "KPS"
    logits = "cosine"
    predict = "the cosines, without r and margin"
    build = staticmethod(kps)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        max_margin: float = 0.2,
        s: float = 15.0,
        gradient_adjustment: bool = False,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            class_counts=class_counts,
            options={"max_margin": max_margin, "s": s, "gradient_adjustment": gradient_adjustment, "empty": empty},
            **common,
        )


def kps_ga(
    class_counts: _checks.ClassCounts,
    max_margin: float = 0.2,
    s: float = 15.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """`kps` with ``gradient_adjustment=True``: the second stage of the published schedule.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, in (0, 50].
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale and margin.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with scale, margin and row_scale (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.kps_ga([500, 50, 5]).row_scale
        tensor([15.0000, 23.8289, 32.6578])
    """
    return kps(class_counts, max_margin, s, gradient_adjustment=True, empty=empty, table_dtype=table_dtype)


class KPSGradientAdjusted(AdjustedCrossEntropy):
    """The second stage of KPS alone, Li, Cheung and Hu 2022 (doi:10.1109/TPAMI.2022.3196044): scale ``r``, margin ``m`` and a row scale
    that grows with the rarity of the label, as in `ltkernels.adjustments.kps` with gradient adjustment.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, in (0, 50].
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale and margin.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...), cosines (`ltkernels.nn.CosineLinear`); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the cosines, without r and margin.

    Example:
        >>> loss = ltk.nn.KPSGradientAdjusted([500, 50, 5])
        >>> logits = torch.tensor([[0.7, 0.1, -0.2]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0
    """

    name = "kps_ga"
    title = "KPS + gradient adjustment"
    logits = "cosine"
    predict = "the cosines, without r and margin"
    build = staticmethod(kps_ga)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        max_margin: float = 0.2,
        s: float = 15.0,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            class_counts=class_counts, options={"max_margin": max_margin, "s": s, "empty": empty}, **common
        )
