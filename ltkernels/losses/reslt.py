"""ResLT: heads for ever rarer classes, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .expert_losses import ExpertsLoss, Logits
from .experts import experts_cross_entropy


class ResLT(ExpertsLoss):
    """Residual learning for long tails, Cui et al. 2022 (arXiv:2101.10633): three heads, of all classes, of those that are not many-shot
    and of the few-shot ones, and the loss of the sum of their logits:

        beta [sum_e sum_i w_e l_ie] / [sum_e sum_i w_e] + (1 - beta) [sum_i l_i(sum of the logits)] / N,

    w_e being 1 for the head's own classes and 0 for the others. The authors' class groups are index ranges of one data set; these come
    from the counts.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: share of the heads' own losses, in [0, 1].
        many: a class with more samples is many-shot: the second head does not see it.
        few: a class with fewer samples is few-shot: the third head's own; at most `many`.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`; ``"mean"`` alone.

    Shape:
        logits 3 tensors (N, C) or one (3, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0, beta outside [0, 1], few above many, another number of experts than 3, another reduction than
            ``"mean"``.

    Predict with: `predict`, the sum of the heads' logits.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.ResLT([600, 30, 1])([z, z, z], torch.tensor([2])).item(), 4)
        2.1172
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        beta: float = 0.995,
        many: int = 100,
        few: int = 20,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if reduction != "mean":
            raise ArgumentError(f"reduction is {reduction!r}; ResLT has its own denominators, and 'mean' alone")
        many, few = _checks.integer("many", many), _checks.integer("few", few)
        if few > many:
            raise ArgumentError(
                f"few is {few}; it must be at most many ({many}): few-shot classes are not many-shot ones"
            )
        n = torch.tensor(_checks.count_list(class_counts), dtype=torch.float64, device="cpu")
        weight = torch.stack([torch.ones_like(n), (n <= many).double(), (n < few).double()])
        super().__init__(None, weight, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
        self.beta = _checks.number("beta", beta, low=0.0, high=1.0)

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The heads' losses and that of their sum."""
        rows = experts_cross_entropy(
            logits,
            target,
            self.fitting(logits),
            coupling="sum",
            sample_weight=sample_weight,
            **{**self._options(), "reduction": "none"},
        )
        assert self.weight is not None
        valid = (target != self.ignore_index).to(rows.dtype)
        own = valid if sample_weight is None else torch.where(valid > 0, sample_weight.to(rows), 0)
        shares = self.weight.to(rows)[:, torch.where(valid > 0, target, 0)] * own
        return self.beta * rows[:-1].sum() / shares.sum() + (1 - self.beta) * rows[-1].sum() / own.sum()

    def predict(self, logits: Logits, weights: Tensor | None = None) -> Tensor:
        """(N, C): the sum of the heads' logits."""
        return super().predict(logits, torch.ones(len(logits)) if weights is None else weights)
