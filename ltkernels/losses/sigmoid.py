"""The sigmoid family: one binary cross-entropy a class, the label positive and all other classes negative.

A row's loss is the sum over its classes. ``reduction="batch_mean"`` divides by the number of rows, which is what the papers do;
``"mean"`` divides by the sum of the rows' class weights, as everywhere in this library.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks
from ._record import Loss, float32
from ._terms import ClosedForm, Term
from .class_balanced import class_balanced
from .softmax_equalization import tail_classes


def class_balanced_sigmoid(
    class_counts: Sequence[int] | Tensor, beta: float | None = 0.9999, *, empty: str = "error"
) -> ClosedForm:
    """Class-balanced sigmoid cross-entropy, Cui et al. 2019 (arXiv:1901.05555), sigmoid form: the row's sum of binary
    cross-entropies times the label's weight ``(1 - beta) / (1 - beta^n)``, as in `class_balanced`.

    The paper divides by the number of rows: ``reduction="batch_mean"``. It also starts the classifier's bias at ``-log(C - 1)``.

    Args:
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
    """
    return ClosedForm(Term("sigmoid"), weight=class_balanced(class_counts, beta, empty=empty).weight)


def class_balanced_focal(
    class_counts: Sequence[int] | Tensor, beta: float | None = 0.9999, gamma: float = 1.0, *, empty: str = "error"
) -> ClosedForm:
    """Class-balanced focal loss, Cui et al. 2019 (arXiv:1901.05555), focal form: `class_balanced_sigmoid` with each binary
    cross-entropy times ``(1 - p_t)^gamma``, p_t the probability of what is true of that class.

    Args:
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        gamma: focusing parameter, at least 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
    """
    gamma = _checks.number("gamma", gamma, low=0.0)
    return class_balanced_sigmoid(class_counts, beta, empty=empty)._replace(focal_gamma=gamma)


def eql(
    class_counts: Sequence[int] | Tensor, tail_frequency: float | None = None, *, empty: str = "error"
) -> ClosedForm:
    """Equalization loss, Tan et al. 2020 (arXiv:2003.05176): sigmoid cross-entropy without the negative terms of
    tail classes, so that head samples do not discourage them. Every row counts as foreground.

    Args:
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.
    """
    return ClosedForm(Term("sigmoid", float32(1.0 - tail_classes(class_counts, tail_frequency, empty))))


LOSSES = (
    Loss(
        "cb_sigmoid",
        "class-balanced sigmoid",
        "class_balanced_sigmoid",
        "ClassBalancedSigmoid",
        class_balanced_sigmoid,
    ),
    Loss("cb_focal", "class-balanced focal", "class_balanced_focal", "ClassBalancedFocal", class_balanced_focal),
    Loss("eql", "equalization", "eql", "EQL", eql),
)
