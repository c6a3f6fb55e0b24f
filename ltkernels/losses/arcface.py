"""ArcFace: an additive margin on the angle between feature and class weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import full, rounded
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack


def arcface(
    num_classes: int,
    m: float = 0.5,
    s: float = 64.0,
    gradient: str = "exact",
    *,
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """ArcFace, Deng et al. 2019 (arXiv:1801.07698), equation 3: the label's logit is ``s cos(theta + m)``, the others ``s cos``.

    The logits are cosines (`ltkernels.nn.CosineLinear`). Where ``theta + m > pi`` the label's logit goes on as ``s (cos theta - m sin
    m)``, which stays decreasing in theta (the convention of the authors' code).

    Args:
        num_classes: C, at least 1.
        m: margin in radians, in [0, pi / 2].
        s: temperature, above 0.
        gradient: ``"exact"``, ``s sin(theta + m) / sin(theta)`` at the label, with ``sin(theta)`` taken as 1e-3 at least (1e-7 for
            float64 logits), so that it stays finite at ``cos = 1`` (the slope there is ``cos m + 1000 cos(theta) sin m``); or
            ``"straight_through"``, ``s``, the gradient of the cosine itself.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with its row scale (C,), for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: options that are no numbers.
        ValueError: a number of classes below 1, options out of range.

    Example:
        >>> ltk.adjustments.arcface(3, s=16.0).row_scale
        tensor([16., 16., 16.])
    """
    classes = _checks.num_classes(num_classes)
    m = _checks.number("m", m, low=0.0, high=math.pi / 2)
    s = _checks.number("s", s, above=0.0)
    if gradient not in ("exact", "straight_through"):
        raise ValueError(f"gradient is {gradient!r}; it must be 'exact' or 'straight_through'")
    options = (math.cos(m), math.sin(m), float(gradient == "straight_through"))
    return rounded(ClosedForm(Term("arcface", options=options), row_scale=full(classes, s)), table_dtype)


class ArcFace(AdjustedCrossEntropy):
    """ArcFace, Deng et al. 2019 (arXiv:1801.07698), equation 3: the label's logit is ``s cos(theta + m)``, the others ``s cos``.

    Args:
        num_classes: C, at least 1.
        m: margin in radians, in [0, pi / 2].
        s: temperature, above 0.
        gradient: ``"exact"``, ``s sin(theta + m) / sin(theta)`` at the label, with ``sin(theta)`` taken as 1e-3 at least (1e-7 for
            float64 logits), so that it stays finite at ``cos = 1`` (the slope there is ``cos m + 1000 cos(theta) sin m``); or
            ``"straight_through"``, ``s``, the gradient of the cosine itself.
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
        >>> loss = ltk.nn.ArcFace(3, s=16.0)
        >>> logits = torch.tensor([[0.7, 0.1, -0.2]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0624
    """

    name = "arcface"
    title = "ArcFace"
    logits = "cosine"
    predict = "the cosines, without margin"
    build = staticmethod(arcface)

    def __init__(
        self, num_classes: int, m: float = 0.5, s: float = 64.0, gradient: str = "exact", **common: Unpack[Common]
    ) -> None:
        super().__init__(num_classes=num_classes, options={"m": m, "s": s, "gradient": gradient}, **common)
