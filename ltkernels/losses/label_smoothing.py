"""Label smoothing by class (MiSLAS), and so much of it that the label hardly stands out (LOS)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import Smoothed, rounded
from ._module import AdjustedCrossEntropy, Common

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SHAPES = ("concave", "linear", "convex", "exp")


def label_aware_smoothing(
    class_counts: _checks.ClassCounts,
    head: float = 0.4,
    tail: float = 0.1,
    shape: str = "concave",
    power: float = 2.0,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> Smoothed:
    """Label-aware smoothing of MiSLAS, Zhong et al. 2021 (arXiv:2104.00466): a smoothing for each class, from `tail` for the rarest to
    `head` for the commonest.

    With ``x = (n - n_min) / (n_max - n_min)`` it is ``tail + (head - tail) f(x)``, f being ``sin(pi x / 2)`` (concave), ``x`` (linear),
    ``1 - cos(pi x / 2)`` (convex) or ``x^power`` (exp). The smoothing puts ``eps / C`` on every class, as the authors' code does; where
    ``eps / (C - 1)`` is meant on the others alone, give ``eps C / (C - 1)``. Balanced counts have `head`.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        head: smoothing of the commonest class, in [0, 1].
        tail: smoothing of the rarest class, in [0, 1].
        shape: ``"concave"``, ``"linear"``, ``"convex"`` or ``"exp"``.
        power: exponent of ``"exp"``, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' smoothing.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        A `Smoothed` with label_smoothing (C,).

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.label_aware_smoothing([6, 3, 1]).label_smoothing
        tensor([0.4000, 0.2763, 0.1000])
    """
    counts = _checks.class_counts(class_counts, empty)
    head = _checks.number("head", head, low=0.0, high=1.0)
    tail = _checks.number("tail", tail, low=0.0, high=1.0)
    power = _checks.number("power", power, above=0.0)
    if shape not in _SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(map(repr, _SHAPES))}")
    least, span = counts.n.min(), counts.n.max() - counts.n.min()
    x = (counts.n - least) / span if span > 0 else torch.ones_like(counts.n)
    quarter = math.pi / 2 * x
    along = {"concave": torch.sin(quarter), "linear": x, "convex": 1 - torch.cos(quarter), "exp": x**power}[shape]
    # sin and cos of a rounded pi / 2 may miss their ends by a rounding error.
    smoothing = (tail + (head - tail) * along).clamp(min(head, tail), max(head, tail))
    return rounded(Smoothed(label_smoothing=smoothing), table_dtype)


class LabelAwareSmoothing(AdjustedCrossEntropy):
    """Label-aware smoothing of MiSLAS, Zhong et al. 2021 (arXiv:2104.00466): cross-entropy with a label smoothing for each class, from
    `tail` for the rarest to `head` for the commonest.

    The authors train with it in a second stage, after mixup: ``head, tail`` of 0.4, 0.1 on CIFAR-100-LT with imbalance 100, 0.3, 0 on
    ImageNet-LT and iNaturalist 2018.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        head: smoothing of the commonest class, in [0, 1].
        tail: smoothing of the rarest class, in [0, 1].
        shape: ``"concave"``, ``"linear"``, ``"convex"`` or ``"exp"``: how it goes from one to the other.
        power: exponent of ``"exp"``, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' smoothing.
        **common: weight, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`; its
            label_smoothing must be 0.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target class indices or mixed targets, loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.LabelAwareSmoothing([6, 3, 1])
        >>> logits = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        2.0208
    """

    name = "label_aware_smoothing"
    title = "label-aware smoothing"
    build = staticmethod(label_aware_smoothing)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        head: float = 0.4,
        tail: float = 0.1,
        shape: str = "concave",
        power: float = 2.0,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        options = {"head": head, "tail": tail, "shape": shape, "power": power, "empty": empty}
        super().__init__(class_counts=class_counts, options=options, **common)


def los(smoothing: float = 0.98) -> Smoothed:
    """Label over-smoothing (LOS), Sun et al. 2025 (ICLR; arXiv:2403.00250): cross-entropy with a label smoothing near 1.

    The label keeps ``1 - eps + eps / C``, every other class gets ``eps / C``. It needs no class counts.

    Args:
        smoothing: eps, in [0, 1].

    Returns:
        A `Smoothed` with label_smoothing, a number.

    Raises:
        TypeError: options that are no numbers.
        ValueError: options out of range.

    Example:
        >>> ltk.adjustments.los().label_smoothing
        0.98
    """
    return Smoothed(label_smoothing=_checks.number("smoothing", smoothing, low=0.0, high=1.0))


class LOS(AdjustedCrossEntropy):
    """Label over-smoothing, Sun et al. 2025 (ICLR; arXiv:2403.00250): cross-entropy with a label smoothing near 1, for a second stage that
    trains the classifier alone on plainly drawn samples.

    Args:
        smoothing: eps, in [0, 1].
        **common: weight, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`; its
            label_smoothing must be 0.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target and loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: options that are no numbers.
        ValueError: options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.LOS()
        >>> logits = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        1.2875
    """

    name = "los"
    title = "label over-smoothing"
    build = staticmethod(los)

    def __init__(self, smoothing: float = 0.98, **common: Unpack[Common]) -> None:
        super().__init__(options={"smoothing": smoothing}, **common)
