"""The peers: each loss as a user of torch, or of another package, would write it.

A package that is not installed, or has no such loss, has no row; the result says which ones ran.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

Loss = Callable[[Tensor, Tensor], Tensor]


def eager(name: str, counts: list[int]) -> Loss:
    """The textbook form in eager torch, tables prepared outside."""
    table = ltk.LOSSES[name].adjustment(counts)
    if name == "ce":
        return F.cross_entropy
    if name == "logit_adjusted":
        return lambda z, y: F.cross_entropy(z + table.shift, y)
    if name == "class_balanced":
        return lambda z, y: F.cross_entropy(z, y, weight=table.weight.to(z.dtype))
    if name == "ldam":
        # As in the authors' code: a one-hot mask picks the label, whose margin is subtracted.
        def ldam(z: Tensor, y: Tensor) -> Tensor:
            index = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
            return F.cross_entropy(30.0 * torch.where(index, z - table.margin[y].unsqueeze(1).to(z.dtype), z), y)

        return ldam
    if name == "kps":

        def kps(z: Tensor, y: Tensor) -> Tensor:
            index = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
            a = z * table.scale
            return F.cross_entropy(torch.where(index, a - table.margin[y].unsqueeze(1), a), y)

        return kps
    if name == "focal":

        def focal(z: Tensor, y: Tensor) -> Tensor:
            nll = F.cross_entropy(z, y, reduction="none")
            return ((1 - torch.exp(-nll)) ** table.focal_gamma * nll).mean()

        return focal
    raise KeyError(name)


class LearnedPrior(torch.nn.Module):
    """Eager logit adjustment whose log prior is a Parameter."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(ltk.LOSSES["logit_adjusted"].adjustment(counts).shift)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z + self.shift, y)


def learned_prior(backend: str, counts: list[int]) -> torch.nn.Module | None:
    """Logit adjustment with a learned log prior, ``shift``, of one implementation; None where it has none."""
    if backend == "ours":
        return ltk.nn.LogitAdjustedCrossEntropy(counts, learnable=("shift",))
    loss = LearnedPrior(counts)
    return {"eager": loss, "compiled": torch.compile(loss, dynamic=False)}.get(backend)


TIMED = ("ce", "logit_adjusted", "class_balanced", "focal", "ldam", "kps")
PEERS = ("eager", "compiled", "balanced-loss", "imbalanced-losses")


def implementation(backend: str, name: str, counts: list[int]) -> Loss | None:
    """``(logits, target) -> loss`` of one implementation; None where it has none."""
    if backend == "ours":
        return ltk.LOSSES[name].make(counts)
    if backend == "eager":
        return eager(name, counts)
    if backend == "compiled":
        return torch.compile(eager(name, counts), dynamic=False)
    try:
        if backend == "balanced-loss" and name == "class_balanced":
            from balanced_loss import Loss as BalancedLoss

            # Its targets are one-hot probabilities, so its mean divides by the number of rows, our "batch_mean": the comparison says
            # "differs".
            return BalancedLoss("cross_entropy", samples_per_class=counts, beta=0.9999, class_balanced=True)
        if backend == "imbalanced-losses" and name == "focal":
            from imbalanced_losses import SoftmaxFocalLoss

            return SoftmaxFocalLoss(gamma=ltk.LOSSES[name].adjustment(counts).focal_gamma)
    except ImportError:
        pass
    return None
