"""The sigmoid family: one binary cross-entropy a class, the label positive and all other classes negative.

A row's loss is the sum over its classes. ``reduction="batch_mean"`` divides by the number of rows, which is what the papers do;
``"mean"`` divides by the sum of the rows' class weights, as everywhere in this library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import rounded, tail_classes
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term
from .class_balanced import class_balanced

if TYPE_CHECKING:
    from typing_extensions import Unpack


def class_balanced_sigmoid(
    class_counts: _checks.ClassCounts,
    beta: float | None = 0.9999,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Class-balanced sigmoid cross-entropy, Cui et al. 2019 (arXiv:1901.05555), sigmoid form: the row's sum of binary cross-entropies
    times the label's weight ``(1 - beta) / (1 - beta^n)``, as in `class_balanced`.

    The paper divides by the number of rows: ``reduction="batch_mean"``. It also starts the classifier's bias at ``-log(C - 1)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with its weight (C,), for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.class_balanced_sigmoid([500, 50, 5], beta=None).weight
        tensor([0.0270, 0.2703, 2.7027])
    """
    weight = class_balanced(class_counts, beta, empty=empty, table_dtype=table_dtype).weight
    return ClosedForm(Term("sigmoid"), weight=weight)


class ClassBalancedSigmoid(AdjustedCrossEntropy):
    """Class-balanced sigmoid cross-entropy, Cui et al. 2019 (arXiv:1901.05555), sigmoid form: a row's sum of binary cross-entropies times
    the label's weight ``(1 - beta) / (1 - beta^n)``.

    The paper divides by the number of rows: ``reduction="batch_mean"``. It also starts the classifier's bias at ``-log(C - 1)``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.ClassBalancedSigmoid([500, 50, 5], reduction="batch_mean")
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0392
    """

    name = "cb_sigmoid"
    title = "class-balanced sigmoid"
    build = staticmethod(class_balanced_sigmoid)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        beta: float | None = 0.9999,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(class_counts=class_counts, options={"beta": beta, "empty": empty}, **common)


def class_balanced_focal(
    class_counts: _checks.ClassCounts,
    beta: float | None = 0.9999,
    gamma: float = 1.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Class-balanced focal loss, Cui et al. 2019 (arXiv:1901.05555), focal form: `class_balanced_sigmoid` with each binary cross-entropy
    times ``(1 - p_t)^gamma``, p_t the probability of what is true of that class.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        gamma: focusing parameter, at least 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with its weight (C,), for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.class_balanced_focal([500, 50, 5], gamma=2.0).focal_gamma
        2.0
    """
    gamma = _checks.number("gamma", gamma, low=0.0)
    built = class_balanced_sigmoid(class_counts, beta, empty=empty, table_dtype=table_dtype)
    return built._replace(focal_gamma=gamma)


class ClassBalancedFocal(AdjustedCrossEntropy):
    """Class-balanced focal loss, Cui et al. 2019 (arXiv:1901.05555), focal form: `ClassBalancedSigmoid` with each binary cross-entropy
    times ``(1 - p_t)^gamma``, p_t the probability of what is true of that class.

    The paper divides by the number of rows: ``reduction="batch_mean"``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        gamma: focusing parameter, at least 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.ClassBalancedFocal([500, 50, 5], reduction="batch_mean")
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0195
    """

    name = "cb_focal"
    title = "class-balanced focal"
    build = staticmethod(class_balanced_focal)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        beta: float | None = 0.9999,
        gamma: float = 1.0,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(class_counts=class_counts, options={"beta": beta, "gamma": gamma, "empty": empty}, **common)


def eql(
    class_counts: _checks.ClassCounts,
    tail_frequency: float | None = None,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Equalization loss, Tan et al. 2020 (arXiv:2003.05176): sigmoid cross-entropy without the negative terms of tail classes, so that
    head samples do not discourage them. Every row counts as foreground.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form, for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.eql([500, 50, 5]).term.table
        tensor([1., 0., 0.])
    """
    tail = tail_classes(class_counts, tail_frequency, empty)
    return rounded(ClosedForm(Term("sigmoid", 1.0 - tail)), table_dtype)


class EQL(AdjustedCrossEntropy):
    """Equalization loss, Tan et al. 2020 (arXiv:2003.05176): sigmoid cross-entropy without the negative terms of tail classes, so that
    head samples do not discourage them. Every row counts as foreground.

    The paper divides by the number of rows: ``reduction="batch_mean"``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.EQL([500, 50, 5])
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.1269
    """

    name = "eql"
    title = "equalization"
    build = staticmethod(eql)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tail_frequency: float | None = None,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            class_counts=class_counts, options={"tail_frequency": tail_frequency, "empty": empty}, **common
        )
