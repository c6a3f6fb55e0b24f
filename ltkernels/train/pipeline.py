"""The stages of a job, from a data set to the entries of its summary; `jobs.py` orders them and writes files."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ltkernels
from ltkernels.losses import LOSSES, Loss
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset
from ltkernels.train.engine import Fit, Progress, Recipe, apply, fit
from ltkernels.train.features import TailClass, complete_tail, derived_seed
from ltkernels.train.metrics import summarize
from ltkernels.train.models import Classifier, build_backbone, build_head

# Deferred re-weighting (Cao et al. 2019) starts after 160 of 200 epochs.
_DRW_FROM = 0.8


def loss_record(name: str) -> Loss:
    """The record of a loss by its command-line name. Raises ValueError listing the known names."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    return LOSSES[name]


@dataclass
class Trained:
    """One trained model with what its training recorded."""

    name: str
    record: Loss
    model: Classifier
    fit: Fit
    seconds: float

    @property
    def title(self) -> str:
        """For the report: the loss's title, and what the name adds to the loss's name."""
        return " ".join([self.record.title, self.name.removeprefix(self.record.name).replace("-", " + ")]).strip()


class Job:
    """Settings, data on the device, and the log of epochs; each method is one stage."""

    def __init__(self, config: Config, data: Dataset, progress: Progress | None) -> None:
        self.config, self.data, self.progress = config, data, progress
        # Channels last: a third less time for the convolutions, on the CPU too.
        layout = torch.channels_last if data.x_train.dim() == 4 else torch.preserve_format
        self.x_train = data.x_train.to(config.device, memory_format=layout)
        self.x_test = data.x_test.to(config.device, memory_format=layout)
        self.y_train, self.y_test = data.y_train.to(config.device), data.y_test.to(config.device)
        self.log: list[dict[str, Any]] = []
        self._features: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self) -> None:
        """Raise what building the chosen loss and model raises, before any time is spent on training."""
        record = loss_record(self.config.loss)
        self.build(record)
        self.losses(record, self.data.class_counts, self.config.schedule, self.config.epochs)

    def losses(self, record: Loss, class_counts: list[int], schedule: str, epochs: int) -> list[tuple[int, nn.Module]]:
        """(first epoch, loss) pairs; the loss's tables come from `class_counts`."""
        pairs = [(0, record.make(class_counts).to(self.config.device))]
        if schedule == "drw":
            weight = ltkernels.adjustments.class_balanced(class_counts).weight
            pairs.append((int(_DRW_FROM * epochs), record.make(class_counts, weight=weight).to(self.config.device)))
        return pairs

    def build(self, record: Loss) -> Classifier:
        """A fresh model; the backbone's initial weights depend on the seed alone, not on the loss."""
        config, data = self.config, self.data
        backbone, width = build_backbone(config.model, data.input_shape, derived_seed(config.seed, 1))
        kind = config.head or record.logits
        head = build_head(kind, width, data.num_classes, record.logits, derived_seed(config.seed, 2))
        return Classifier(backbone, head).to(config.device, memory_format=torch.channels_last)

    def is_plain(self) -> bool:
        """Whether the chosen training is plain cross-entropy itself."""
        return (self.config.loss, self.config.schedule, self.config.sampler) == ("ce", "none", "instance")

    def train_plain(self) -> Trained:
        """Cross-entropy on batches as they come: what the chosen recipe is compared with."""
        return self._train("ce", loss_record("ce"), "none", "instance")

    def train_chosen(self) -> Trained:
        """The chosen loss, schedule and sampler, from the initial backbone (and batches) of `train_plain`."""
        config = self.config
        extras = [e for e in (config.schedule, config.sampler) if e not in ("none", "instance")]
        return self._train("-".join([config.loss, *extras]), loss_record(config.loss), config.schedule, config.sampler)

    def _train(self, name: str, record: Loss, schedule: str, sampler: str) -> Trained:
        config = self.config
        model = self.build(record)
        recipe = Recipe(
            losses=self.losses(record, self.data.class_counts, schedule, config.epochs),
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            weight_decay=config.weight_decay,
            sampler=sampler,
            seed=derived_seed(config.seed, 3),
        )
        start = time.perf_counter()
        train_set, test_set = (self.x_train, self.y_train), (self.x_test, self.y_test)
        result = fit(model, train_set, test_set, self.data.num_classes, recipe, f"train/{name}", self._record)
        return Trained(name, record, model, result, time.perf_counter() - start)

    def retrain(self, base: Trained, name: str, tail: list[TailClass], arm: str | None) -> Trained:
        """A fresh head for `base`'s features on the real samples and, with `arm`, what it adds to the tail classes."""
        config = self.config
        (features, test_features), labels = self.features(base), self.y_train
        if arm is not None:
            features = torch.cat([features, *(t.added(arm) for t in tail)])
            labels = torch.cat([labels, *(labels.new_full((t.need,), t.label) for t in tail)])
        counts = torch.bincount(labels, minlength=self.data.num_classes).tolist()
        head = self.build(base.record).head
        recipe = Recipe(
            losses=self.losses(base.record, counts, "none", config.retrain_epochs),
            epochs=config.retrain_epochs,
            batch_size=config.batch_size,
            lr=config.retrain_lr,
            weight_decay=config.weight_decay,
            sampler="instance",
            seed=derived_seed(config.seed, 4),
        )
        start = time.perf_counter()
        test_set = (test_features, self.y_test)
        result = fit(head, (features, labels), test_set, self.data.num_classes, recipe, f"retrain/{name}", self._record)
        return Trained(name, base.record, Classifier(base.model.backbone, head), result, time.perf_counter() - start)

    def variant(self, trained: Trained, title: str, tail: list[TailClass], arm: str | None) -> dict[str, Any]:
        """The summary's entry of one trained model."""
        entry: dict[str, Any] = {"name": trained.name, "title": title}
        entry |= summarize(trained.fit.confusion, self.data.class_counts)
        entry["best_balanced_accuracy"] = trained.fit.best_balanced_accuracy
        entry["fdg_tail"] = sum(t.arms[arm].fdg for t in tail) / len(tail) if arm is not None and tail else None
        entry["confusion"] = trained.fit.confusion.tolist()
        entry["seconds"] = trained.seconds
        return entry

    def features(self, base: Trained) -> tuple[Tensor, Tensor]:
        """Features (n, d) of the training and of the test set, computed once: every retraining needs them."""
        if base.name not in self._features:
            backbone = base.model.backbone
            self._features[base.name] = apply(backbone, self.x_train), apply(backbone, self.x_test)
        return self._features[base.name]

    def complete(self, base: Trained) -> tuple[list[int], list[TailClass]]:
        """Head classes, and the tail classes with their augmented pools and selections, by `base`'s features."""

        def on_class(done: int, total: int) -> None:
            if self.progress:
                self.progress("augment and select", done, total, {})

        return complete_tail(self.features(base)[0], self.y_train, self.config, on_class)

    def _record(self, phase: str, done: int, total: int, record: dict[str, Any]) -> None:
        self.log.append(record)
        if self.progress:
            self.progress(phase, done, total, record)
