"""The losses of several experts as Modules: SADE, BalPoE, RIDE, NCL, ResLT, MDCS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from ._adjustment import Adjustment
from ._module import KeepsTables
from .distillation import distillation
from .experts import experts_cross_entropy

Logits = Tensor | Sequence[Tensor]


class ExpertsLoss(KeepsTables):
    """What the losses of experts share: tables of each expert as buffers, which keep their dtype under ``.half()``, and options.

    Args:
        shift: (E, C), added to the experts' logits; None adds nothing.
        weight: (E, C) class weights of the experts; None is 1.
        label_smoothing, ignore_index, reduction: as in `ltkernels.functional.adjusted_cross_entropy`; each expert's loss is reduced by
            itself.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss (), or rows where the reduction is ``"none"``.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        ValueError: another number of experts than the tables are of.

    Predict with: `predict`, the mean of the experts' logits.
    """

    shift: Tensor | None
    weight: Tensor | None

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        for name, table in (("shift", shift), ("weight", weight)):
            self.register_buffer(name, None if table is None else table.to(torch.get_default_device(), torch.float32))
        _checks.reduction(reduction)
        self.label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.ignore_index, self.reduction = ignore_index, reduction

    def adjustments(self, experts: int) -> list[Adjustment]:
        """The tables of each expert."""
        for table in (self.shift, self.weight):
            if table is not None and len(table) != experts:
                raise ArgumentError(f"logits are of {experts} experts; {type(self).__name__} was made for {len(table)}")
        return [
            Adjustment(
                shift=None if self.shift is None else self.shift[e],
                weight=None if self.weight is None else self.weight[e],
            )
            for e in range(experts)
        ]

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The sum of the experts' losses."""
        return experts_cross_entropy(
            logits, target, self.adjustments(len(logits)), sample_weight=sample_weight, **self._options()
        )

    def predict(self, logits: Logits, weights: Tensor | None = None) -> Tensor:
        """(N, C) logits to take the argmax of: the mean of the experts', or their sum weighted by `weights` (E,), such as those of
        `ltkernels.inference.expert_weights`."""
        stacked = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
        stacked = stacked.to(_checks.real_dtype(stacked.dtype))
        return stacked.mean(0) if weights is None else torch.einsum("e,enc->nc", weights.to(stacked), stacked)

    def extra_repr(self) -> str:
        tables = {name: tuple(value.shape) for name, value in self.named_buffers(recurse=False)}
        return f"{tables}, reduction={self.reduction!r}"

    def _options(self) -> dict[str, Any]:
        return {
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }


def log_prior(class_counts: _checks.ClassCounts, empty: str) -> tuple[Tensor, Tensor]:
    """(C,) float64 log of the class shares, that of an empty class as of the rarest; and (C,) bool, the empty ones."""
    counts = _checks.class_counts(class_counts, empty)
    return torch.log(counts.n / counts.total), counts.empty


def _shifts(rows: Sequence[Tensor], empty: Tensor) -> Tensor:
    """(E, C); what no sample has is removed from experts that know a prior."""
    return torch.stack([row.masked_fill(empty, -torch.inf) if bool(row.any()) else row for row in rows])


def reversed_prior(class_counts: _checks.ClassCounts, empty: str = "error") -> Tensor:
    """(C,) float64: the class shares in reversed ranks, the rarest class having the largest. Classes of equal counts share what the
    published code gives them by their order."""
    counts = _checks.class_counts(class_counts, empty)
    share = counts.n / counts.total
    ranked, order = share.sort()
    found = torch.empty_like(share)
    found[order] = ranked.flip(0)
    _, group = share.unique(return_inverse=True)
    sums = torch.zeros_like(share).index_add(0, group, found)
    members = torch.zeros_like(share).index_add(0, group, torch.ones_like(share))
    return (sums / members.clamp_min(1))[group]


