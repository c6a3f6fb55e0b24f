"""SADE: experts for a long-tailed, a uniform and an inversely long-tailed test set."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .expert_losses import ExpertsLoss, log_prior, shifts


def reversed_prior(class_counts: _checks.ClassCounts, empty: str = "error") -> Tensor:
    """(C,) float64: the class shares in reversed ranks, the rarest class having the largest. Classes of equal counts share what the
    published code gives them by their order."""
    counts = _checks.class_counts(class_counts, empty)
    share = counts.n / counts.total
    ranked, order = share.sort()
    found = torch.empty_like(share)
    found[order] = ranked.flip(0)
    _, group = share.unique(return_inverse=True)
    sums = torch.zeros_like(share).index_add(0, group, found)
    members = torch.zeros_like(share).index_add(0, group, torch.ones_like(share))
    return (sums / members.clamp_min(1))[group]


class SADE(ExpertsLoss):
    """Self-supervised aggregation of diverse experts, Zhang et al. 2022 (arXiv:2107.09249; also TADE): the sum of three cross-entropies,
    ``CE(z_1) + CE(z_2 + log pi) + CE(z_3 + log pi - tau log pi_rev)``, for a long-tailed, a uniform and an inversely long-tailed test
    set; pi are the class shares, pi_rev the same numbers in reversed ranks.

    The paper's experts are cosine heads of scale 30 on shared first stages.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: strength of the inversion.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 in the second and third expert.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits 3 tensors (N, C) or one (3, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, another number of experts than 3.

    Predict with: `predict`, the mean of the experts' logits, or their mean by weights found on the unlabelled test data
    (`ltkernels.inference.expert_weights`).

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.SADE([6, 3, 1])([z, z, z], torch.tensor([2])).item(), 4)
        12.5983
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: float = 2.0,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        tau = _checks.number("tau", tau)
        prior, absent = log_prior(class_counts, empty)
        rows = [torch.zeros_like(prior), prior, prior - tau * torch.log(reversed_prior(class_counts, empty))]
        super().__init__(
            shifts(rows, absent), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
        )
