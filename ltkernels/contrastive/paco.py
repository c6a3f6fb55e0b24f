"""Parametric contrast: a classifier and the samples of batch and queue in one softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from ._module import Contrastive, Options, Queued

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PaCo(Queued):
    """Parametric contrastive learning (PaCo), Cui et al. 2021 (arXiv:2107.12028), with logit-adjusted classes and its queue.

    One softmax over the classes and over the samples of batch, keys and queue. The positives are the label, with weight `beta`, and
    every other sample of the class, with weight `alpha`. A call in training appends the keys after the loss.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        queue_size: K, at least the batch (of all ranks).
        embedding_dim: D of features and keys.
        tau: temperature of the samples, above 0.
        alpha, beta: weights of a positive sample and of the label's logit.
        gamma: factor of the samples' exponentials.
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features and keys (N, D), logits (N, C), labels (N,); loss (), with ``reduction="none"`` (N,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others; the queue is float32.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`; counts that are 0; a queue that is shorter than a batch.

    Predict with: the logits as they are, without the log prior.

    Example:
        >>> loss = ltk.nn.PaCo([6, 3, 1], 64, 8)
        >>> loss(torch.randn(16, 8), torch.randn(16, 3), torch.arange(16) % 3, torch.randn(16, 8)).shape
        torch.Size([])
    """

    kind = "paco"

    if TYPE_CHECKING:

        def __call__(
            self,
            features: Tensor,
            logits: Tensor,
            labels: Tensor,
            keys: Tensor,
            *,
            sample_weight: Tensor | None = None,
        ) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        queue_size: int,
        embedding_dim: int,
        tau: float = 0.2,
        alpha: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(queue_size, embedding_dim, tau, **options)
        self._count(class_counts)
        self.weights = _weights(alpha, beta, gamma)

    def forward(
        self,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        keys: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self._queued_loss(
            features,
            labels,
            keys,
            keys=keys,
            logits=logits,
            class_counts=self.class_counts,
            sample_weight=sample_weight,
            **self.weights,
        )


class GPaCo(Contrastive):
    """Generalized parametric contrastive learning (GPaCo), Cui et al. 2023 (arXiv:2209.12400): `PaCo` without momentum encoder and queue.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: temperature of the samples, above 0.
        alpha, beta: weights of a positive sample and of the label's logit.
        gamma: factor of the samples' exponentials.
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features (M, D), logits (M, C), labels (M,), the views of a sample among the M rows; loss (), with ``reduction="none"`` (M,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`; counts that are 0.

    Predict with: the logits as they are, without the log prior.

    Example:
        >>> loss = ltk.nn.GPaCo([6, 3, 1])
        >>> loss(torch.randn(16, 8), torch.randn(16, 3), torch.arange(16) % 3).shape
        torch.Size([])
    """

    kind = "gpaco"

    if TYPE_CHECKING:

        def __call__(
            self, features: Tensor, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
        ) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: float = 0.2,
        alpha: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(tau, **options)
        self._count(class_counts)
        self.weights = _weights(alpha, beta, gamma)

    def forward(
        self, features: Tensor, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        return self._loss(
            features,
            labels,
            logits=logits,
            class_counts=self.class_counts,
            sample_weight=sample_weight,
            **self.weights,
        )


def _weights(alpha: float, beta: float, gamma: float) -> dict[str, float]:
    return {
        "alpha": _checks.number("alpha", alpha, low=0.0),
        "beta": _checks.number("beta", beta, above=0.0),
        "gamma": _checks.number("gamma", gamma, above=0.0),
    }
