"""Softmax equalization loss: tail classes are left out of other classes' denominators at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._record import Loss, float32
from ._terms import ClosedForm, Term


def softmax_equalization(
    class_counts: Sequence[int] | Tensor,
    gamma: float = 0.9,
    tail_frequency: float | None = None,
    seed: int | None = None,
    *,
    empty: str = "error",
) -> ClosedForm:
    """Softmax equalization loss, Tan et al. 2020 (arXiv:2003.05176), softmax form: each tail class but the label is
    removed from a row's softmax with probability `gamma`. The label is never removed.

    The mask is a function of (seed, row, class): the 32-bit hash lowbias32, applied as `ltkernels.losses._terms.equalization_mask`
    spells out. The kernel, its backward pass and the torch reference therefore see one mask.

    Args:
        gamma: probability of the mask, in [0, 1].
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``,
            which is the paper's 3e-3 for CIFAR-100-LT.
        seed: None draws a seed from torch's generator at each call, so ``torch.manual_seed`` governs it; a number repeats one
            mask at every call.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.
    """
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}; it must be an integer or None")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must fit 64 bits")
    gamma = _checks.number("gamma", gamma, low=0.0, high=1.0)
    tail = tail_classes(class_counts, tail_frequency, empty)
    return ClosedForm(
        Term("equalization", float32(tail), None if seed is None else torch.tensor([seed]), (gamma, 0.0, 0.0))
    )


def tail_classes(class_counts: Sequence[int] | Tensor, tail_frequency: float | None, empty: str) -> Tensor:
    """(C,) float64: 1 for the tail classes, 0 for the others."""
    counts = _checks.class_counts(class_counts, empty)
    if tail_frequency is None:
        tail_frequency = 0.3 / len(counts.n)
    tail_frequency = _checks.number("tail_frequency", tail_frequency, low=0.0, high=1.0)
    frequency = torch.where(counts.empty, 0.0, counts.n / counts.total)
    return (frequency < tail_frequency).double()


LOSSES = (
    Loss(
        "softmax_equalization",
        "softmax equalization",
        "softmax_equalization",
        "SoftmaxEqualization",
        softmax_equalization,
    ),
)
