"""Distribution-balanced loss: multi-label classification with skewed and co-occurring classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._backends import Explanation
from .._tables import KeepsTables
from ._sigmoid import explain_sigmoid, sigmoid_cross_entropy


class DistributionBalanced(KeepsTables):
    """Distribution-balanced loss for multi-label targets, Wu et al. 2020 (DB, arXiv:2007.09654).

    With n_j the samples of class j among N, ``a_j = z_j + bias log(n_j / (N - n_j))`` and ``w_ij = base + sigmoid(steepness (r_ij -
    centre))``, ``r_ij = (1 / n_j) / sum over the positives k of row i of 1 / n_k``::

        l_i = sum over positive j of w_ij softplus(-a_j) + 1 / negative_scale * sum over negative j of w_ij softplus(negative_scale a_j)

    The paper divides by C too. The authors' code divides the bias by `negative_scale`: give ``bias / negative_scale`` for it. With
    `focal_gamma` it is their DB-focal up to a constant factor. A row without positives has w = base + 1.

    Args:
        class_counts: (C,) samples that have each class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        num_samples: N; larger than every count.
        base: of the weight, alpha in the paper.
        steepness: of the weight, beta in the paper.
        centre: of the weight, mu in the paper.
        bias: kappa in the paper.
        negative_scale: lambda in the paper, above 0.
        focal_gamma: gamma of the focal factor, at least 0.
        ignore_index, reduction, backend: as in `ltkernels.functional.sigmoid_cross_entropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target in that shape: 1, 0, and -1 or `ignore_index` for what is not known; or class
        indices; loss (), or (N, d1, ...) with ``reduction="none"``.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others; target bool, uint8, float32
        or any other real one.

    Raises:
        TypeError: arguments of the wrong kind, named with their value.
        ValueError: counts of 0 or of num_samples, values out of range.

    Predict with: the logits as they are, ``sigmoid(z)``.

    Example:
        >>> loss = ltk.nn.DistributionBalanced([60, 30, 10], 70)
        >>> round(loss(torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([[True, False, True]])).item(), 4)
        1.7843
    """

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, logits: Tensor, target: Tensor, **said: Any) -> Tensor: ...

    shift: Tensor
    rebalance: Tensor
    negative: Tensor

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        num_samples: int,
        *,
        base: float = 0.1,
        steepness: float = 10.0,
        centre: float = 0.2,
        bias: float = 0.05,
        negative_scale: float = 2.0,
        focal_gamma: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        n = _checks.class_counts(class_counts, option=False).n
        total = _checks.integer("num_samples", num_samples)
        if (n >= total).any():
            at = int((n >= total).nonzero()[0])
            raise ValueError(f"class_counts[{at}] is {int(n[at])}; it must be below num_samples ({total})")
        _checks.reduction(reduction)
        numbers = {"base": base, "steepness": steepness, "centre": centre, "bias": bias}
        named = {name: _checks.number(name, value) for name, value in numbers.items()}
        self.rebalance_map = (named["base"], named["steepness"], named["centre"])
        self.negative_scale = _checks.number("negative_scale", negative_scale, above=0.0)
        self.focal_gamma = _checks.number("focal_gamma", focal_gamma, low=0.0)
        self.ignore_index, self.reduction, self.backend = ignore_index, reduction, backend
        self._table("shift", (named["bias"] * torch.log(n / (total - n))).float())
        self._table("rebalance", (n.min() / n).float())
        self._table("negative", torch.full_like(n, 1 / self.negative_scale).float())

    def forward(self, logits: Tensor, target: Tensor, **said: Any) -> Tensor:
        """The loss; further keywords are those of `ltkernels.functional.sigmoid_cross_entropy`, and count for this call."""
        found: Tensor = sigmoid_cross_entropy(logits, target, **{**self.call_options(), **said})
        return found

    def explain(self, logits: Tensor, target: Tensor, **said: Any) -> Explanation:
        """What `ltkernels.explain` says of a call."""
        return explain_sigmoid(logits, target, **{**self.call_options(), **said})

    def call_options(self) -> dict[str, Any]:
        """What this loss says of a call, as keywords of `ltkernels.functional.sigmoid_cross_entropy`."""
        return {
            "shift": self.shift,
            "rebalance": self.rebalance,
            "negative": self.negative,
            "rebalance_map": self.rebalance_map,
            "negative_scale": self.negative_scale,
            "focal_gamma": self.focal_gamma,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        return f"classes={len(self.shift)}, negative_scale={self.negative_scale}, reduction={self.reduction!r}"
