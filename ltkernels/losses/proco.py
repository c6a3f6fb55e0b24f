"""ProCo: contrast with infinitely many samples of every class, whose features are von Mises-Fisher distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .._backends import Explanation
from .._backends._shared import bad_label
from .._errors import ArgumentError, DTypeError
from .._tables import KeepsTables
from ..heads import linear_adjusted_cross_entropy
from ._core import explain
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from ..diversity import ClassStatistics

_START = 0.9  # length of a class' mean of which no sample is known: kappa = 90 p / 19


def vmf(kappa: Tensor, features: int, tau: float = 0.1) -> ClosedForm:
    """The expectation of contrastive logits under von Mises-Fisher classes, Du et al. 2024 (arXiv:2403.06726), of cosines as logits:
    ``g_j = log C_p(kappa_j) - log C_p(sqrt(kappa_j^2 + 1 / tau^2 + 2 kappa_j cos_j / tau))``, C_p the density's normaliser.

    It is a function of the cosine alone, by Debye's uniform expansion of the Bessel function of order nu = p / 2 - 1: with x = kappa / nu,
    s = sqrt(1 + x^2) and t = 1 / s, ``-log C_p = nu (s - log(1 + s)) - log(s) / 2 + log(1 + u1(t) / nu + u2(t) / nu^2 + u3(t) / nu^3)``
    up to a constant. log kappa cancels: kappa = 0 is regular. p may be odd. The error against exact Bessel functions is 6e-10 at p = 128,
    4e-11 at p = 256, and grows as nu^-4: 3e-6 at p = 16. In float32 the rounding is 4e-6.

    Args:
        kappa: (C,) concentration of every class, at least 0; floating-point. No gradient flows to it.
        features: p, width of the features that the cosines are of, at least 3.
        tau: temperature, above 0.

    Returns:
        The closed form, for `ltkernels.functional.linear_adjusted_cross_entropy` with ``normalize=True`` and the classes' directions as
        weight, or for `adjusted_cross_entropy` of cosines; with a log prior as shift.

    Raises:
        TypeError: kappa that is no floating-point tensor, options that are no numbers.
        ValueError: kappa below 0 or not finite, options out of range.

    Example:
        >>> form = ltk.adjustments.vmf(torch.tensor([200.0, 50.0, 10.0]), 128)
        >>> cosines = torch.tensor([[0.8, 0.3, -0.2]])
        >>> round(ltk.functional.adjusted_cross_entropy(cosines, torch.tensor([1]), term=form.term).item(), 4)
        4.5939
    """
    if not isinstance(kappa, Tensor) or not kappa.is_floating_point() or kappa.dim() != 1:
        shape = tuple(kappa.shape) if isinstance(kappa, Tensor) else type(kappa).__name__
        raise DTypeError(f"kappa is {shape}; it must be a floating-point tensor of shape (C,)")
    if not torch.compiler.is_compiling():  # which has no values to look at
        bad = ~(torch.isfinite(kappa) & (kappa >= 0))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ArgumentError(f"kappa[{at}] is {kappa[at].item()}; it must be finite and at least 0")
    return ClosedForm(_term(kappa.detach(), features, tau))


def _term(kappa: Tensor, features: int, tau: float) -> Term:
    width = _checks.number("features", features, low=3.0)
    return Term("vmf", kappa, None, (width, _checks.number("tau", tau, above=0.0), 0.0))


class ProCo(KeepsTables):
    """Probabilistic contrastive loss, Du et al. 2024 (ProCo, arXiv:2403.06726): cross-entropy of `ltkernels.adjustments.vmf` of the
    features' cosines with their classes' mean directions, plus the log prior.

    Every class is von Mises-Fisher distributed about the direction of its mean unit feature, with ``kappa = p R / (1 - R^2)``, R the
    mean's length. The means are those of the last epoch's samples and of this epoch's so far; a forward pass in training mode first adds
    its batch, and `next_epoch` lets the last epoch go. They are sums of unit features in buffers: in the state dict, added over ranks.
    Classes of which nothing is known have a random direction and kappa = 90 p / 19.

    The authors add it, with factor 1, to a logit-adjusted cross-entropy of a classifier beside the projector::

        contrast = ltk.nn.ProCo(class_counts, 128)
        classify = ltk.nn.LogitAdjustedCrossEntropy(class_counts)
        for epoch in range(200):
            for first, second, third, target in loader:  # three views: one to classify, two to contrast
                loss = classify(model(first), target) + contrast([project(second), project(third)], target)
            contrast.next_epoch()

    Neither B x C x p numbers nor, for many classes, the B x C cosines are held. Activation checkpointing around it would count a batch
    twice.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        features: p, width of the projected features, at least 3; odd ones too.
        tau: temperature; 0.1 on CIFAR-LT, 0.07 on ImageNet-LT.
        max_kappa: largest concentration.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        ignore_index, reduction: as in `AdjustedCrossEntropy`; ``"none"`` gives the mean over the views of each sample.
        process_group: adds the statistics over its ranks; "world" is the default group, None this process alone. Every rank must call.

    Shape:
        features (N, p), or a sequence of views of that shape; target class indices (N,); loss () or (N,).

    Dtype:
        features float32, float64, bfloat16 or float16; loss float64 for float64 features, float32 for all others. Statistics are float64.

    Raises:
        TypeError: arguments of the wrong kind, named with their value.
        ValueError: values out of range, a label out of range (row and value).

    Predict with: the classifier's logits as they are; this loss trains the features only.

    Example:
        >>> loss = ltk.nn.ProCo([500, 50, 5], 8)
        >>> loss.kappa
        tensor([37.8947, 37.8947, 37.8947])
    """

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, features: Tensor | Sequence[Tensor], target: Tensor) -> Tensor: ...

    log_prior: Tensor
    kappa: Tensor
    direction: Tensor
    sums: Tensor
    seen: Tensor
    last_sums: Tensor
    last_seen: Tensor

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        features: int,
        tau: float = 0.1,
        *,
        max_kappa: float = 1e5,
        empty: str = "error",
        ignore_index: int = -100,
        reduction: str = "mean",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(features, bool) or not isinstance(features, int) or features < 3:
            raise ValueError(f"features is {features!r}; it must be an integer of at least 3")
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(f"process_group is {process_group!r}; it must be a process group, 'world' or None")
        _checks.reduction(reduction)
        counts = _checks.class_counts(class_counts, empty)
        self.features = features
        self.tau = _checks.number("tau", tau, above=0.0)
        self.max_kappa = _checks.number("max_kappa", max_kappa, above=0.0)
        self.ignore_index = _checks.integer("ignore_index", ignore_index)
        self.reduction = reduction
        self.process_group = process_group
        prior = torch.where(counts.empty, -torch.inf, torch.log(counts.n / counts.total))
        classes = len(counts.n)
        self._table("log_prior", prior.float())
        real = _checks.real_dtype(torch.get_default_dtype())  # 16 bits of kappa would be another loss
        self.register_buffer("direction", torch.empty(classes, features, dtype=real))
        self.register_buffer("kappa", torch.empty(classes, dtype=real))
        for name in ("sums", "last_sums"):
            self.register_buffer(name, torch.zeros(classes, features, dtype=torch.float64))
        for name in ("seen", "last_seen"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets all samples: random directions, drawn from torch's generator, and the concentration of classes of which nothing is
        known. After ``to_empty`` the prior comes back too."""
        super().reset_parameters()
        self.direction.copy_(F.normalize(torch.randn_like(self.direction), dim=1))
        self.kappa.fill_(min(_START * self.features / (1 - _START**2), self.max_kappa))
        for held in (self.sums, self.last_sums, self.seen, self.last_seen):
            held.zero_()

    def forward(self, features: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss of one view, or the mean of those of several; in training mode the views join the statistics first."""
        rows, labels = self._rows(features, target)
        if self.training:
            self._add(rows.detach(), labels)
        direction = self.direction.to(rows.dtype, copy=self.training)  # a backward needs those of this call
        loss = linear_adjusted_cross_entropy(rows, direction, labels, **self._options())
        views = len(labels) // max(len(target), 1)
        if self.reduction == "none":
            return loss.unflatten(0, (-1, len(target))).mean(0) if len(target) else loss
        return loss / views if self.reduction == "sum" and views else loss

    def explain(self, features: Tensor | Sequence[Tensor], target: Tensor) -> Explanation:
        """What `ltkernels.explain` says of a call."""
        rows, labels = self._rows(features, target)
        return explain(linear_adjusted_cross_entropy, rows, self.direction.to(rows.dtype), labels, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "normalize": True,
            "shift": self.log_prior,
            "term": _term(self.kappa, self.features, self.tau),
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }

    def _rows(self, features: Tensor | Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of all views and their labels."""
        views = [features] if isinstance(features, Tensor) else list(features)
        self._check(views, target)
        if len(views) == 1:
            return views[0], target.long()
        return torch.cat(views), target.long().repeat(len(views))

    @torch.no_grad()
    def next_epoch(self) -> None:
        """Ends an epoch: from here on the means are those of its samples, and of the next one's as they come. A class that had none in it
        keeps the mean it had."""
        had = self.seen > 0
        self.last_sums.copy_(torch.where(had[:, None], self.sums, self.last_sums))
        self.last_seen.copy_(torch.where(had, self.seen, self.last_seen))
        self.sums.zero_()
        self.seen.zero_()
        self._estimate(self._every())

    @torch.no_grad()
    def start_from(self, statistics: ClassStatistics) -> None:
        """Takes the means of `ltkernels.diversity.ClassStatistics` of unit features, whose classes are in this loss' order, for the last
        epoch's; those of several parties merged, say."""
        if (len(statistics.classes), statistics.width) != self.direction.shape:
            raise ValueError(
                f"statistics are of {len(statistics.classes)} classes and {statistics.width} features; the loss has "
                f"{self.direction.shape[0]} and {self.features}"
            )
        means = torch.stack([part.mean for part in statistics.classes]).to(self.last_sums)
        self.last_seen.copy_(torch.tensor(statistics.counts))
        self.last_sums.copy_(means * self.last_seen[:, None])
        self._estimate(self._every())

    def _check(self, views: list[Tensor], target: Tensor) -> None:
        if not views or not all(isinstance(view, Tensor) for view in views):
            raise DTypeError(
                f"features is {type(views[0]).__name__ if views else 'empty'}; it must be a tensor, or tensors of the views"
            )
        if (
            not isinstance(target, Tensor)
            or target.is_floating_point()
            or target.dtype in (torch.bool, torch.complex64, torch.complex128)
            or target.dim() != 1
        ):
            given = f"{tuple(target.shape)} {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
            raise DTypeError(f"target is {given}; it must hold class indices (N,)")
        for at, view in enumerate(views):
            if view.shape != (len(target), self.features):
                name = "features" if len(views) == 1 else f"features[{at}]"
                raise ArgumentError(
                    f"{name} has shape {tuple(view.shape)}; it must be ({len(target)}, {self.features})"
                )
        if target.is_cpu and not torch.compiler.is_compiling():  # before the statistics take anything in
            classes = len(self.kappa)
            labels = target.long()  # torch does not compare unsigned integers of more than 8 bits
            bad = (labels != self.ignore_index) & ((labels < 0) | (labels >= classes))
            if bad.any():
                row = int(bad.nonzero()[0])
                raise bad_label("target", int(labels[row]), row, classes, self.ignore_index)

    @torch.no_grad()
    def _add(self, rows: Tensor, labels: Tensor) -> None:
        """A batch joins the statistics. Rows that are not finite stay out: they would never leave again."""
        unit = F.normalize(rows.double(), dim=1)
        counted = (labels != self.ignore_index) & torch.isfinite(unit).all(1)
        labels = torch.where(counted, labels, 0)
        unit = torch.where(counted[:, None], unit, 0)
        if self.process_group is None:
            self.sums.index_add_(0, labels, unit)
            self.seen.index_add_(0, labels, counted.long())
            self._estimate(labels)
            return
        group = None if isinstance(self.process_group, str) else self.process_group
        sums = torch.zeros_like(self.sums).index_add_(0, labels, unit)
        seen = torch.zeros_like(self.seen).index_add_(0, labels, counted.long())
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(seen, group=group)
        self.sums.add_(sums)
        self.seen.add_(seen)
        self._estimate(self._every())

    def _every(self) -> Tensor:
        return torch.arange(len(self.kappa), device=self.kappa.device)

    def _estimate(self, classes: Tensor) -> None:
        """Directions and concentrations of these classes, some of them several times perhaps, from the sums."""
        sums = self.sums[classes] + self.last_sums[classes]
        seen = self.seen[classes] + self.last_seen[classes]
        length = torch.linalg.vector_norm(sums, dim=1)
        known = length > 0
        mean = (length / seen.clamp(min=1)).clamp(max=1.0)
        kappa = (self.features * mean / (1 - mean * mean)).clamp(max=self.max_kappa)
        direction = sums / torch.where(known, length, 1)[:, None]
        self.kappa[classes] = torch.where(known, kappa, self.kappa[classes]).to(self.kappa.dtype)
        self.direction[classes] = torch.where(known[:, None], direction, self.direction[classes]).to(
            self.direction.dtype
        )

    def extra_repr(self) -> str:
        return f"classes={len(self.kappa)}, features={self.features}, tau={self.tau}, reduction={self.reduction!r}"
