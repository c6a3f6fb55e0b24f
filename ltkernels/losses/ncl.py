"""NCL: experts that teach each other, on all classes and on the hard ones."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from ._adjustment import Adjustment
from .expert_losses import ExpertsLoss, Logits, log_prior, shifts
from .experts import experts_cross_entropy


class NCL(ExpertsLoss):
    """Nested collaborative learning, Li et al. 2022 (arXiv:2203.15359), its loss without the contrastive part: for every expert the
    balanced softmax on all classes and on the row's hardest ones, and on both ``factor / (E - 1)`` times the sum over ordered pairs of
    experts of KL(p_f || p_e), of the balanced softmaxes, both sides with their gradients.

    The hardest classes are the label and those with the largest logits of the first expert; the others are left out of the softmax. In
    the authors' code their logits are multiplied by 0 and each still weighs exp(0): ``hard_masked=False``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        factor: of the mutual divergence, on all classes and on the hardest.
        hard: number of hardest classes, from 1 to C; the authors use 30 of 100.
        hard_masked: as above.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, `hard` out of range.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.5, -0.5]], [[0.0, 1.0, 0.5]]])
        >>> round(ltk.nn.NCL([6, 3, 1], hard=3)(logits, torch.tensor([2])).item(), 4)
        12.3954
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        factor: float = 0.6,
        hard: int = 30,
        hard_masked: bool = True,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        prior, absent = log_prior(class_counts, empty)
        super().__init__(
            shifts([prior], absent), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
        )
        self.factor = _checks.number("factor", factor)
        self.hard = _checks.integer("hard", hard)
        if not 1 <= self.hard <= len(prior):
            raise ArgumentError(f"hard is {hard}; it must be from 1 to the number of classes, {len(prior)}")
        self.hard_masked = hard_masked

    def adjustments(self, experts: int) -> list[Adjustment]:
        """The same prior for all."""
        assert self.shift is not None
        return [Adjustment(shift=self.shift[0])] * experts

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The losses of all and of the hardest classes."""
        return experts_cross_entropy(
            logits,
            target,
            self.fitting(logits),
            coupling="mutual_kl",
            factor=self.factor,
            adjusted=True,
            hard=self.hard,
            hard_masked=self.hard_masked,
            sample_weight=sample_weight,
            **self._options(),
        )
