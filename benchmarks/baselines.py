"""The peers: each loss as a user of torch, or of another package, would write it. `peers` maps a name to ``(logits, target) -> loss``.

A package that is not installed is left out, and the result says which ones ran.
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
    raise KeyError(name)


TIMED = ("ce", "logit_adjusted", "class_balanced", "ldam", "kps")


def peers(name: str, counts: list[int], compile_too: bool = True) -> dict[str, Loss]:
    """Ours first, then the peers that have this loss."""
    found: dict[str, Loss] = {"ours": ltk.LOSSES[name].make(counts), "eager": eager(name, counts)}
    if compile_too:
        found["compiled"] = torch.compile(eager(name, counts), dynamic=False)
    if name == "class_balanced":
        found.update(_balanced_loss(counts))
    if name == "logit_adjusted":
        found.update(_imbalanced_losses(counts))
    return found


def _balanced_loss(counts: list[int]) -> dict[str, Loss]:
    try:
        from balanced_loss import Loss as BalancedLoss
    except ImportError:
        return {}
    # Its targets are one-hot probabilities, so its mean divides by the number of rows, our "batch_mean": the comparison says "differs".
    return {"balanced-loss": BalancedLoss("cross_entropy", samples_per_class=counts, beta=0.9999, class_balanced=True)}


def _imbalanced_losses(counts: list[int]) -> dict[str, Loss]:
    try:
        from imbalanced_losses import LogitAdjustedLoss
    except ImportError:
        return {}
    return {"imbalanced-losses": LogitAdjustedLoss(counts)}
