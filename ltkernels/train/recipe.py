"""How one model is fitted: the numbers of a training, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Share of the steps that raise the rate from 0 where `warmup` is not given.
_WARMUP = 0.05


@dataclass(frozen=True)
class Own:
    """Objects of the user's in place of what a recipe names; their state is kept in checkpoints.

    `optimizer(groups)` gets the parameter groups with their rates and decays (dictionaries, as torch.optim takes them);
    `scheduler(optimizer, steps)` is stepped after each of so many steps; `transform(images)` changes a batch of standardised
    samples (n, ...), after crop and flip. It draws from torch's global generator, which is seeded for every batch.
    """

    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None = None
    transform: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything the training loop needs besides model, loss and data.

    `batch_size` samples make a step, in `accumulate` parts if memory asks for it; the gradient is that of the whole
    batch. `sampler` names one of `samplers.SAMPLERS`; from epoch `balanced_from` on it is `balanced` (deferred
    re-sampling). `precision` is fp32, bf16 or fp16; `compile` off, default or reduce-overhead (CUDA graphs).
    `decay` says what is decayed: all parameters, as in the published recipes (None with sgd), or `weights` of linear and convolution
    layers alone (None with adamw). `lr_backbone` is the peak rate of a Classifier's backbone (None: `lr`), `layer_decay` its
    factor from one block to the one before; `clip` the largest norm of a step's gradient. `ema` is the decay of an average of
    the weights, which is what is evaluated and kept; `patience` and `keep_best` look at a validation set. `task` rotation
    replaces the labels by the quarter turns that each image was given.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    sampler: str = "instance"
    balanced_from: int | None = None
    lr_schedule: str = "cosine"
    warmup: float | None = None
    momentum: float = 0.9
    optimizer: str = "sgd"
    decay: str | None = None
    lr_backbone: float | None = None
    layer_decay: float | None = None
    ema: float | None = None
    patience: int | None = None
    keep_best: bool = False
    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    compile: str = "off"
    crop: int = 0
    flip: bool = False
    resized_crop: float | None = None
    augment: str = "none"
    mix: str = "none"
    mix_alpha: float = 1.0
    mix_prob: float | None = None
    task: str = "classify"

    @classmethod
    def of(cls, settings: Any, **changes: Any) -> Recipe:
        """The recipe in `settings`, whose attributes of these names are taken, with `changes`."""
        found = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
        return cls(**{**found, **changes})

    def sampler_at(self, epoch: int) -> str:
        deferred = self.balanced_from is not None and epoch >= self.balanced_from
        return "balanced" if deferred else self.sampler

    def lr_at(self, epoch: int, step: int, steps: int) -> float:
        """The rate of step 0..steps-1 of an epoch counted from 0."""
        return self.lr * rate_factor(self.lr_schedule, self.warmup, epoch, step, self.epochs, steps)


def rate_factor(schedule: str, warmup: float | None, epoch: int, step: int, epochs: int, steps: int) -> float:
    """The learning rate as a share of the peak.

    `cosine`: linear warm-up by steps over `warmup` epochs (None: 5 % of the steps), then half a cosine towards 0.
    `step:E=F,...`: factor F from epoch E on; warm-up by whole epochs, (epoch + 1) / warmup, as the published recipes.
    """
    milestones = parse_lr_schedule(schedule)
    if milestones is not None:
        if warmup and epoch < warmup:
            return (epoch + 1) / warmup
        return next((factor for start, factor in reversed(milestones) if epoch >= start), 1.0)
    at, total = epoch * steps + step, epochs * steps
    rising = max(1, round(_WARMUP * total if warmup is None else warmup * steps))
    if at < rising:
        return (at + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (at - rising) / max(1, total - rising)))


def parse_lr_schedule(text: str) -> list[tuple[int, float]] | None:
    """`"cosine"` -> None, `"step:160=0.01,180=0.0001"` -> [(160, 0.01), (180, 0.0001)]. ValueError naming the value."""
    if text == "cosine":
        return None
    kind, _, rest = text.partition(":")
    try:
        pairs = [(int(epoch), float(factor)) for epoch, factor in (part.split("=") for part in rest.split(","))]
    except ValueError:
        pairs = []
    starts = [epoch for epoch, _ in pairs]
    if kind != "step" or not pairs or starts != sorted(set(starts)) or starts[0] < 1:
        raise ValueError(f"lr_schedule must be cosine or step:EPOCH=FACTOR,... with rising epochs, got {text!r}")
    if not all(math.isfinite(factor) and factor > 0 for _, factor in pairs):
        raise ValueError(f"lr_schedule must have positive factors, got {text!r}")
    return pairs


def parse_adapter(text: str) -> tuple[str, int | None]:
    """`"lora:4"` -> ("lora", 4), `"adaptformer"` -> ("adaptformer", None). Raises ValueError naming the value."""
    kind, colon, size = text.partition(":")
    if kind not in ("none", "adaptformer", "lora") or (
        colon and (kind == "none" or not size.isdecimal() or int(size) < 1)
    ):
        raise ValueError(
            f"adapter must be none, adaptformer[:WIDTH] or lora[:RANK] with a whole number from 1, got {text!r}"
        )
    return kind, int(size) if colon else None
