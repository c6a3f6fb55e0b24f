"""Gaussian clouded logits: noise on the logits, larger for rarer classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import full, rounded
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term, own_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def gcl(
    class_counts: _checks.ClassCounts,
    s: float = 30.0,
    noise: float = 0.5,
    m: float = 0.0,
    seed: int | None = None,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Gaussian clouded logits (GCL), Li, Cheung and Lu 2022 (arXiv:2305.11733): ``s (cos_j - m [j = y] - noise |eps_j| A_j)`` with ``A_j =
    (log n_max - log n_j) / (log n_max - log n_min)``, and eps normal with standard deviation 1/3, clamped to [-1, 1].

    Every class of every row has a number of its own. It is a function of (seed, row, class), so that the backward pass and the torch
    reference make it again and nothing of the size of the logits is kept; see `ltkernels.losses._terms.cloud_sizes`. The logits are
    cosines (`ltkernels.nn.CosineLinear`). For balanced counts A is 0.

    The authors train the network with s 30 and noise 0.5 on mixed samples, then the classifier alone, on balanced samples, with s 20, m
    0.1 and a focal factor of gamma 1 that is held constant.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        s: temperature, above 0.
        noise: largest noise of the rarest class, in units of the cosine; 0 for none.
        m: margin of the label, in units of the cosine.
        seed: None draws a seed from torch's generator at each call, so ``torch.manual_seed`` governs it; a number repeats the same
            noise at every call.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' noise.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with its row scale and, for a margin other than 0, its margin, (C,) each, for
        `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.gcl([6, 3, 1], noise=1.0).term.table
        tensor([0.0000, 0.3869, 1.0000])
    """
    counts = _checks.class_counts(class_counts, empty)
    s = _checks.number("s", s, above=0.0)
    noise = _checks.number("noise", noise, low=0.0)
    m = _checks.number("m", m)
    log_n = torch.log(counts.n)
    span = log_n.max() - log_n.min()
    rarity = (log_n.max() - log_n) / span if span > 0 else torch.zeros_like(log_n)
    classes = len(counts.n)
    margin = full(classes, m) if m else None
    term = Term("cloud", noise * rarity, own_seed(seed))
    return rounded(ClosedForm(term, row_scale=full(classes, s), margin=margin), table_dtype)


class GCL(AdjustedCrossEntropy):
    """Gaussian clouded logits (GCL), Li, Cheung and Lu 2022 (arXiv:2305.11733): noise on every logit, larger for rarer classes, so that
    these reserve more room around their samples. ``s (cos_j - m [j = y] - noise |eps_j| A_j)``, as in `ltkernels.adjustments.gcl`.

    The noise is part of every call of the loss, in evaluation mode too; prediction has none.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        s: temperature, above 0.
        noise: largest noise of the rarest class, in units of the cosine; 0 for none.
        m: margin of the label, in units of the cosine.
        seed: None draws a seed from torch's generator at each call, so ``torch.manual_seed`` governs it; a number repeats the same
            noise at every call.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' noise.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...), cosines (`ltkernels.nn.CosineLinear`); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the cosines, without noise and margin.

    Example:
        >>> loss = ltk.nn.GCL([500, 50, 5], seed=0)
        >>> logits = torch.tensor([[0.7, 0.1, -0.2]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0
    """

    name = "gcl"
    title = "Gaussian clouded logits"
    logits = "cosine"
    predict = "the cosines, without noise and margin"
    build = staticmethod(gcl)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        s: float = 30.0,
        noise: float = 0.5,
        m: float = 0.0,
        seed: int | None = None,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            class_counts=class_counts,
            options={"s": s, "noise": noise, "m": m, "seed": seed, "empty": empty},
            **common,
        )
