"""Influence-balanced loss: rows weighted by the inverse of their influence on the decision boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError, DTypeError
from ..heads import linear_adjusted_cross_entropy
from ._core import adjusted_cross_entropy
from ._door import Options, Target
from ._module import AdjustedCrossEntropy, Common
from .class_balanced import class_balanced

if TYPE_CHECKING:
    from typing_extensions import Unpack


class InfluenceBalanced(AdjustedCrossEntropy):
    """Influence-balanced loss (IB), Park et al. 2021 (arXiv:2110.02444): cross-entropy with class weights ``1 / n`` (their sum is the
    number of classes), each row times ``alpha / (|p - e_y|_1 |h|_1 + eps)``, h being the features before the classifier.

    ``|p - e_y|_1`` is ``2 (1 - p_y)`` and comes from the row's loss: a forward pass without gradients first. The factor is a weight, as in
    the paper's derivation. The authors' code lets gradient flow through it, which pushes away from the rows' own minima; `detach` False
    does that, by the plain torch reference. The authors use it from half of the training on, after cross-entropy.

    A row's factor is large where the network is right, so a mean that divides by the factors would say little: the default reduction is
    ``"batch_mean"``, as in the authors' code. It has no name on the command line, whose trainer hands losses logits alone.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        alpha: factor of the whole loss, above 0; a rescaling.
        eps: what is added to the influence, above 0.
        detach: whether the factor is a constant for autograd.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`;
            reduction is ``"batch_mean"`` where nothing is said, and weight the loss' own.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target class indices (N,), () or (N, d1, ...); features the target's shape and D; loss as
        in `AdjustedCrossEntropy`.

    Dtype:
        logits and features float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers, a call without features, targets that are mixed
            or probabilities.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.InfluenceBalanced([6, 3, 1])
        >>> logits, features = torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([[0.5, -1.5]])
        >>> round(loss(logits, torch.tensor([2]), features=features).item(), 2)
        1197.85
    """

    title = "influence-balanced"
    predict = "the logits as they are"

    if TYPE_CHECKING:

        def __call__(
            self, logits: Tensor, target: Target, *, features: Tensor | None = None, **said: Unpack[Options]
        ) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        alpha: float = 1000.0,
        eps: float = 1e-3,
        detach: bool = True,
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        built = class_balanced(class_counts, None, empty=empty, table_dtype=common.get("table_dtype") or torch.float32)
        common.setdefault("reduction", "batch_mean")
        super().__init__(built, class_counts=class_counts, **common)
        self.alpha = _checks.number("alpha", alpha, above=0.0)
        self.eps = _checks.number("eps", eps, above=0.0)
        self.detach = detach

    def forward(
        self, logits: Tensor, target: Target, *, features: Tensor | None = None, **said: Unpack[Options]
    ) -> Tensor:
        """The loss; `features` are those that the classifier made the logits of, all else as of every loss."""
        if features is None:
            raise TypeError(
                "InfluenceBalanced needs the features that the logits were made of: loss(logits, target, features=features)"
            )
        z = logits.detach() if self.detach else logits
        own = self._factors(features, target, lambda **o: adjusted_cross_entropy(z, target, **o), said)
        said["sample_weight"] = own
        return super().forward(logits, target, **said)

    def from_features(self, features: Tensor, weight: Tensor, target: Target, **said: Any) -> Tensor:
        """As of every loss; the logits are formed twice."""
        of_head = {name: said[name] for name in ("bias", "normalize", "chunk_rows") if name in said}
        own = self._factors(
            features, target, lambda **o: linear_adjusted_cross_entropy(features, weight, target, **of_head, **o), said
        )
        return super().from_features(features, weight, target, **{**said, "sample_weight": own})

    def _factors(self, features: Tensor, target: Target, plain: Callable[..., Tensor], said: Any) -> Tensor:
        """(N,) factors of the rows; `plain` is the cross-entropy with further options."""
        if not isinstance(target, Tensor) or target.is_floating_point():
            raise DTypeError("target is mixed or holds probabilities; InfluenceBalanced takes class indices")
        if (
            not isinstance(features, Tensor)
            or features.shape[:-1] != target.shape
            or features.dim() != target.dim() + 1
        ):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ArgumentError(
                f"features has shape {shape}; targets of shape {tuple(target.shape)} need one vector each"
            )
        ignored = said.get("ignore_index", self.ignore_index)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            rows = plain(reduction="none", ignore_index=ignored, backend=said.get("backend", self.backend))
            size = features.abs().sum(dim=-1, dtype=rows.dtype)
            factors = self.alpha / (-2 * torch.expm1(-rows) * size + self.eps)
            given = said.get("sample_weight")
            return factors if given is None else factors * given
