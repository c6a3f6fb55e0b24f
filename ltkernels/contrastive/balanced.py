"""Contrast against one vector a class: balanced contrast (BCL) and prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from .._ranks import Ranks
from ._contrastive import features_by_row
from ._logsumexp import indices, matrix, unit, within
from ._module import Contrastive, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BalancedContrastive(Contrastive):
    """Balanced contrastive loss (BCL), Zhu et al. 2022 (arXiv:2207.09052): every class counts by the mean of its columns, and
    every class has a column, its centre.

    Centres given with the call, such as the classifier's weights through a projection as in the paper, get a gradient. Without any the
    Module keeps running means of the classes' features, `centres` (C, D), which it moves in training; that of a class that was not seen yet
    is 0, and so is its similarity with everything.

    Args:
        num_classes: C.
        embedding_dim: D of the running centres; None where centres are always given.
        tau: temperature, above 0.
        momentum: share of a running centre that a batch leaves, in [0, 1).
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features (N, D) or (N, V, D), labels (N,), centres (C, D); loss (), with ``reduction="none"`` (N,) or (N, V).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`.

    Predict with: the classifier that is trained beside it, usually with logit adjustment.

    Example:
        >>> loss = ltk.nn.BalancedContrastive(2, tau=0.5)
        >>> round(loss(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), torch.eye(2)).item(), 4)
        0.1269
    """

    kind = "balanced"
    centres: Tensor | None

    if TYPE_CHECKING:

        def __call__(
            self,
            features: Tensor,
            labels: Tensor,
            centres: Tensor | None = None,
            *,
            sample_weight: Tensor | None = None,
        ) -> Tensor: ...

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int | None = None,
        tau: float = 0.1,
        momentum: float = 0.9,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(tau, **options)
        self.num_classes = _checks.num_classes(num_classes)
        self.momentum = _checks.number("momentum", momentum, low=0.0, high=1.0)
        if embedding_dim is not None and _checks.integer("embedding_dim", embedding_dim) < 1:
            raise ArgumentError(f"embedding_dim is {embedding_dim}; it must be at least 1")
        self.register_buffer("centres", torch.zeros(num_classes, embedding_dim) if embedding_dim is not None else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As of every loss, and no class has been seen."""
        super().reset_parameters()
        if self.centres is not None:
            self.centres.zero_()

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        centres: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        if centres is None:
            if self.centres is None:
                raise ArgumentError(
                    "centres is missing, and the Module was made without embedding_dim, so it keeps none"
                )
            if self.training:
                rows, views = features_by_row(features)  # refused before a centre moves
                matrix("features", rows, self.centres.to(rows.dtype), "centres")
                given = indices("labels", labels, len(features), features.device)
                within("labels", given, 0, self.num_classes, self.ignore_index)
                self._move(rows.detach(), given.repeat_interleave(views))
            centres = self.centres.to(features.dtype, copy=True)
        elif len(centres) != self.num_classes:
            raise ArgumentError(f"centres has {len(centres)} rows; the loss has {self.num_classes} classes")
        return self._loss(features, labels, centres=centres, sample_weight=sample_weight)

    @torch.no_grad()
    def _move(self, rows: Tensor, labels: Tensor) -> None:
        """The running centres of the batch's classes towards the means of their features, of all ranks."""
        assert self.centres is not None
        rows = unit(rows).to(self.centres.dtype)
        valid = labels != self.ignore_index
        label = torch.where(valid, labels, 0)
        sums = torch.zeros_like(self.centres).index_add(0, label, rows * valid[:, None])
        counts = torch.zeros(len(sums), dtype=torch.int64, device=rows.device).index_add(0, label, valid.long())
        if self.group is not None:
            ranks = Ranks(self.group)
            sums, counts = sum(ranks.gather(sums)), sum(ranks.gather(counts))  # type: ignore[assignment]
        there = counts > 0
        means = sums / counts.clamp_min(1)[:, None]
        seen = (self.centres != 0).any(dim=1)
        kept = torch.where(seen, self.momentum, 0.0)[:, None].to(means.dtype)
        self.centres.copy_(torch.where(there[:, None], kept * self.centres + (1 - kept) * means, self.centres))


class PrototypeContrastive(Contrastive):
    """The prototype branch of hybrid contrastive networks, Wang et al. 2021 (arXiv:2103.14267): a learned unit vector a class, each row
    against those of the other classes.

    Args:
        num_classes: C, at least 2.
        embedding_dim: D.
        tau: temperature, above 0.
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features (N, D) or (N, V, D), labels (N,); loss (), with ``reduction="none"`` (N,) or (N, V). `prototypes` (C, D) is a Parameter.

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`.

    Predict with: the classifier that is trained beside it.

    Example:
        >>> loss = ltk.nn.PrototypeContrastive(3, 8)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
    """

    kind = "prototypes"

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor: ...

    def __init__(self, num_classes: int, embedding_dim: int, tau: float = 0.1, **options: Unpack[Options]) -> None:
        super().__init__(tau, **options)
        if _checks.num_classes(num_classes) < 2:
            raise ArgumentError(f"num_classes is {num_classes}; it must be at least 2")
        if _checks.integer("embedding_dim", embedding_dim) < 1:
            raise ArgumentError(f"embedding_dim is {embedding_dim}; it must be at least 1")
        self.prototypes = torch.nn.Parameter(torch.empty(num_classes, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As of every loss, and draws the prototypes uniformly on the sphere."""
        super().reset_parameters()
        torch.nn.init.normal_(self.prototypes)

    def forward(self, features: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return self._loss(features, labels, centres=self.prototypes.to(features.dtype), sample_weight=sample_weight)
