"""Seesaw loss: each negative class is damped by its rarity and boosted where it is confused with the label."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Loss, float32
from ._terms import ClosedForm, Term


def seesaw(
    class_counts: Sequence[int] | Tensor, p: float = 0.8, q: float = 2.0, eps: float = 1e-2, *, empty: str = "error"
) -> ClosedForm:
    """Seesaw loss, Wang et al. 2021 (arXiv:2008.10032): softmax cross-entropy of ``z + D`` with
    ``D_ij = p min(0, log n_j - log n_y) + q max(0, log P_ij - log max(P_iy, eps))``, ``P = softmax(z)`` held constant.

    The paper counts the samples seen so far in training; `ltkernels.nn.Seesaw` does that.

    Args:
        p: exponent of the mitigation factor, at least 0: rarer classes than the label are punished less.
        q: exponent of the compensation factor, at least 0: classes that outweigh the label are punished more.
        eps: floor of the label's probability in the compensation, in (0, 1].
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` counts it as 1, as the authors' code.
    """
    counts = _checks.class_counts(class_counts, empty)
    n = torch.where(counts.empty, 1.0, counts.n)
    return ClosedForm(Term("seesaw", float32(torch.log(n)), None, seesaw_options(p, q, eps)))


def seesaw_options(p: float, q: float, eps: float) -> tuple[float, float, float]:
    """Checked options of the term."""
    p = _checks.number("p", p, low=0.0)
    q = _checks.number("q", q, low=0.0)
    return p, q, math.log(_checks.number("eps", eps, above=0.0, high=1.0))


LOSSES = (Loss("seesaw", "Seesaw", "seesaw", "Seesaw", seesaw),)
