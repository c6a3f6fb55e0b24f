"""RIDE: experts that are pushed apart from their mean."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._errors import ArgumentError
from ._adjustment import Adjustment
from .expert_losses import ExpertsLoss, Logits, log_prior
from .experts import experts_cross_entropy


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
            table = (w / w.max()).float()
        self._table("class_weight", table)
        self.factor = _checks.number("factor", factor)
        self.temperature = _checks.number("temperature", temperature, above=0.0)
        self.class_temperature = class_temperature
        self._base = [name for name, value in ({} if base is None else base._asdict()).items() if value is not None]
        self._focal_gamma = 0.0 if base is None else base.focal_gamma
        for name in self._base:
            if name != "focal_gamma":
                self._table(f"base_{name}", getattr(base, name), made=False)

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
            self.fitting(logits),
            coupling="mean_kl",
            factor=self.factor,
            temperature=temperature,
            sample_weight=sample_weight,
            **self._options(),
        )
