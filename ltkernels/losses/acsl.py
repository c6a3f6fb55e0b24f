"""Adaptive class suppression: negatives count only where the network takes them for likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _checks
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack


def acsl(threshold: float = 0.7) -> ClosedForm:
    """Adaptive class suppression loss, Wang et al. 2021 (ACSL, arXiv:2104.00885): sigmoid cross-entropy of the label and of those other
    classes whose probability is at least `threshold`. It needs no class counts.

    Args:
        threshold: in [0, 1); 0 counts every negative.

    Returns:
        The closed form, for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: options that are no numbers.
        ValueError: options out of range.

    Example:
        >>> ltk.adjustments.acsl().term.options[0]
        0.7
    """
    threshold = _checks.number("threshold", threshold, low=0.0)
    if threshold >= 1.0:
        raise ValueError(f"threshold is {threshold}; it must lie in [0, 1)")
    return ClosedForm(Term("sigmoid", options=(threshold, 0.0, 0.0)))


class ACSL(AdjustedCrossEntropy):
    """Adaptive class suppression loss, Wang et al. 2021 (ACSL, arXiv:2104.00885): sigmoid cross-entropy of the label and of those other
    classes whose probability is at least `threshold`, so that samples discourage a class only where they are taken for it.

    The paper divides by the number of rows: ``reduction="batch_mean"``. It starts from a network that plain training has made, for
    nothing is likely at first. Which negatives count is a constant of the gradient. Multi-label targets (N, C) are taken too.

    Args:
        threshold: in [0, 1); 0 counts every negative.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: options that are no numbers.
        ValueError: options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.ACSL()
        >>> logits = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        2.2873
    """

    name = "acsl"
    title = "adaptive class suppression"
    build = staticmethod(acsl)

    def __init__(self, threshold: float = 0.7, **common: Unpack[Common]) -> None:
        super().__init__(options={"threshold": threshold}, **common)
