"""Plain cross-entropy and the softmax focal loss: no class counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _checks
from ._adjustment import Adjustment
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cross_entropy() -> Adjustment:
    """Softmax cross-entropy: every vector at its neutral value.

    Returns:
        An `Adjustment` without vectors.

    Example:
        >>> ltk.adjustments.cross_entropy().shift is None
        True
    """
    return Adjustment()


class CrossEntropy(AdjustedCrossEntropy):
    """Softmax cross-entropy, as `torch.nn.CrossEntropyLoss`.

    Args:
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.CrossEntropy()
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.2413
    """

    name = "ce"
    title = "cross-entropy"
    build = staticmethod(cross_entropy)

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(options={}, **common)


def focal(gamma: float = 2.0) -> Adjustment:
    """Softmax focal loss, Lin et al. 2017 (arXiv:1708.02002), equation 4: ``(1 - p_y)^gamma * -log p_y``.

    Args:
        gamma: focusing parameter, at least 0; 0 is cross-entropy. The gradient is exact for gamma < 1 and p_y = 1 too.

    Returns:
        An `Adjustment` with focal_gamma and no vectors.

    Raises:
        TypeError: options that are no numbers.
        ValueError: options out of range.

    Example:
        >>> ltk.adjustments.focal(gamma=1.5).focal_gamma
        1.5
    """
    return Adjustment(focal_gamma=_checks.number("gamma", gamma, low=0.0))


class Focal(AdjustedCrossEntropy):
    """Softmax focal loss, Lin et al. 2017 (arXiv:1708.02002), equation 4: ``(1 - p_y)^gamma * -log p_y``.

    Args:
        gamma: focusing parameter, at least 0; 0 is cross-entropy. The gradient is exact for gamma < 1 and p_y = 1 too.
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
        >>> loss = ltk.nn.Focal(gamma=2.0)
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0111
    """

    name = "focal"
    title = "focal"
    build = staticmethod(focal)

    def __init__(self, gamma: float = 2.0, **common: Unpack[Common]) -> None:
        super().__init__(options={"gamma": gamma}, **common)
