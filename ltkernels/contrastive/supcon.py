"""Contrast within a batch: SupCon and NT-Xent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._errors import ArgumentError
from ._module import Contrastive, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SupCon(Contrastive):
    """Supervised contrast, Khosla et al. 2020 (arXiv:2004.11362), equations 2 ("out") and 3 ("in"), as in `contrastive`.

    Args:
        tau: temperature, above 0.
        inside: whether the mean over the positives stands inside the logarithm (equation 3).
        **options: learnable_tau, class_weight, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features (N, D) or (N, V, D), labels (N,); loss (), with ``reduction="none"`` (N,) or (N, V).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`.

    Predict with: a classifier trained on the features (a linear probe, or a second stage).

    Example:
        >>> loss = ltk.nn.SupCon(tau=0.5)
        >>> round(loss(torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])).item(), 4)
        0.2395
    """

    kind = "supcon"

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor: ...

    def __init__(self, tau: float = 0.1, inside: bool = False, **options: Unpack[Options]) -> None:
        super().__init__(tau, **options)
        self.inside = inside
        if inside:
            self.kind = "supcon_in"  # type: ignore[misc]

    def forward(self, features: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return self._loss(features, labels, sample_weight=sample_weight)


class NTXent(Contrastive):
    """NT-Xent, Chen et al. 2020 (arXiv:2002.05709): the other views of a sample against all of the batch.

    Args:
        tau: temperature, above 0.
        **options: learnable_tau, ignore_index, reduction, normalize, group, chunk_rows and backend of `Options`.

    Shape:
        features (N, V, D), V views of each sample, or (M, D) with ids (M,) that say which rows are views of one sample; loss (), with
        ``reduction="none"`` (N, V) or (M,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others.

    Raises:
        TypeError, ValueError: as `ltkernels.functional.contrastive`.

    Predict with: a classifier trained on the features (a linear probe, or fine-tuning).

    Example:
        >>> loss = ltk.nn.NTXent(tau=0.5)
        >>> round(loss(torch.eye(3)[torch.tensor([[0, 0], [1, 1]])]).item(), 4)
        0.2395
    """

    kind = "ntxent"

    if TYPE_CHECKING:

        def __call__(
            self, features: Tensor, ids: Tensor | None = None, *, sample_weight: Tensor | None = None
        ) -> Tensor: ...

    def __init__(self, tau: float = 0.1, **options: Unpack[Options]) -> None:
        if options.get("class_weight") is not None:
            raise ArgumentError("class_weight is given, but NTXent knows no classes")
        super().__init__(tau, **options)

    def forward(self, features: Tensor, ids: Tensor | None = None, *, sample_weight: Tensor | None = None) -> Tensor:
        return self._loss(features, ids, sample_weight=sample_weight)
