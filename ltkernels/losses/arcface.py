"""ArcFace: an additive margin on the angle between feature and class weight."""

from __future__ import annotations

import math

import torch

from .. import _checks
from ._record import Loss
from ._terms import ClosedForm, Term


def arcface(num_classes: int, m: float = 0.5, s: float = 64.0, gradient: str = "exact") -> ClosedForm:
    """ArcFace, Deng et al. 2019 (arXiv:1801.07698), equation 3: the label's logit is ``s cos(theta + m)``, the others ``s cos``.

    The logits are cosines (`ltkernels.nn.CosineLinear`). Where ``theta + m > pi`` the label's logit goes on as
    ``s (cos theta - m sin m)``, which stays decreasing in theta (the convention of the authors' code).

    Args:
        m: margin in radians, in [0, pi / 2].
        s: temperature, above 0.
        gradient: ``"exact"``, ``s sin(theta + m) / sin(theta)`` at the label, with ``sin(theta)`` taken as 1e-3 at least, so that
            it stays finite at ``cos = 1`` (the slope there is ``cos m + 1000 cos(theta) sin m``); or ``"straight_through"``,
            ``s``, the gradient of the cosine itself.
    """
    classes = _checks.num_classes(num_classes)
    m = _checks.number("m", m, low=0.0, high=math.pi / 2)
    s = _checks.number("s", s, above=0.0)
    if gradient not in ("exact", "straight_through"):
        raise ValueError(f"gradient is {gradient!r}; it must be 'exact' or 'straight_through'")
    options = (math.cos(m), math.sin(m), float(gradient == "straight_through"))
    return ClosedForm(Term("arcface", options=options), row_scale=torch.full((classes,), s))


LOSSES = (
    Loss("arcface", "ArcFace", "arcface", "ArcFace", arcface, logits="cosine", predict="the cosines, without margin"),
)