class SADE(ExpertsLoss):
    """Self-supervised aggregation of diverse experts, Zhang et al. 2022 (arXiv:2107.09249; also TADE): the sum of three cross-entropies,
    ``CE(z_1) + CE(z_2 + log pi) + CE(z_3 + log pi - tau log pi_rev)``, for a long-tailed, a uniform and an inversely long-tailed test
    set; pi are the class shares, pi_rev the same numbers in reversed ranks.

    The paper's experts are cosine heads of scale 30 on shared first stages.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: strength of the inversion.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 in the second and third expert.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits 3 tensors (N, C) or one (3, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, another number of experts than 3.

    Predict with: `predict`, the mean of the experts' logits, or their mean by weights found on the unlabelled test data
    (`ltkernels.inference.expert_weights`).

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.SADE([6, 3, 1])([z, z, z], torch.tensor([2])).item(), 4)
        12.5983
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: float = 2.0,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        tau = _checks.number("tau", tau)
        prior, absent = log_prior(class_counts, empty)
        rows = [torch.zeros_like(prior), prior, prior - tau * torch.log(reversed_prior(class_counts, empty))]
        super().__init__(
            _shifts(rows, absent), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
        )


class BalPoE(ExpertsLoss):
    """Balanced product of experts, Aimar et al. 2023 (arXiv:2206.05260): the mean over the experts of ``CE(z_e + tau_e log pi)``.

    The mean of the experts' logits is Fisher-consistent for balanced accuracy where the mean of tau is 1. The paper trains with mixup,
    which calibrates the experts: average the losses of both label sets.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: one number for each expert.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 where tau is not 0.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: no tau, counts below 0 or all 0, a class without samples unless ``empty="ignore"``, another number of experts.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.BalPoE([6, 3, 1])([z, z, z], torch.tensor([2])).item(), 4)
        3.6397
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: Sequence[float] = (0.0, 1.0, 2.0),
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if not len(tau):
            raise ArgumentError("tau is empty; it must have one number for each expert")
        taus = [_checks.number(f"tau[{e}]", value) for e, value in enumerate(tau)]
        prior, absent = log_prior(class_counts, empty)
        super().__init__(
            _shifts([each * prior for each in taus], absent),
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The mean of the experts' losses."""
        experts = len(logits)
        return experts_cross_entropy(
            logits,
            target,
            self.adjustments(experts),
            expert_factors=[1 / experts] * experts,
            sample_weight=sample_weight,
            **self._options(),
        )


class RIDE(ExpertsLoss):
    """Routing diverse experts, Wang et al. 2021 (arXiv:2010.01809): for every expert its cross-entropy (or LDAM) plus
    ``factor * T^2 KL(p || p_e)``, p the softmax of the mean of the experts' logits, a constant for autograd. A negative factor pushes
    the experts apart.

    Args:
        class_counts: (C,) training samples per class, integers; for `class_temperature` alone. None: not known.
        factor: of the divergence; the authors use -0.2, and -0.45 for CIFAR-100.
        temperature: T, above 0.
        class_temperature: divides each class' logits in the divergence by ``T w_c``, ``w_c = (0.05 C pi_c + 0.95) / max``, and has
            ``T^2 mean(w)^2`` in front of it. The authors do so from epoch 160 of 200 on: set the attribute then.
        base: the tables of every expert's own loss, such as ``adjustments.ldam(class_counts)``; None is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` takes it as the rarest class.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts that are bad or missing where `class_temperature` needs them, a temperature that is not above 0.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.5, -0.5]], [[0.0, 1.0, 0.5]]])
        >>> round(ltk.nn.RIDE()(logits, torch.tensor([2])).item(), 4)
        3.2521
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_counts: _checks.ClassCounts | None = None,
        factor: float = -0.2,
        temperature: float = 1.0,
        class_temperature: bool = False,
        base: Adjustment | None = None,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
        if class_temperature and class_counts is None:
            raise ArgumentError("class_counts is None; class_temperature=True needs the counts")
        table = None
        if class_counts is not None:
            log_share, _ = log_prior(class_counts, empty)
            w = 0.05 * len(log_share) * log_share.exp() + 0.95
            table = (w / w.max()).to(torch.get_default_device(), torch.float32)
        self.register_buffer("class_weight", table)
        self.factor = _checks.number("factor", factor)
        self.temperature = _checks.number("temperature", temperature, above=0.0)
        self.class_temperature = class_temperature
        self._base = [name for name, value in ({} if base is None else base._asdict()).items() if value is not None]
        self._focal_gamma = 0.0 if base is None else base.focal_gamma
        for name in self._base:
            if name != "focal_gamma":
                self.register_buffer(f"base_{name}", getattr(base, name))

    def adjustments(self, experts: int) -> list[Adjustment]:
        """The base loss' tables, the same for all."""
        tables = {name: getattr(self, f"base_{name}") for name in self._base if name != "focal_gamma"}
        return [Adjustment(**tables, focal_gamma=self._focal_gamma)] * experts

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The experts' losses and their divergence from the mean."""
        temperature: float | Tensor = self.temperature
        if self.class_temperature:
            if self.class_weight is None:
                raise ArgumentError("class_counts is None; class_temperature=True needs the counts")
            temperature = temperature * self.class_weight
        return experts_cross_entropy(
            logits,
            target,
            self.adjustments(len(logits)),
            coupling="mean_kl",
            factor=self.factor,
            temperature=temperature,
            sample_weight=sample_weight,
            **self._options(),
        )


class NCL(ExpertsLoss):
    """Nested collaborative learning, Li et al. 2022 (arXiv:2203.15359), its loss without the contrastive part: for every expert the
    balanced softmax on all classes and on the row's hardest ones, and on both ``factor / (E - 1)`` times the sum over ordered pairs of
    experts of KL(p_f || p_e), of the balanced softmaxes, both sides with their gradients.

    The hardest classes are the label and those with the largest logits of the first expert; the others are left out of the softmax. In
    the authors' code their logits are multiplied by 0 and each still weighs exp(0): ``hard_masked=False``.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        factor: of the mutual divergence, on all classes and on the hardest.
        hard: number of hardest classes, from 1 to C; the authors use 30 of 100.
        hard_masked: as above.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`.

    Shape:
        logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, `hard` out of range.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.5, -0.5]], [[0.0, 1.0, 0.5]]])
        >>> round(ltk.nn.NCL([6, 3, 1], hard=3)(logits, torch.tensor([2])).item(), 4)
        12.3954
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        factor: float = 0.6,
        hard: int = 30,
        hard_masked: bool = True,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        prior, absent = log_prior(class_counts, empty)
        super().__init__(
            _shifts([prior], absent), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
        )
        self.factor = _checks.number("factor", factor)
        self.hard = _checks.integer("hard", hard)
        if not 1 <= self.hard <= len(prior):
            raise ArgumentError(f"hard is {hard}; it must be from 1 to the number of classes, {len(prior)}")
        self.hard_masked = hard_masked

    def adjustments(self, experts: int) -> list[Adjustment]:
        """The same prior for all."""
        assert self.shift is not None
        return [Adjustment(shift=self.shift[0])] * experts

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The losses of all and of the hardest classes."""
        return experts_cross_entropy(
            logits,
            target,
            self.adjustments(len(logits)),
            coupling="mutual_kl",
            factor=self.factor,
            adjusted=True,
            hard=self.hard,
            hard_masked=self.hard_masked,
            sample_weight=sample_weight,
            **self._options(),
        )


class ResLT(ExpertsLoss):
    """Residual learning for long tails, Cui et al. 2022 (arXiv:2101.10633): three heads, of all classes, of those that are not many-shot
    and of the few-shot ones, and the loss of the sum of their logits:

        beta [sum_e sum_i w_e l_ie] / [sum_e sum_i w_e] + (1 - beta) [sum_i l_i(sum of the logits)] / N,

    w_e being 1 for the head's own classes and 0 for the others. The authors' class groups are index ranges of one data set; these come
    from the counts.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        beta: share of the heads' own losses, in [0, 1].
        many: a class with more samples is many-shot: the second head does not see it.
        few: a class with fewer samples is few-shot: the third head's own.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`; ``"mean"`` alone.

    Shape:
        logits 3 tensors (N, C) or one (3, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0, beta outside [0, 1], another number of experts than 3, another reduction than ``"mean"``.

    Predict with: `predict`, the sum of the heads' logits.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.ResLT([600, 30, 1])([z, z, z], torch.tensor([2])).item(), 4)
        2.1172
    """

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        beta: float = 0.995,
        many: int = 100,
        few: int = 20,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if reduction != "mean":
            raise ArgumentError(f"reduction is {reduction!r}; ResLT has its own denominators, and 'mean' alone")
        n = torch.tensor(_checks.count_list(class_counts), dtype=torch.float64, device="cpu")
        weight = torch.stack([torch.ones_like(n), (n <= many).double(), (n < few).double()])
        super().__init__(None, weight, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
        self.beta = _checks.number("beta", beta, low=0.0, high=1.0)

    def forward(self, logits: Logits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The heads' losses and that of their sum."""
        rows = experts_cross_entropy(
            logits,
            target,
            self.adjustments(len(logits)),
            coupling="sum",
            sample_weight=sample_weight,
            **{**self._options(), "reduction": "none"},
        )
        assert self.weight is not None
        valid = (target != self.ignore_index).to(rows.dtype)
        own = valid if sample_weight is None else torch.where(valid > 0, sample_weight.to(rows), 0)
        shares = self.weight.to(rows)[:, torch.where(valid > 0, target, 0)] * own
        return self.beta * rows[:-1].sum() / shares.sum() + (1 - self.beta) * rows[-1].sum() / own.sum()

    def predict(self, logits: Logits, weights: Tensor | None = None) -> Tensor:
        """(N, C): the sum of the heads' logits."""
        return super().predict(logits, torch.ones(len(logits)) if weights is None else weights)


class MDCS(ExpertsLoss):
    """More diverse experts with consistency self-distillation, Zhao et al. 2023 (arXiv:2308.09922): the sum of the experts'
    ``CE(z_e + tau_e log n)``, and where a second, strongly augmented view is given, for every expert
    ``factor * T^2 KL(weak view || strong view)`` on the rows that its weak view classifies correctly, the weak view being a constant
    for autograd. The mean of the divergence is over the rows that count.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        tau: the exponent of the counts, one for each expert.
        factor: of the consistency; the authors raise it over the first 20 epochs: set the attribute.
        temperature: T, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        label_smoothing, ignore_index, reduction: as in `ExpertsLoss`; ``"none"`` is not possible.

    Shape:
        logits, strong_logits E tensors (N, C) or one (E, N, C); target (N,) class indices; loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, another number of experts.

    Predict with: `predict`, the mean of the experts' logits.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.nn.MDCS([6, 3, 1])([z, z, z], torch.tensor([2])).item(), 4)
        11.1497
    """

    if TYPE_CHECKING:

        def __call__(
            self,
            logits: Logits,
            target: Tensor,
            strong_logits: Logits | None = None,
            *,
            sample_weight: Tensor | None = None,
        ) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        tau: Sequence[float] = (-0.5, 1.0, 2.5),
        factor: float = 0.6,
        temperature: float = 1.0,
        *,
        empty: str = "error",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if reduction == "none":
            raise ArgumentError("reduction is 'none'; the consistency is a mean over other rows than the losses")
        taus = [_checks.number(f"tau[{e}]", value) for e, value in enumerate(tau)]
        counts = _checks.class_counts(class_counts, empty)
        rows = [each * counts.n.log() for each in taus]
        super().__init__(
            _shifts(rows, counts.empty), label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
        )
        self.factor = _checks.number("factor", factor)
        self.temperature = _checks.number("temperature", temperature, above=0.0)

    def forward(
        self,
        logits: Logits,
        target: Tensor,
        strong_logits: Logits | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The experts' losses on `logits`, and the consistency of `strong_logits` with them."""
        loss = super().forward(logits, target, sample_weight=sample_weight)
        if strong_logits is None:
            return loss
        if len(strong_logits) != len(logits):
            raise ArgumentError(f"strong_logits are of {len(strong_logits)} experts, logits of {len(logits)}")
        for weak, strong in zip(logits, strong_logits, strict=True):
            right = ((weak.argmax(1) == target) & (target != self.ignore_index)).to(loss.dtype)
            own = right if sample_weight is None else torch.where(right > 0, sample_weight.to(loss), 0)
            apart = distillation(strong, weak, self.temperature, sample_weight=own, reduction="sum")
            denominator = 1.0 if self.reduction == "sum" else own.sum().clamp_min(torch.finfo(own.dtype).tiny)
            loss = loss + self.factor * apart / denominator
        return loss
