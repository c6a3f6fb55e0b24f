"""Equalization loss v2: the factors of a class' positives and negatives follow from the gradients that it has had of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .._head import logits_of
from ._adjustment import rounded
from ._door import Options, Target
from ._module import AdjustedCrossEntropy, Common
from ._sigmoid import options_of, sigmoid_cross_entropy
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RATIO = 100.0  # of all classes, before there is a gradient


def eql_v2(
    num_classes: int,
    gamma: float = 12.0,
    mu: float = 0.8,
    alpha: float = 4.0,
    *,
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Equalization loss v2, Tan et al. 2021 (EQL v2, arXiv:2012.08548), at its start: the ratio of every class is 100, and the loss nearly
    plain sigmoid cross-entropy. `ltkernels.nn.EQLv2` goes on from there.

    Args:
        num_classes: C.
        gamma: steepness of the map from a class' ratio to its factors, at least 0: below, rich classes would be raised.
        mu: ratio at its middle.
        alpha: how much more a positive may count.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form with its table (2, C), for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: options that are no numbers.
        ValueError: options out of range.

    Example:
        >>> ltk.adjustments.eql_v2(2).term.table
        tensor([[1., 1.],
                [1., 1.]])
    """
    ratio = torch.full((_checks.num_classes(num_classes),), _RATIO, dtype=torch.float64, device="cpu")
    gamma, mu = _checks.number("gamma", gamma, low=0.0), _checks.number("mu", mu)
    table = _factors(ratio, gamma, mu, _checks.number("alpha", alpha, low=0.0))
    return rounded(ClosedForm(Term("sigmoid", table)), table_dtype)


def _factors(ratio: Tensor, gamma: float, mu: float, alpha: float) -> Tensor:
    """(2, C): of the negatives, of the positives."""
    negative = torch.sigmoid(gamma * (ratio - mu))
    return torch.stack([negative, 1 + alpha * (1 - negative)])


class EQLv2(AdjustedCrossEntropy):
    """Equalization loss v2, Tan et al. 2021 (EQL v2, arXiv:2012.08548): sigmoid cross-entropy whose class j has factor ``f_j`` as a
    negative and ``1 + alpha (1 - f_j)`` as a positive, ``f_j = sigmoid(gamma (r_j - mu))``, r_j the ratio of the gradients that it has had
    as a positive and as a negative over the whole training.

    A forward pass in training mode takes the factors as they are and adds its gradients afterwards, to the float64 buffers
    `positive_gradient` and `negative_gradient` (C,), which are in the state dict; they come from the loss' own pass. The gradients are
    those with factors and without class or sample weights. Activation checkpointing around the loss would count a batch twice. Divide by
    the number of rows, as the paper: ``reduction="batch_mean"``. Multi-label targets (N, C) are taken too.

    Args:
        num_classes: C.
        gamma: steepness of the map from a class' ratio to its factors, at least 0: below, rich classes would be raised.
        mu: ratio at its middle.
        alpha: how much more a positive may count.
        process_group: adds the gradients over its ranks; "world" is the default group, None this process alone. Every rank must call.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`;
            in training inplace must be False.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target class indices or multi-label; loss as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: options that are no numbers; in training, mixed targets.
        ValueError: options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.EQLv2(3)
        >>> logits = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(loss(logits, torch.tensor([2])).item(), 4)
        3.2614
        >>> loss.positive_gradient
        tensor([0.0000, 0.0000, 0.6225], dtype=torch.float64)
    """

    name = "eql_v2"
    title = "equalization v2"
    build = staticmethod(eql_v2)

    positive_gradient: Tensor
    negative_gradient: Tensor

    def __init__(
        self,
        num_classes: int,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        *,
        process_group: Any = None,
        **common: Unpack[Common],
    ) -> None:
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(f"process_group is {process_group!r}; it must be a process group, 'world' or None")
        options = {"gamma": gamma, "mu": mu, "alpha": alpha}
        super().__init__(num_classes=num_classes, options=options, **common)
        for name in ("positive_gradient", "negative_gradient"):
            self._table(name, torch.zeros(num_classes, dtype=torch.float64, device="cpu"), made=False)
        self.process_group = process_group

    @property
    def ratio(self) -> Tensor:
        """(C,) float64: the gradients as a positive over those as a negative; 100 before there are any."""
        found = self.positive_gradient / self.negative_gradient.clamp(min=1e-10)
        some = (self.positive_gradient > 0) | (self.negative_gradient > 0)
        return torch.where(some.any(), found, _RATIO)

    def forward(self, logits: Tensor, target: Target, **said: Unpack[Options]) -> Tensor:
        """The loss; as of every loss. In training mode its gradients join the buffers."""
        if not self.training:
            return super().forward(logits, target, **said)
        if isinstance(target, tuple):
            raise TypeError(
                "target is mixed; EQLv2 has no gradients as a positive for it in training: give class indices or multi-label targets"
            )
        options = options_of({**self.call_options(), **said})
        for name in ("negative", "positive"):
            options[name] = options[name].clone()  # a backward needs those of this call
        loss, sums = sigmoid_cross_entropy(logits, target, statistics=True, **options)
        self._collect(sums)
        return loss

    def from_features(
        self,
        features: Tensor,
        weight: Tensor,
        target: Target,
        *,
        bias: Tensor | None = None,
        normalize: bool = False,
        chunk_rows: int | None = None,
        **said: Any,
    ) -> Tensor:
        """As of every loss; in training mode the logits are held, for their gradients."""
        if not self.training:
            return super().from_features(
                features, weight, target, bias=bias, normalize=normalize, chunk_rows=chunk_rows, **said
            )
        if chunk_rows:
            raise ArgumentError(f"chunk_rows={chunk_rows} is not possible: EQLv2 holds the logits in training")
        return self(logits_of(features, weight, bias, normalize), target, **said)

    @torch.no_grad()
    def _collect(self, sums: Tensor) -> None:
        assert self.term_table is not None
        gradients = sums.double()
        if self.process_group is not None:
            group = None if isinstance(self.process_group, str) else self.process_group
            torch.distributed.all_reduce(gradients, group=group)
        self.positive_gradient.add_(gradients[0])
        self.negative_gradient.add_(gradients[1])
        own: Any = self.options
        self.term_table.copy_(_factors(self.ratio, own["gamma"], own["mu"], own["alpha"]))
