"""What follows a training on its frozen features: a second stage for the classifier, and post-hoc logit adjustment.

A stage is a function `(job, base) -> Trained` in `_STAGES`; its name is a choice of `--stage2`.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltkernels import augment, inference
from ltkernels.nn import CosineLinear
from ltkernels.selection._arms import arm_name
from ltkernels.train.engine import apply
from ltkernels.train.features import derived_seed, head_tail_split, tail_mean
from ltkernels.train.models import HeadSpec, Shifted, feature_maps
from ltkernels.train.pipeline import Job
from ltkernels.train.schedules import loss_record
from ltkernels.train.trained import Trained

# Kang et al. 2020 search tau in [0, 1]; some data want more.
_NORM_TAUS = [i / 20 for i in range(41)]
# Margin losses have cosines for logits, plain ones logits of several units: 0 and a geometric grid serve both.
_SHIFT_TAUS = [0.0, *(0.01 * 10 ** (i / 16) for i in range(42))]
_NEEDS_LINEAR = ("lws", "tau-norm", "ofa")


def crt(job: Job, base: Trained) -> Trained:
    """Classifier re-training, Kang et al. 2020: a fresh linear head, cross-entropy, class-balanced batches."""
    record = loss_record("ce")
    head = job.head(HeadSpec("linear", "linear"), job.features(base)[0].shape[1])
    return job.retrain(base, f"{base.name}-crt", record=record, head=head, sampler="balanced")


class _Scaled(nn.Module):
    """A frozen linear head whose logits are multiplied by a learned factor per class."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", head.weight.detach().clone())
        self.register_buffer("bias", head.bias.detach().clone())
        self.scale = nn.Parameter(torch.ones_like(self.bias))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * nn.functional.linear(features, self.weight, self.bias)


def lws(job: Job, base: Trained) -> Trained:
    """Learnable weight scaling, Kang et al. 2020: class factors on the frozen classifier, on class-balanced batches."""
    scaled, head = _Scaled(base.model.head), copy.deepcopy(base.model.head)
    trained = job.retrain(base, f"{base.name}-lws", record=loss_record("ce"), head=scaled, sampler="balanced")
    with torch.no_grad():
        head.weight.copy_(scaled.scale[:, None] * scaled.weight)
        head.bias.copy_(scaled.scale * scaled.bias)
    trained.model.head = head
    return trained


def tau_norm(job: Job, base: Trained) -> Trained:
    """Tau-normalised classifier, Kang et al. 2020: rows divided by their norm to the power tau, no bias."""
    weight, held = base.model.head.weight.detach(), apply(base.model.backbone, job.x_held)
    tau, scores = job.tune(lambda t: held @ inference.tau_normalize(weight, t).T, _NORM_TAUS)
    head = copy.deepcopy(base.model.head)
    with torch.no_grad():
        head.weight.copy_(inference.tau_normalize(weight, tau))
        head.bias.zero_()
    return job.untrained(base, f"{base.name}-tau-norm", head, tau=tau, tau_on_held_out=scores)


def ncm(job: Job, base: Trained) -> Trained:
    """Nearest class mean by the cosine (Kang et al. 2020): the rows of a cosine head are the classes' mean features."""
    features = job.features(base)[0]
    means = torch.stack([features[job.y_train == label].mean(0) for label in range(job.data.num_classes)])
    head = CosineLinear(features.shape[1], job.data.num_classes)
    with torch.no_grad():
        head.weight.copy_(means)
    return job.untrained(base, f"{base.name}-ncm", head)


def ofa(job: Job, base: Trained) -> Trained:
    """Feature-space augmentation, Chu et al. 2020: tail classes completed with fused feature maps, chosen by `--select`; a
    fresh head."""
    maps = apply(feature_maps(base.model.backbone), job.x_train)
    config, head = job.config, base.model.head
    heads, _ = head_tail_split(job.class_counts, config.head_ratio)

    def make_pool(label: int, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(config.seed, label, 3))
        options = {"weight": head.weight.detach(), "bias": head.bias.detach(), "head_classes": heads}
        return augment.ofa(maps, job.y_train, label, rows, generator=generator, **options)

    return _completed(job, base, "ofa", make_pool)


def fdc(job: Job, base: Trained) -> Trained:
    """Tail classes completed with FDC features, chosen by `--select`; a fresh head."""
    return _completed(job, base, "fdc", None)


def _completed(job: Job, base: Trained, name: str, make_pool: Callable[[int, int], Tensor] | None) -> Trained:
    """A classifier on the tail as `--select` completes it from the pools."""
    _, tail = job.complete(base, make_pool)
    arm = arm_name(job.config.select)
    name = f"{base.name}-{name}-{arm.replace(':', '-')}"
    return job.augmented(base, name, tail, arm, offset_tail=tail_mean(tail, arm, "offset"))


_STAGES: dict[str, Callable[[Job, Trained], Trained]] = {
    "crt": crt,
    "lws": lws,
    "tau-norm": tau_norm,
    "ncm": ncm,
    "ofa": ofa,
    "fdc": fdc,
}


def post_hoc(job: Job, base: Trained) -> Trained:
    """Logit adjustment after training (Menon et al. 2021), with the tau that suits the held-out samples best."""
    logits = apply(base.model, job.x_held)
    tau, scores = job.tune(lambda t: inference.logit_adjust(logits, job.class_counts, t), _SHIFT_TAUS)
    zeros = torch.zeros(1, job.data.num_classes)
    shift = inference.logit_adjust(zeros, job.class_counts, tau)[0]
    head = Shifted(base.model.head, shift)
    return job.untrained(base, f"{base.name}-post-hoc", head, tau=tau, tau_on_held_out=scores)


def check(job: Job) -> None:
    """Raise ValueError where the chosen stage cannot follow the chosen training."""
    config = job.config
    kind = job.head_spec(loss_record(config.loss)).kind
    if config.stage2 in _NEEDS_LINEAR and kind != "linear":
        raise ValueError(f"stage2 {config.stage2} needs a linear head; with loss {config.loss} the head is {kind}")
    if config.stage2 == "ofa":
        feature_maps(job.build(loss_record(config.loss)).backbone)


def follow(job: Job, base: Trained) -> list[Trained]:
    """What the settings ask for after `base`: its second stage, then post-hoc adjustment of the last of them."""
    results: list[Trained] = []
    if job.config.stage2 != "none":
        results.append(_STAGES[job.config.stage2](job, base))
    if job.config.post_hoc == "tau":
        results.append(post_hoc(job, results[-1] if results else base))
    return results
