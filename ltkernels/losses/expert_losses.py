"""What the losses of several experts share: the tables of each expert, the options, and what to predict with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .._tables import KeepsTables
from ._adjustment import Adjustment
from .experts import experts_cross_entropy

Logits = Tensor | Sequence[Tensor]


class ExpertsLoss(KeepsTables):
    """What the losses of experts share: tables of each expert as buffers, which keep their dtype under ``.half()``, and options.

    Args:
        shift: (E, C), added to the experts' logits; None adds nothing.
        weight: (E, C) class weights of the experts; None is 1.
        label_smoothing, ignore_index, reduction: as in `ltkernels.functional.adjusted_cross_entropy`; each expert's loss is reduced by
            itself.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss (), or rows where the reduction is ``"none"``.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        ValueError: another number of experts than the tables are of.

    Predict with: `predict`, the mean of the experts' logits.
    """

    shift: Tensor | None
    weight: Tensor | None

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        for name, table in (("shift", shift), ("weight", weight)):
            # Of this class itself they are the user's; its subclasses make them of counts.
            self._table(name, None if table is None else table.float(), made=type(self) is not ExpertsLoss)
        _checks.reduction(reduction)
        self.label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.ignore_index, self.reduction = ignore_index, reduction

    def fitting(self, logits: Logits) -> list[Adjustment]:
        """`adjustments` of as many experts as there are logits, in which the tables have as many classes."""
        if isinstance(logits, Tensor) and logits.dim() != 3:  # its rows would be taken for experts
            raise ArgumentError(f"logits has shape {tuple(logits.shape)}; it must be (E, N, C), or E tensors (N, C)")
        adjustments = self.adjustments(len(logits))
        made = {table.shape[-1] for table in self.buffers(recurse=False) if table.dim()}
        first = logits[0] if len(logits) else None
        if isinstance(first, Tensor) and first.dim() and len(made) == 1 and first.shape[-1] not in made:
            raise ArgumentError(
                f"logits are of {first.shape[-1]} classes; {type(self).__name__} was made for {made.pop()}"
            )
        return adjustments

    def adjustments(self, experts: int) -> list[Adjustment]:
        """The tables of each expert."""
        for table in (self.shift, self.weight):
            if table is not None and len(table) != experts:
                raise ArgumentError(f"logits are of {experts} experts; {type(self).__name__} was made for {len(table)}")
        return [
            Adjustment(
                shift=None if self.shift is None else self.shift[e],
                weight=None if self.weight is None else self.weight[e],
            )
            for e in range(experts)
        ]

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The sum of the experts' losses."""
        return experts_cross_entropy(
            logits, target, self.fitting(logits), sample_weight=sample_weight, **self._options()
        )

    def predict(self, logits: Logits, weights: Tensor | None = None) -> Tensor:
        """(N, C) logits to take the argmax of: the mean of the experts', or their sum weighted by `weights` (E,), such as those of
        `ltkernels.inference.expert_weights`."""
        stacked = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
        stacked = stacked.to(_checks.real_dtype(stacked.dtype))
        return stacked.mean(0) if weights is None else torch.einsum("e,enc->nc", weights.to(stacked), stacked)

    def extra_repr(self) -> str:
        tables = {name: tuple(value.shape) for name, value in self.named_buffers(recurse=False)}
        return f"{tables}, reduction={self.reduction!r}"

    def _options(self) -> dict[str, Any]:
        return {
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }


def log_prior(class_counts: _checks.ClassCounts, empty: str) -> tuple[Tensor, Tensor]:
    """(C,) float64 log of the class shares, that of an empty class as of the rarest; and (C,) bool, the empty ones."""
    counts = _checks.class_counts(class_counts, empty)
    return torch.log(counts.n / counts.total), counts.empty


def shifts(rows: Sequence[Tensor], empty: Tensor) -> Tensor:
    """(E, C); what no sample has is removed from experts that know a prior."""
    return torch.stack([row.masked_fill(empty, -torch.inf) if bool(row.any()) else row for row in rows])
