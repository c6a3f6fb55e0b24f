"""Softmax equalization loss: tail classes are left out of other classes' denominators at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ._adjustment import rounded, tail_classes
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term, own_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def softmax_equalization(
    class_counts: _checks.ClassCounts,
    gamma: float = 0.9,
    tail_frequency: float | None = None,
    seed: int | None = None,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Softmax equalization loss, Tan et al. 2020 (arXiv:2003.05176), softmax form: each tail class but the label is removed from a row's
    softmax with probability `gamma`. The label is never removed.

    The mask is a function of (seed, row, class): the 32-bit hash lowbias32, applied as `ltkernels.losses._terms.equalization_mask` spells
    out. The kernel, its backward pass and the torch reference therefore see one mask.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        gamma: probability of the mask, in [0, 1].
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``, which is the
            paper's 3e-3 for CIFAR-100-LT.
        seed: None draws a seed from torch's generator at each call, so ``torch.manual_seed`` governs it; a number repeats one mask at
            every call.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form, for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.softmax_equalization([500, 50, 5]).term.table
        tensor([0., 1., 1.])
    """
    gamma = _checks.number("gamma", gamma, low=0.0, high=1.0)
    tail = tail_classes(class_counts, tail_frequency, empty)
    return rounded(ClosedForm(Term("equalization", tail, own_seed(seed), (gamma, 0.0, 0.0))), table_dtype)


class SoftmaxEqualization(AdjustedCrossEntropy):
    """Softmax equalization loss, Tan et al. 2020 (arXiv:2003.05176), softmax form: each tail class but the label is removed from a row's
    softmax with probability `gamma`. The label is never removed.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        gamma: probability of the mask, in [0, 1].
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``, which is the
            paper's 3e-3 for CIFAR-100-LT.
        seed: None draws a seed from torch's generator at each call, so ``torch.manual_seed`` governs it; a number repeats one mask at
            every call.
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
        >>> loss = ltk.nn.SoftmaxEqualization([500, 50, 5], seed=0)
        >>> logits = torch.tensor([[2.0, 0.5, -1.0]])
        >>> round(loss(logits, torch.tensor([0])).item(), 4)
        0.0
    """

    name = "softmax_equalization"
    title = "softmax equalization"
    build = staticmethod(softmax_equalization)

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        gamma: float = 0.9,
        tail_frequency: float | None = None,
        seed: int | None = None,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            class_counts=class_counts,
            options={"gamma": gamma, "tail_frequency": tail_frequency, "seed": seed, "empty": empty},
            **common,
        )
