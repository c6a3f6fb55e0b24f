"""A call of a loss as one value: everything from the checked arguments to the kernels hands this record on.

The operators' schemas are read from its fields (`ltkernels._ops.operands`), and every back end takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tables = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

NONE, MEAN, BATCH_MEAN, SUM = range(4)  # the codes of `ltkernels._checks.REDUCTIONS`


class Call(NamedTuple):
    """A checked call of a loss on logits (N, C). The names are those of the public functions; ``real`` is float64 for float64 logits and
    float32 for all others.

    target: (N,) int64 class indices, contiguous; or (N, C) class probabilities (`losses._soft`).
    target_b, lam: (N,) second labels, and (N,) real shares of the first, of mixed samples.
    shift, scale, margin, row_scale, weight: (C,) real, contiguous; None is the neutral value.
    table, seed: (C,) real and (1,) int64 of a closed form (`ltkernels.losses._terms`).
    grad_scale: () or (N,) real: the factor that gradients are formed with, the announced or the real upstream gradient; None is 1.
    sample_weight: (N,) real, contiguous: factor of each row's loss; None is 1.
    smoothing, label_scale: (C,) real, contiguous: label smoothing of each label, in place of label_smoothing; factor of the label's logit.
    numbers: (2,) float64 on the CPU, in place of focal_gamma and label_smoothing: see `losses._autograd`.
    reduction, form: codes of `ltkernels._checks.REDUCTIONS` and `ltkernels.losses._terms.FORMS`.
    """

    target: Tensor
    target_b: Tensor | None = None
    lam: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    margin: Tensor | None = None
    row_scale: Tensor | None = None
    weight: Tensor | None = None
    table: Tensor | None = None
    seed: Tensor | None = None
    grad_scale: Tensor | None = None
    sample_weight: Tensor | None = None
    smoothing: Tensor | None = None
    label_scale: Tensor | None = None
    numbers: Tensor | None = None
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: int = MEAN
    form: int = 0
    form_options: tuple[float, ...] = ()
    backend: str = "cpu"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first fields: all tensors but `numbers`."""
        first = (self.target, self.target_b, self.lam, *self.tables(), self.table, self.seed, self.grad_scale)
        return (*first, *self.beside())

    def tables(self) -> Tables:
        return self.shift, self.scale, self.margin, self.row_scale, self.weight

    def held(self) -> list[Tensor]:
        """The tensors that there are, to be saved for a backward: saving fourteen Nones takes longer than a small kernel."""
        return [tensor for tensor in self.tensors() if tensor is not None]

    def holding(self, held: Iterable[Tensor]) -> Call:
        """With these, in the order of `held`, in place of its own."""
        tensors = iter(held)
        return Call._make([*(None if own is None else next(tensors) for own in self.tensors()), *self[TENSORS:]])

    def beside(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """sample_weight, smoothing, label_scale: what no kernel forms a gradient with respect to."""
        return self.sample_weight, self.smoothing, self.label_scale

    def eps(self) -> float | Tensor:
        """The label smoothing: a number for all labels, or (C,)."""
        return self.label_smoothing if self.smoothing is None else self.smoothing

    def smooth(self) -> bool:
        """Whether labels are smoothed."""
        return self.label_smoothing != 0.0 or self.smoothing is not None

    def factor(self, rows: int) -> Tensor | None:
        """`grad_scale`, one number a row; one number for all of them comes expanded."""
        scale = self.grad_scale
        return None if scale is None else scale.expand(rows) if scale.dim() == 0 else scale.contiguous()

    def with_tables(self, tables: tuple[Tensor | None, ...]) -> Call:
        shift, scale, margin, row_scale, weight = tables
        return self._replace(shift=shift, scale=scale, margin=margin, row_scale=row_scale, weight=weight)

    def with_numbers(self) -> Call:
        """With `numbers` as Python's, which waits for nothing: they are on the CPU."""
        if self.numbers is None:
            return self
        focal_gamma, label_smoothing = self.numbers.tolist()
        return self._replace(numbers=None, focal_gamma=focal_gamma, label_smoothing=label_smoothing)


TENSORS = Call._fields.index("numbers")  # the first fields: tensors or None, all but `numbers`
TABLES = Call._fields[3:8]
# What callers say for `Call.beside`, in its order.
BESIDE = ("sample_weight", "label_smoothing", "label_scale")


def denominator_of(call: Call) -> Tensor:
    """What the reduction divides by, over the whole batch; float64."""
    target, own = call.target, call.sample_weight
    if call.reduction not in (MEAN, BATCH_MEAN):
        return torch.ones((), dtype=torch.float64, device=target.device)
    if target.is_floating_point():  # class weights do not count, as in torch
        if own is None or call.reduction == BATCH_MEAN:
            return target.new_tensor(target.shape[0], dtype=torch.float64)
        return own.double().sum()
    valid = target != call.ignore_index
    if call.reduction == BATCH_MEAN or (call.weight is None and own is None):
        return valid.sum().double()
    weights = torch.ones(len(target), dtype=torch.float64, device=target.device)
    if call.weight is not None:
        table = call.weight.double()
        weights = table[target.where(valid, 0)]
        if call.target_b is not None and call.lam is not None:
            share = call.lam.double()
            weights = share * weights + (1 - share) * table[call.target_b.where(valid, 0)]
    if own is not None:
        weights = weights * own.double()
    return weights.where(valid, 0).sum()


class Out(NamedTuple):
    """What a back end fills: its signature is ``adjusted_ce(logits, call, out)``.

    loss: () real, or (N,) for the reduction "none".
    grad: (N, C) in the logits' dtype, times `Call.grad_scale`; None where it is not wanted. It may be the logits themselves.
    grad_tables: (K, C) real, a row for each of the K tables that `needs` says.
    """

    loss: Tensor
    grad: Tensor | None = None
    grad_tables: Tensor | None = None
    needs: Sequence[bool] = ()
