"""MDCS: experts of different priors that learn from their own weakly augmented view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .distillation import distillation
from .expert_losses import ExpertsLoss, Logits, shifts


class MDCS(ExpertsLoss):
    """More diverse experts with consistency self-distillation, Zhao et al. 2023 (arXiv:2308.09922): the sum of the experts'
    ``CE(z_e + tau_e log n)``. Where a second, strongly augmented view is given, this is the mean over both views, and every expert adds
    ``factor * T^2 KL(weak view || strong view)`` on the rows that its weak view classifies correctly, the weak view being a constant
    for autograd. The mean of the divergence is over the rows that count. Divergence and correctness are those of the expert's logits
    with its ``tau_e log n``, as in the authors' code.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: the exponent of the counts, one for each expert.
        factor: of the consistency; the authors raise it over the first 20 epochs: set the attribute.
        temperature: T, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`; ``"none"`` is not possible.

    Shape:
        logits, strong_logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, no tau, another number of experts.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.MDCS([6, 3, 1])([z, z, z], torch.tensor([2])).item(), 4)
        11.1497
    """

    if TYPE_CHECKING:

        def __call__(
            self,
            logits: Logits,
            target: Tensor,
            strong_logits: Logits | None = None,
            *,
            sample_weight: Tensor | None = None,
        ) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: Sequence[float] = (-0.5, 1.0, 2.5),
        factor: float = 0.6,
        temperature: float = 1.0,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if reduction == "none":
            raise ArgumentError("reduction is 'none'; the consistency is a mean over other rows than the losses")
        if not len(tau):
            raise ArgumentError("tau is empty; it must have one number for each expert")
        taus = [_checks.number(f"tau[{e}]", value) for e, value in enumerate(tau)]
        counts = _checks.class_counts(class_counts, empty)
        rows = [each * counts.n.log() for each in taus]
        super().__init__(
            shifts(rows, counts.empty), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
        )
        self.factor = _checks.number("factor", factor)
        self.temperature = _checks.number("temperature", temperature, above=0.0)

    def forward(
        self,
        logits: Logits,
        target: Tensor,
        strong_logits: Logits | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The experts' losses on `logits`, or on both views, and the consistency of `strong_logits` with `logits`."""
        loss = super().forward(logits, target, sample_weight=sample_weight)
        if strong_logits is None:
            return loss
        if len(strong_logits) != len(logits):
            raise ArgumentError(f"strong_logits are of {len(strong_logits)} experts, logits of {len(logits)}")
        loss = loss + super().forward(strong_logits, target, sample_weight=sample_weight)
        loss = loss if self.reduction == "sum" else loss / 2
        assert self.shift is not None
        for weak, strong, row in zip(logits, strong_logits, self.shift, strict=True):
            shift = row.to(loss.dtype)  # the tables stay float32, for float64 logits too
            teacher = weak.detach() + shift
            right = ((teacher.argmax(1) == target) & (target != self.ignore_index)).to(loss.dtype)
            own = right if sample_weight is None else torch.where(right > 0, sample_weight.to(loss), 0)
            apart = distillation(strong, teacher, self.temperature, shift=shift, sample_weight=own, reduction="sum")
            denominator = 1.0 if self.reduction == "sum" else own.sum().clamp_min(torch.finfo(own.dtype).tiny)
            loss = loss + self.factor * apart / denominator
        return loss
