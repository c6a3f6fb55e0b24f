"""Margin losses on cosine logits: LDAM and CosFace.

Both multiply the whole row by one temperature s, so it is their `row_scale`; the kernel then streams no vector of C entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Adjustment, Loss, float32


def ldam(
    class_counts: Sequence[int] | Tensor, max_margin: float = 0.5, s: float = 30.0, *, empty: str = "error"
) -> Adjustment:
    """LDAM, Cao et al. 2019 (arXiv:1906.07413), equation 13: margin ``max_margin * (n_min / n)^(1/4)``, row scale ``s``.

    The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' margin.
    """
    counts = _checks.class_counts(class_counts, empty)
    max_margin = _checks.number("max_margin", max_margin)
    s = _checks.number("s", s, above=0.0)
    margin = max_margin * (counts.n.min() / counts.n) ** 0.25
    return Adjustment(margin=float32(margin), row_scale=float32(torch.full_like(margin, s)))


def cosface(num_classes: int, m: float = 0.35, s: float = 64.0) -> Adjustment:
    """CosFace, Wang et al. 2018 (arXiv:1801.09414), equation 4: one margin for every class, row scale ``s``.

    The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        m: margin, in units of the cosine.
        s: temperature, above 0.
    """
    classes = _checks.num_classes(num_classes)
    m = _checks.number("m", m)
    s = _checks.number("s", s, above=0.0)
    return Adjustment(margin=torch.full((classes,), m), row_scale=torch.full((classes,), s))


_COSINE = "the cosines, without margin"

LOSSES = (
    Loss("ldam", "LDAM", "ldam", "LDAM", ldam, logits="cosine", predict=_COSINE),
    Loss("cosface", "CosFace", "cosface", "CosFace", cosface, logits="cosine", predict=_COSINE),
)
