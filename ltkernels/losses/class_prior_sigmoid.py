"""Sigmoid losses whose logits are shifted by each class' own prior odds: ECM and the balanced binary cross-entropy of LiVT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import full, rounded
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _odds(class_counts: _checks.ClassCounts, empty: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(C,) float64 ``n / (N - n)`` and its logarithm, which is -inf for a class without samples."""
    counts = _checks.class_counts(class_counts, empty)
    rest = counts.total - counts.n
    every = (rest <= 0) & ~counts.empty
    if every.any():
        at = int(every.nonzero()[0])
        raise ValueError(
            f"class_counts: class {at} has all {int(counts.total)} samples; there must be a negative for every class"
        )
    odds = counts.n / rest
    return odds, torch.where(counts.empty, -torch.inf, torch.log(odds))


def ecm(
    class_counts: _checks.ClassCounts, *, empty: str = "error", table_dtype: torch.dtype = torch.float32
) -> ClosedForm:
    """Effective class margins, Cho & Kraehenbuehl 2022 (ECM, arXiv:2301.09724): sigmoid cross-entropy of ``2 z_j + log(n_j / (N - n_j)) /
    4``, class j's term times ``a log((1 + a) / a)``, ``a = (N - n_j) / n_j``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` removes it: its probability is 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with scale and shift (C,), for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, a class with all samples, options out of
            range.

    Example:
        >>> ltk.adjustments.ecm([6, 3, 1]).shift
        tensor([ 0.1014, -0.2118, -0.5493])
    """
    odds, log_odds = _odds(class_counts, empty)
    weight = torch.log1p(odds) / odds
    term = Term("sigmoid", torch.stack([weight, weight]))
    return rounded(ClosedForm(term, shift=log_odds / 4, scale=full(len(odds), 2.0)), table_dtype)


class ECM(AdjustedCrossEntropy):
    """Effective class margins, Cho & Kraehenbuehl 2022 (ECM, arXiv:2301.09724): sigmoid cross-entropy of scaled and shifted logits, class
    j's term times its weight, from a bound on the average precision of each class.

    The detection loss of the paper has a background class beside these. Divide by the number of rows: ``reduction="batch_mean"``.
    Multi-label targets (N, C) are taken too.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` removes it: its probability is 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, a class with all samples, options out of
            range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.ECM([6, 3, 1])
        >>> logits = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        3.9737
    """

    name = "ecm"
    title = "effective class margins"
    build = staticmethod(ecm)

    def __init__(self, class_counts: _checks.ClassCounts, *, empty: str = "error", **common: Unpack[Common]) -> None:
        super().__init__(class_counts=class_counts, options={"empty": empty}, **common)


def balanced_bce(
    class_counts: _checks.ClassCounts,
    tau: float = 1.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Balanced binary cross-entropy of LiVT, Xu et al. 2023 (arXiv:2212.02015): sigmoid cross-entropy of ``z_j + tau log(n_j / (N -
    n_j))``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: strength of the prior.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` removes it: its probability is 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with its shift (C,), for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, a class with all samples, options out of
            range.

    Example:
        >>> ltk.adjustments.balanced_bce([6, 3, 1]).shift
        tensor([ 0.4055, -0.8473, -2.1972])
    """
    tau = _checks.number("tau", tau)
    _, log_odds = _odds(class_counts, empty)
    shift = torch.where(torch.isinf(log_odds), log_odds, tau * log_odds)  # a removed class stays so, whatever tau is
    return rounded(ClosedForm(Term("sigmoid"), shift=shift), table_dtype)


class BalancedBCE(AdjustedCrossEntropy):
    """Balanced binary cross-entropy of LiVT, Xu et al. 2023 (arXiv:2212.02015): sigmoid cross-entropy with the log odds of each class'
    prior added to its logit, the sigmoid's twin of logit adjustment.

    The paper takes the mean over the classes and multiplies it by their number: the row's sum, ``reduction="batch_mean"``. Multi-label
    targets (N, C) are taken too.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: strength of the prior.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` removes it: its probability is 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, a class with all samples, options out of
            range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.BalancedBCE([6, 3, 1])
        >>> logits = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        4.9217
    """

    name = "balanced_bce"
    title = "balanced binary cross-entropy"
    build = staticmethod(balanced_bce)

    def __init__(
        self, class_counts: _checks.ClassCounts, tau: float = 1.0, *, empty: str = "error", **common: Unpack[Common]
    ) -> None:
        super().__init__(class_counts=class_counts, options={"tau": tau, "empty": empty}, **common)
