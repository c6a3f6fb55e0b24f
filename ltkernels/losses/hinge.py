"""LDAM in its hinge form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .._tables import KeepsTables
from ._row_statistics import row_statistics
from .margins import ldam


class LDAMHinge(KeepsTables):
    """LDAM-HG, Cao et al. 2019 (arXiv:1906.07413), equation 10: the hinge loss ``max(0, max_{j != y} z_j - z_y + Delta_y)`` with the
    margins of `LDAM`, ``Delta = max_margin * (n_min / n)^(1/4)``.

    The largest other logit and its class come from one read of the logits, `ltkernels.functional.row_statistics`. The gradient is -1 at
    the label and +1 at that class, the lowest of equal ones. The paper gives it cosines (`ltkernels.nn.CosineLinear`), in whose units the
    margins are. It has no name on the command line.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        max_margin: margin of the rarest class.
        weight: (C,) class weights, chosen by the label; a buffer.
        ignore_index: label of rows that have no loss.
        reduction: ``"mean"`` divides by the sum of the rows' weights, ``"batch_mean"`` by the number of rows; ``"sum"``; ``"none"``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' margin.

    Shape:
        logits (N, C), target (N,); loss (), with ``reduction="none"`` (N,).

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, shapes or labels that do not fit.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.LDAMHinge([6, 3, 1])
        >>> loss(torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([2])).item()
        2.0
    """

    margin: Tensor
    weight: Tensor | None

    if TYPE_CHECKING:

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        max_margin: float = 0.5,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        empty: str = "error",
    ) -> None:
        super().__init__()
        margin = ldam(class_counts, max_margin, 1.0, empty=empty, table_dtype=torch.float64).margin
        assert margin is not None
        _checks.reduction(reduction)
        if weight is not None and len(weight) != len(margin):
            raise ArgumentError(f"weight has {len(weight)} entries; the loss has {len(margin)} classes")
        self._table("margin", margin)
        self._table("weight", weight, made=False)
        self.ignore_index, self.reduction = _checks.integer("ignore_index", ignore_index), reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        found = row_statistics(logits.detach(), target, ignore_index=self.ignore_index)
        if logits.shape[1] != len(self.margin):
            raise ArgumentError(f"logits has {logits.shape[1]} columns; the loss has {len(self.margin)} classes")
        valid = target != self.ignore_index
        label = torch.where(valid, target, 0).to(torch.int64)
        real = found.loss.dtype
        # A single class, or one whose rivals are all masked, has nothing to be above.
        rival = valid & ((found.other >= 0) | found.margin.isnan())
        pair = logits.gather(1, torch.stack([found.other.clamp_min(0), label], dim=1)).to(real)
        rows = torch.where(rival, torch.relu(pair[:, 0] - pair[:, 1] + self.margin.to(real)[label]), 0)
        weight = valid.to(real) if self.weight is None else torch.where(valid, self.weight.to(real)[label], 0)
        rows = rows * weight
        if self.reduction == "none":
            return rows
        if self.reduction == "sum":
            return rows.sum()
        return rows.sum() / (weight.sum() if self.reduction == "mean" else valid.sum())
