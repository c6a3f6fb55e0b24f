"""Two classifiers without training: votes of the nearest samples, and the nearest class mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._features import check_count, check_labels, check_rows
from ..diversity import ClassStatistics
from ._search import METRICS, References, check_k, check_own


class KNeighborsClassifier:
    """Votes of the k nearest samples, weighted by similarity and by class: ``sum of exp(s_i / temperature) / n_{y_i}^balance``.

    Args:
        features: (M, D) float features of labelled samples; a tensor or a NumPy array.
        labels: (M,) integers, class ids from 0.
        k: voters, at least 1. 200 with temperature 0.07 is usual for features of foundation models.
        metric: ``"cosine"``, or ``"euclidean"``, whose similarity s is minus the squared distance.
        temperature: above 0; None gives every neighbour one vote.
        balance: exponent a of the class counts, at least 0: 0 is the plain vote, 1 corrects the prior, so that a class of many samples
            does not win by having them.
        num_classes: C; by default the largest label plus 1.
        class_counts: (C,) counts n for `balance`, where the features are a part of the training set; by default those of `labels`.

    Raises:
        TypeError, ValueError: as `nearest_neighbors`, labels that are not class ids, a label without a class, options out of range,
            class_counts that are 0 for a class among the labels.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> knn = ltk.neighbors.KNeighborsClassifier(features, labels, k=3, metric="euclidean", balance=1.0, class_counts=[6, 1])
        >>> knn.scores([[1.2]])
        tensor([[0.3333, 1.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        features: Any,
        labels: Any,
        k: int = 5,
        *,
        metric: str = "cosine",
        temperature: float | None = None,
        balance: float = 0.0,
        num_classes: int | None = None,
        class_counts: _checks.ClassCounts | None = None,
    ) -> None:
        self._features = features
        self._references = References(features, metric)
        device = self._references.rows.device
        classes = None if num_classes is None else _checks.num_classes(num_classes)
        y, self.num_classes = check_labels(labels, self._references.count, classes, "num_classes")
        self._labels = y.to(device, torch.int64)
        self.k = check_k(k, len(y), False)
        self.temperature = None if temperature is None else _checks.number("temperature", temperature, above=0.0)
        self.balance = _checks.number("balance", balance, low=0.0)
        self._weights = self._class_weights(class_counts).to(device)

    def _class_weights(self, class_counts: _checks.ClassCounts | None) -> Tensor:
        own = torch.bincount(self._labels.cpu(), minlength=self.num_classes)
        n = own
        if class_counts is not None:
            n = torch.tensor(_checks.count_list(class_counts))
            if len(n) != self.num_classes:
                raise ValueError(f"class_counts has {len(n)} entries; there are {self.num_classes} classes")
            bad = (n == 0) & (own > 0)
            if bad.any():
                c = int(bad.nonzero()[0])
                raise ValueError(f"class_counts is 0 for class {c}, of which there are {int(own[c])} samples")
        return n.clamp(min=1).double() ** -self.balance

    def scores(self, queries: Any, *, own: Any = None) -> Tensor:
        """(Q, C) float64: the votes of every class, a neighbour as near as the nearest one counting 1 before the class' weight (only the
        votes' ratios mean anything). `own` (Q,) is the sample that a query is itself and that has no vote; -1 for none."""
        x = self._references.check_queries(queries)
        own = check_own(own, len(x), len(self._labels), self._labels.device)
        k = check_k(self.k, len(self._labels), own is not None)
        out = torch.zeros(len(x), self.num_classes, dtype=torch.float64, device=self._labels.device)
        for at, (similarity, indices) in self._references.nearest(x, k, own):
            votes = torch.ones_like(similarity, dtype=torch.float64)
            if self.temperature is not None:
                s = similarity.double()
                votes = torch.exp((s - s[:, :1]) / self.temperature)
            # The class' weight comes last: equal votes of a class are then counted without rounding.
            out[at : at + len(indices)].scatter_add_(1, self._labels[indices], votes)
        return out.mul_(self._weights)

    def predict(self, queries: Any, *, own: Any = None) -> Tensor:
        """(Q,) int64: the class of the most votes; of equal ones the smaller class index."""
        return self.scores(queries, own=own).argmax(dim=1)

    def leave_one_out(self) -> Tensor:
        """(M, C) float64: the scores of every sample by all others."""
        return self.scores(self._features, own=torch.arange(len(self._labels), device=self._labels.device))


class NearestClassMean:
    """Nearest class mean (NCM): the class whose mean is nearest, as a linear classifier: ``2 mu_c . z - |mu_c|^2``, which is ``|z|^2`` less
    the squared distance; or the cosine with the means.

    It is made of streamed samples, or of `ltkernels.diversity.ClassStatistics` by `from_statistics`.

    Args:
        width: D, features of a sample.
        num_classes: C.
        metric: ``"euclidean"`` or ``"cosine"``, the cosine of z with the mean.
        device: of the sums, and of everything that comes of them.

    Attributes:
        counts: (C,) int64, samples seen.
        means: (C, D) float64; 0 for a class without samples, which is never predicted.

    Raises:
        TypeError, ValueError: options out of range, and later features and labels as `KNeighborsClassifier`.

    Source: Mensink et al. 2013 (doi:10.1109/TPAMI.2013.83); as a classifier for long tails Kang et al. 2020 (arXiv:1910.09217).

    Example:
        >>> ncm = ltk.neighbors.NearestClassMean(1, 2).update([[0.0], [1.0], [2.0], [10.0]], [0, 0, 1, 1])
        >>> ncm.means.tolist(), ncm.predict([[1.2], [5.0]])
        ([[0.5], [6.0]], tensor([0, 1]))
    """

    def __init__(self, width: int, num_classes: int, *, metric: str = "euclidean", device: Any = None) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(map(repr, METRICS))}")
        self.metric = metric
        classes = _checks.num_classes(num_classes)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.means = torch.zeros(classes, check_count(width, "width", 1), dtype=torch.float64, device=device)

    @classmethod
    def from_statistics(cls, statistics: ClassStatistics, *, metric: str = "euclidean") -> NearestClassMean:
        """The classifier of streamed, merged or loaded statistics; class c is the c-th name."""
        parts = statistics.classes
        found = cls(statistics.width, len(parts), metric=metric, device=parts[0].mean.device)
        found.counts = torch.tensor(statistics.counts, device=found.means.device)
        found.means = torch.stack([part.mean for part in parts])
        return found

    def update(self, features: Any, labels: Any) -> NearestClassMean:
        """Adds a batch (n, D) of float features with labels (n,); returns self. A refused batch changes nothing."""
        step = max(1, 2**21 // self.means.shape[1])
        x = check_rows(features, "features", self.means.shape[1], "the classifier has", step)
        y, classes = check_labels(labels, len(x), len(self.counts), "num_classes")
        y = y.to(self.means.device, torch.int64)
        total = torch.zeros_like(self.means)
        for at in range(0, len(x), step):
            total.index_add_(0, y[at : at + step], x[at : at + step].to(total))
        counts = self.counts + torch.bincount(y, minlength=classes)
        self.means += (total - (counts - self.counts).unsqueeze(1) * self.means) / counts.clamp(min=1).unsqueeze(1)
        self.counts = counts
        return self

    def linear(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight and (C,) bias, float64, of the linear classifier. The bias of a class without samples is -inf. Under the
        cosine the weights are unit vectors (0 for a mean of 0), and the other biases 0: give it unit features."""
        if self.metric == "cosine":
            norm = torch.linalg.vector_norm(self.means, dim=1, keepdim=True)
            weight = self.means / norm.where(norm > 0, 1.0)
            bias = torch.zeros_like(norm).squeeze(1)
        else:
            weight, bias = 2 * self.means, -(self.means * self.means).sum(dim=1)
        return weight, bias.masked_fill(self.counts == 0, -math.inf)

    def logits(self, features: Any) -> Tensor:
        """(n, C) float64: what `linear` makes of the features, -inf for a class without samples.

        ValueError where no class has a sample, and as `update`."""
        if not bool(self.counts.any()):
            raise ValueError("the classifier has seen no sample")
        x = check_rows(
            features, "features", self.means.shape[1], "the classifier has", 2**21 // self.means.shape[1] + 1
        )
        x = x.to(self.means)
        if self.metric == "cosine":
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            x = x / norm.where(norm > 0, 1.0)
        weight, bias = self.linear()
        return torch.addmm(bias, x, weight.T)

    def predict(self, features: Any) -> Tensor:
        """(n,) int64: the class with the largest logit; of equal ones the smaller class index."""
        return self.logits(features).argmax(dim=1)
