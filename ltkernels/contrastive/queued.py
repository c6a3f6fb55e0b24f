"""Contrast against a queue of a momentum encoder's keys: MoCo, KCL and GML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from ._module import Options, Queued

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MoCo(Queued):
    """The loss of momentum contrast, He et al. 2020 (arXiv:1911.05722), with its queue; InfoNCE.

    A call in training appends the keys after the loss. The momentum encoder is the caller's.

    Args:
        queue_size: K, at least the batch (of all ranks).
        embedding_dim: D.
        tau: temperature, above 0.
        **options: learnable_tau, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features and keys (N, D); loss (), with ``reduction="none"`` (N,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others; the queue is float32.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`; a queue that is shorter than a batch.

    Predict with: a classifier trained on the features (a linear probe, or fine-tuning).

    Example:
        >>> loss = ltk.nn.MoCo(64, 8)
        >>> loss(torch.randn(16, 8), torch.randn(16, 8)).item()  # nothing in the queue yet
        0.0
    """

    kind = "moco"

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, keys: Tensor, *, sample_weight: Tensor | None = None) -> Tensor: ...

    def __init__(self, queue_size: int, embedding_dim: int, tau: float = 0.07, **options: Unpack[Options]) -> None:
        if options.get("class_weight") is not None:
            raise ArgumentError("class_weight is given, but MoCo knows no classes")
        super().__init__(queue_size, embedding_dim, tau, **options)

    def forward(self, features: Tensor, keys: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return self._queued_loss(features, None, keys, keys=keys, sample_weight=sample_weight)


class KCL(Queued):
    """K-positive contrastive loss, Kang et al. 2021 (ICLR, "Exploring balanced feature spaces for representation learning"): the own key
    and k keys of the row's class, drawn from the queue without replacement, so that head classes have no more positives than tail classes.

    Args:
        queue_size: K, at least the batch (of all ranks).
        embedding_dim: D.
        positives: k; a class with fewer keys in the queue gives all of them.
        tau: temperature, above 0.
        generator: of the draws; None is torch's default.
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features and keys (N, D), labels (N,) not below 0; loss (), with ``reduction="none"`` (N,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others; the queue is float32.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`; a queue that is shorter than a batch.

    Predict with: a classifier trained on the features with balanced sampling (a second stage).

    Example:
        >>> loss = ltk.nn.KCL(64, 8)
        >>> loss(torch.randn(16, 8), torch.arange(16) % 4, torch.randn(16, 8)).item()  # nothing in the queue yet
        0.0
    """

    kind = "kcl"

    if TYPE_CHECKING:

        def __call__(
            self, features: Tensor, labels: Tensor, keys: Tensor, *, sample_weight: Tensor | None = None
        ) -> Tensor: ...

    def __init__(
        self,
        queue_size: int,
        embedding_dim: int,
        positives: int = 6,
        tau: float = 0.07,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(queue_size, embedding_dim, tau, **options)
        if _checks.integer("positives", positives) < 0:
            raise ArgumentError(f"positives is {positives}; it must be at least 0")
        self.positives, self.generator = positives, generator

    def forward(self, features: Tensor, labels: Tensor, keys: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return self._queued_loss(
            features,
            labels,
            keys,
            keys=keys,
            positives=self.positives,
            generator=self.generator,
            sample_weight=sample_weight,
        )


class GML(Queued):
    """The contrastive branch of GML, Suh and Seo 2023 (arXiv:2305.01160): logit-adjusted cross-entropy of class logits that are
    log-means of exponentials over the queue's keys of a class, a bound on the mutual information of features and labels.

    A class without a key in the queue is left out; a row of such a class has the loss 0 and does not count in the mean.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        queue_size: K, at least the batch (of all ranks).
        embedding_dim: D.
        tau: temperature, above 0.
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features and keys (N, D), labels (N,); loss (), with ``reduction="none"`` (N,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others; the queue is float32.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`; counts that are 0; a queue that is shorter than a batch.

    Predict with: the classifier that is trained beside it.

    Example:
        >>> loss = ltk.nn.GML([6, 3, 1], 64, 8)
        >>> loss(torch.randn(16, 8), torch.arange(16) % 3, torch.randn(16, 8)).item()  # nothing in the queue yet
        0.0
    """

    kind = "gml"

    if TYPE_CHECKING:

        def __call__(
            self, features: Tensor, labels: Tensor, keys: Tensor, *, sample_weight: Tensor | None = None
        ) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        queue_size: int,
        embedding_dim: int,
        tau: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(queue_size, embedding_dim, tau, **options)
        self._count(class_counts)

    def forward(self, features: Tensor, labels: Tensor, keys: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return self._queued_loss(features, labels, keys, class_counts=self.class_counts, sample_weight=sample_weight)
