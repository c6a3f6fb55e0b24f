"""BalPoE: experts of different priors whose mean is balanced."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .expert_losses import ExpertsLoss, Logits, log_prior, shifts
from .experts import experts_cross_entropy


class BalPoE(ExpertsLoss):
    """Balanced product of experts, Aimar et al. 2023 (arXiv:2206.05260): the mean over the experts of ``CE(z_e + tau_e log pi)``.

    The mean of the experts' logits is Fisher-consistent for balanced accuracy where the mean of tau is 1. The paper trains with mixup,
    which calibrates the experts: average the losses of both label sets.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: one number for each expert.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 where tau is not 0.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: no tau, counts below 0 or all 0, a class without samples unless ``empty="ignore"``, another number of experts.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.BalPoE([6, 3, 1])([z, z, z], torch.tensor([2])).item(), 4)
        3.6397
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: Sequence[float] = (0.0, 1.0, 2.0),
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if not len(tau):
            raise ArgumentError("tau is empty; it must have one number for each expert")
        taus = [_checks.number(f"tau[{e}]", value) for e, value in enumerate(tau)]
        prior, absent = log_prior(class_counts, empty)
        super().__init__(
            shifts([each * prior for each in taus], absent),
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The mean of the experts' losses."""
        adjustments = self.fitting(logits)
        return experts_cross_entropy(
            logits,
            target,
            adjustments,
            expert_factors=[1 / len(adjustments)] * len(adjustments),
            sample_weight=sample_weight,
            **self._options(),
        )
