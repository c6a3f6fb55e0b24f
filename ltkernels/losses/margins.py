"""Margin losses on cosine logits: LDAM and CosFace.

Both multiply the whole row by one temperature s, so it is their `row_scale`; the kernel then streams no vector of C entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import Adjustment, full, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


def ldam(
    class_counts: _checks.ClassCounts,
    max_margin: float = 0.5,
    s: float = 30.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """LDAM, Cao et al. 2019 (arXiv:1906.07413), equation 13: margin ``max_margin * (n_min / n)^(1/4)``, row scale ``s``.

    The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' margin.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with margin and row_scale (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.ldam([500, 50, 5]).margin
        tensor([0.1581, 0.2812, 0.5000])
    """
    counts = _checks.class_counts(class_counts, empty)
    max_margin = _checks.number("max_margin", max_margin)
    s = _checks.number("s", s, above=0.0)
    margin = max_margin * (counts.n.min() / counts.n) ** 0.25
    return rounded(Adjustment(margin=margin, row_scale=torch.full_like(margin, s)), table_dtype)


class LDAM(AdjustedCrossEntropy):
    """LDAM, Cao et al. 2019 (arXiv:1906.07413), equations 12 and 13: the label's cosine less ``max_margin * (n_min / n)^(1/4)``, all
    times ``s``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' margin.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...), cosines (`ltkernels.nn.CosineLinear`); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the cosines, without margin.

    Example:
        >>> loss = ltk.nn.LDAM([500, 50, 5])
        >>> logits = torch.tensor([[0.7, 0.1, -0.2]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0
    """

    name = "ldam"
    title = "LDAM"
    logits = "cosine"
    predict = "the cosines, without margin"
    build = staticmethod(ldam)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        max_margin: float = 0.5,
        s: float = 30.0,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            class_counts=class_counts, options={"max_margin": max_margin, "s": s, "empty": empty}, **common
        )


def cosface(
    num_classes: int, m: float = 0.35, s: float = 64.0, *, table_dtype: torch.dtype = torch.float32
) -> Adjustment:
    """CosFace, Wang et al. 2018 (arXiv:1801.09414), equation 4: one margin for every class, row scale ``s``.

    The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        num_classes: C, at least 1.
        m: margin, in units of the cosine.
        s: temperature, above 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with margin and row_scale (C,).

    Raises:
        TypeError: options that are no numbers.
        ValueError: a number of classes below 1, options out of range.

    Example:
        >>> ltk.adjustments.cosface(3, m=0.25).margin
        tensor([0.2500, 0.2500, 0.2500])
    """
    classes = _checks.num_classes(num_classes)
    m = _checks.number("m", m)
    s = _checks.number("s", s, above=0.0)
    return rounded(Adjustment(margin=full(classes, m), row_scale=full(classes, s)), table_dtype)


class CosFace(AdjustedCrossEntropy):
    """CosFace, Wang et al. 2018 (arXiv:1801.09414), equation 4: the label's cosine less ``m``, all times ``s``.

    Args:
        num_classes: C, at least 1.
        m: margin, in units of the cosine.
        s: temperature, above 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...), cosines (`ltkernels.nn.CosineLinear`); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: options that are no numbers.
        ValueError: a number of classes below 1, options out of range.

    Predict with: the cosines, without margin.

    Example:
        >>> loss = ltk.nn.CosFace(3, s=16.0)
        >>> logits = torch.tensor([[0.7, 0.1, -0.2]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0183
    """

    name = "cosface"
    title = "CosFace"
    logits = "cosine"
    predict = "the cosines, without margin"
    build = staticmethod(cosface)

    def __init__(self, num_classes: int, m: float = 0.35, s: float = 64.0, **common: Unpack[Common]) -> None:
        super().__init__(num_classes=num_classes, options={"m": m, "s": s}, **common)
