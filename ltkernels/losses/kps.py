"""Key point sensitive loss, and its gradient adjustment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Adjustment, Loss, float32

_MAX_TEMPERATURE = 50.0


def kps(
    class_counts: Sequence[int] | Tensor,
    max_margin: float = 0.2,
    s: float = 15.0,
    gradient_adjustment: bool = False,
    *,
    empty: str = "error",
) -> Adjustment:
    """KPS, Li, Cheung and Hu 2022 (doi:10.1109/TPAMI.2022.3196044): scale ``s r``, margin ``s m`` with
    ``r = log(50 n / n_min) / log 50`` and ``m = max_margin * log(50 n_max / n) / log(50 n_max / n_min)``.

    With gradient adjustment the row's temperature depends on its label: scale ``r``, margin ``m``, row scale
    ``clamp(s * log(50 n_max / n) / log 50, s, 50)``. The logits are cosines (`ltkernels.nn.CosineLinear`).

    The vectors come from the counts. The authors' code reverses r by class index instead, which is right only where the class
    ids are sorted by count.

    Args:
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, in (0, 50].
        gradient_adjustment: the second stage of the published schedule, from epoch 120 of 200.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale and margin.
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
        return Adjustment(scale=float32(r), margin=float32(m), row_scale=float32(row_scale))
    return Adjustment(scale=float32(s * r), margin=float32(s * m))


def kps_ga(
    class_counts: Sequence[int] | Tensor, max_margin: float = 0.2, s: float = 15.0, *, empty: str = "error"
) -> Adjustment:
    """`kps` with ``gradient_adjustment=True``: the second stage of the published schedule. Arguments as there."""
    return kps(class_counts, max_margin, s, gradient_adjustment=True, empty=empty)


_COSINE = "the cosines, without r and margin"

LOSSES = (
    Loss("kps", "KPS", "kps", "KPS", kps, logits="cosine", predict=_COSINE),
    Loss(
        "kps_ga", "KPS + gradient adjustment", "kps_ga", "KPSGradientAdjusted", kps_ga, logits="cosine", predict=_COSINE
    ),
)
