"""Adaptive logit adjustment: a margin that grows with a class' rarity and with the difficulty of the sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import Adjustment, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


def ala(
    class_counts: _checks.ClassCounts,
    s: float = 30.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Adjustment:
    """Adaptive logit adjustment (ALA), Zhao et al. 2022 (arXiv:2104.06094): the label's cosine less ``QF_y (1 - cos_y) / 2``, with the
    quantity factor ``QF = 1 / log(n / n_min + 1)``, row scale ``s``.

    The difficulty factor ``(1 - cos_y) / 2`` carries gradient, so the label's logit is ``(1 + QF / 2) cos_y - QF / 2``: a label scale and
    a margin. Public versions differ in the logarithm; this one is natural. The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        s: temperature, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' factor.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        An `Adjustment` with margin, row_scale and label_scale (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.ala([6, 3, 1]).label_scale
        tensor([1.2569, 1.3607, 1.7213])
    """
    counts = _checks.class_counts(class_counts, empty)
    s = _checks.number("s", s, above=0.0)
    half = 0.5 / torch.log(counts.n / counts.n.min() + 1.0)
    return rounded(Adjustment(margin=half, row_scale=torch.full_like(half, s), label_scale=1.0 + half), table_dtype)


class ALA(AdjustedCrossEntropy):
    """Adaptive logit adjustment, Zhao et al. 2022 (arXiv:2104.06094): the label's cosine less ``QF_y (1 - cos_y) / 2``, all times ``s``.

    The quantity factor is ``QF = 1 / log(n / n_min + 1)``; the difficulty factor ``(1 - cos_y) / 2`` carries gradient.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        s: temperature, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' factor.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...), cosines (`ltkernels.nn.CosineLinear`); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the cosines, without adjustment.

    Example:
        >>> loss = ltk.nn.ALA([6, 3, 1])
        >>> logits = torch.tensor([[0.8, 0.5, 0.2]])
        >>> round(loss(logits, torch.tensor([1])).item(), 4)
        14.4101
    """

    name = "ala"
    title = "ALA"
    logits = "cosine"
    predict = "the cosines, without adjustment"
    build = staticmethod(ala)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        s: float = 30.0,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(class_counts=class_counts, options={"s": s, "empty": empty}, **common)
