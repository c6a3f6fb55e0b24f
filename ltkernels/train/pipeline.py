"""The stages of a job, from a data set to the entries of its summary; `jobs.py` orders them and writes files."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltkernels.losses import Loss
from ltkernels.nn import CosineLinear
from ltkernels.train.backbones import BackboneSpec, build_backbone
from ltkernels.train.batching import Batches, Pixels
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset
from ltkernels.train.data._lazy import LazySamples, Samples, rows_of
from ltkernels.train.data._split import listed
from ltkernels.train.engine import Fit, Labelled, Training, apply, predict
from ltkernels.train.features import TailClass, complete_tail, derived_seed, tail_mean
from ltkernels.train.logs import Journal
from ltkernels.train.metrics import (
    class_means,
    class_recalls,
    confusion_matrix,
    describe_classifier,
    describe_features,
    summarize,
)
from ltkernels.train.models import Classifier, HeadSpec, Shifted
from ltkernels.train.recipe import Own, Recipe, parse_lr_schedule
from ltkernels.train.schedules import build_loss, loss_record, parse_options, start_epoch
from ltkernels.train.trained import Trained, load_saved, logit_scale, options_of, prior_power
from ltkernels.train.weights import read_matrix

Sets = tuple[Labelled, Labelled, Labelled | None]
"""Training, test and validation set, where there is one."""

# Plain cross-entropy on batches as they come, as settings.
_PLAIN = {"loss": "ce", "schedule": "none", "sampler": "instance", "mix": "none", "pretrain": "none"}


class Job:
    """Settings, data on the device, and the journal of epochs; each method is one stage."""

    def __init__(
        self, config: Config, data: Dataset, journal: Journal | None = None, *, prefix: str = "", own: Own | None = None
    ) -> None:
        self.config, self.data, self.own = config, data, own or Own()
        # Two jobs of one run share its journal; the prefix keeps their phases apart.
        self.journal, self.prefix = journal or Journal(), prefix
        self.notes: list[str] = []
        late = [
            epoch for epoch, _ in parse_lr_schedule(config.lr_schedule) or () if epoch >= (config.epochs or math.inf)
        ]
        if late:
            self.notes.append(
                f"lr_schedule: {'epochs' if len(late) > 1 else 'epoch'} {', '.join(map(str, late))} of {config.lr_schedule} will not come: "
                f"the run has {config.epochs}"
            )
        # Channels last: a third less time for the convolutions, on the CPU too.
        self._layout = torch.channels_last if config.channels_last else torch.preserve_format
        kept, held = self._split()
        self.x_train, self.y_train = self._samples(rows_of(data.x_train, kept)), data.y_train[kept].to(config.device)
        x_held, y_held = (
            (rows_of(data.x_train, held), data.y_train[held]) if data.x_val is None else (data.x_val, data.y_val)
        )
        self.x_held, self.y_held = self._samples(x_held), y_held.to(config.device)
        self.x_test, self.y_test = self._samples(data.x_test), data.y_test.to(config.device)
        # What the losses are made of: the counts of what is trained on.
        self.class_counts = torch.bincount(self.y_train, minlength=data.num_classes).tolist()
        # First-stage models, which stay when a later phase fails, and those of the best epochs.
        self.trained: list[Trained] = []
        self.best: list[Trained] = []
        self._features: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def _samples(self, x: Samples) -> Samples:
        layout = self._layout if x.dim() == 4 else torch.preserve_format
        return x.to(self.config.device, memory_format=layout)

    def _split(self) -> tuple[Tensor | slice, Tensor | slice]:
        """Indices of the samples to train on, and of those held out for validation or where tau is tuned: a share of every
        class. None are where the data brings a validation set.

        A class with two samples or more gives at least one and keeps at least one; a single sample stays in training.
        """
        y, share = self.data.y_train, self.config.val_split or self.config.holdout
        tunes = self.config.post_hoc != "none" or self.config.stage2 == "tau-norm"
        if self.data.x_val is not None or not (tunes or self.config.val_split):
            return slice(None), slice(0)
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, 5))
        held = []
        for label in range(self.data.num_classes):
            rows = (y == label).nonzero().flatten()
            size = min(max(1, round(share * len(rows))), len(rows) - 1)
            held.append(rows[torch.randperm(len(rows), generator=generator)[:size]])
        mask = torch.zeros(len(y), dtype=torch.bool)
        mask[torch.cat(held)] = True
        what = "validated on" if self.config.val_split else "tau is tuned on"
        self.notes.append(
            f"{what} {int(mask.sum())} of {len(y)} training samples, {share:g} of every class, at least one of each"
        )
        none = [name for name, rows in zip(self.data.class_names, held) if not len(rows)]
        if none:
            self.notes.append(f"not among them, with one sample: {listed(none)}")
        return (~mask).nonzero().flatten(), mask.nonzero().flatten()

    def check(self) -> None:
        """Raise what building the chosen model and training raises, before any time is spent on training."""
        config, record = self.config, loss_record(self.config.loss)
        changed = (config.crop, config.flip, config.resized_crop, config.augment != "none", self.own.transform)
        if config.freeze and (any(changed) or config.mix != "none" or config.pretrain != "none"):
            raise ValueError(
                "freeze computes each sample's features once: crop, flip, mix and pretrain do not go with it, nor do resized_crop, "
                "augment and transform"
            )
        if config.freeze and config.adapter != "none":
            raise ValueError("an adapter leaves the backbone as it is and trains inside it: freeze does not go with it")
        given = [name for name in ("patience", "keep_best") if getattr(config, name)]
        if given and not self.validates:
            raise ValueError(f"{given[0]} needs a validation set: --val-split 0.1")
        others = (config.weights, config.pretrain != "none", config.head_init != "random")
        if config.init and any(others):
            raise ValueError("init brings all weights: weights, pretrain and head_init do not go with it")
        if config.freeze and config.lr_backbone is not None:
            raise ValueError("freeze and lr_backbone exclude each other")
        if config.head_init == "means" and self.head_spec(record).kind != "cosine":
            raise ValueError("head_init means needs head cosine: its rows are directions")
        model = self.build(record)
        if config.init:
            self._go_on_from(model, Path(config.init).expanduser())
        if config.head_init != "means":
            self._start_head(model)
        self._criterion(record, self.class_counts, config.schedule)
        Batches(self.x_train, self.y_train, self.data.num_classes, self._recipe(config), 0, self.pixels)
        if config.pretrain == "rotation":
            if isinstance(self.x_test, LazySamples):
                raise ValueError("pretrain rotation needs all images in memory: choose a smaller image_size")
            Batches(self.x_train, self.y_train, self.data.num_classes, self._rotation_recipe(), 0)

    def _criterion(self, record: Loss, class_counts: list[int], schedule: str = "none") -> Any:
        config = self.config
        start = start_epoch(schedule, config.schedule_start, config.epochs)
        options = parse_options(options_of(config, record))
        return build_loss(record, class_counts, options, schedule, start, config.schedule_nu, config.device)

    def head_spec(self, record: Loss) -> HeadSpec:
        return HeadSpec(self.config.head or record.logits, record.logits, scale=self.config.head_scale)

    def build(self, record: Loss) -> Classifier:
        """A fresh model; the backbone's initial weights depend on the seed alone, not on the loss."""
        config, data, spec = self.config, self.data, self.head_spec(record)
        named = BackboneSpec(config.model, config.adapter, config.test_views, config.normalize, spec.kind == "cosine")
        pixels = self.pixels and (self.pixels.mean, self.pixels.std, self.pixels.top)
        # A finished run, which init names, brings all weights.
        weights = "random" if config.init else config.weights
        seed = derived_seed(config.seed, 1)
        backbone, width = build_backbone(named, data.input_shape, seed, weights, data.num_classes, pixels)
        notes = []
        if side := getattr(backbone, "side", None):
            notes.append(
                f"pictures of {data.input_shape[2]} x {data.input_shape[1]} are brought to {side} x {side} for {config.model}"
            )
        if ":" in (config.model or "") and width == data.num_classes:
            notes.append(
                f"{config.model} gives as many features as there are classes, {width}: if they are logits, leave its last layer out"
            )
        self.notes += [note for note in notes if note not in self.notes]
        return self._placed(Classifier(backbone, self.head(spec, width)))

    def _placed(self, model: Classifier) -> Classifier:
        return model.to(self.config.device, memory_format=self._layout)

    def head(self, spec: HeadSpec, width: int) -> nn.Module:
        """A fresh classifier of features of this width."""
        seed = derived_seed(self.config.seed, 2)
        return spec.build(width, self.data.num_classes, seed).to(self.config.device)

    def is_plain(self) -> bool:
        """Whether the chosen training is plain cross-entropy itself."""
        return all(getattr(self.config, name) == value for name, value in _PLAIN.items())

    def train_plain(self) -> Trained:
        """Cross-entropy on batches as they come: what the chosen recipe is compared with."""
        return self._train(self.config.replace(**_PLAIN))

    def train_chosen(self) -> Trained:
        """The chosen loss, schedule, sampler and mixing, from the initial backbone (and batches) of `train_plain`."""
        return self._train(self.config)

    def _recipe(self, config: Config) -> Recipe:
        late = start_epoch("drs", config.schedule_start, config.epochs) if config.schedule == "drs" else None
        return Recipe.of(config, seed=derived_seed(config.seed, 3), balanced_from=late)

    def _train(self, config: Config) -> Trained:
        choices = (config.schedule, config.sampler, config.mix, config.pretrain)
        name = "-".join([config.loss, *(choice for choice in choices if choice not in ("none", "instance"))])
        record = loss_record(config.loss)
        model = self.build(record)
        if config.init:
            self._go_on_from(model, Path(config.init).expanduser())
        if config.pretrain == "rotation":
            model.backbone.load_state_dict(self._pretrain())
        criterion, schedules = self._criterion(record, self.class_counts, config.schedule)
        self._start_head(model)
        trained, backbone = (model, None) if not config.freeze else (model.head, model.backbone)
        if backbone is not None:
            backbone.requires_grad_(False).eval()
        more = {"schedules": schedules, "own": self.own}
        fit = self._fit(f"train/{name}", trained, criterion, self._sets(backbone), self._recipe(config), **more)
        plain = config.schedule == "none" and config.sampler == "instance" and config.mix not in ("remix", "cmo")
        power = prior_power(record, options_of(config, record)) if plain else None
        self.trained.append(Trained(name, record, model, fit, prior_power=power))
        if fit.best:
            self.best.append(self._best(self.trained[-1], *fit.best))
        return self.trained[-1]

    def _best(self, last: Trained, epoch: int, state: dict[str, Tensor]) -> Trained:
        """The model as it was after its best epoch on the validation set, beside that of the last epoch."""
        frozen = self.config.freeze
        backbone = last.model.backbone if frozen else copy.deepcopy(last.model.backbone)
        model = Classifier(backbone, copy.deepcopy(last.model.head))
        (model.head if frozen else model).load_state_dict(state)
        fit = Fit(last.fit.history[:epoch], self.confusion(model), last.fit.seconds)
        return Trained(f"{last.name}-best", last.record, model, fit, {"epoch": epoch}, last.prior_power)

    def confusion(self, model: Classifier) -> Tensor:
        """(C, C) of the test set, see `metrics.confusion_matrix`."""
        return confusion_matrix(self.y_test, predict(model, self.x_test), self.data.num_classes).cpu()

    def _go_on_from(self, model: Classifier, run: Path) -> None:
        """Backbone and classifier of a finished run: more epochs, or another loss, on top of them. The rate begins anew."""
        saved = load_saved(run, device=self.config.device)
        given, data = saved.classifier, self.data
        if saved.class_names != data.class_names or saved.preprocessing.input_shape != data.input_shape:
            raise ValueError(
                f"init {run}: its model is of other classes, or of samples of another shape, than data {data.name}"
            )
        head = given.head.head if isinstance(given.head, Shifted) else given.head
        if type(head) is not type(model.head):
            raise ValueError(
                f"init {run}: its classifier is a {type(head).__name__}, loss {self.config.loss} asks for a {type(model.head).__name__}"
            )
        # How this data's pictures become what the backbone expects is this data's matter.
        here = {key: value for key, value in model.backbone.state_dict().items() if key in ("factor", "offset")}
        try:
            model.backbone.load_state_dict(given.backbone.state_dict() | here)
            model.head.load_state_dict(head.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"init {run}: its model is not {self.config.model}: {str(error).splitlines()[-1][:200]}"
            ) from error

    def _start_head(self, model: Classifier) -> None:
        """First rows of the head, where they are given: mean features of the classes, or a matrix from a file (Shi et al. 2024)."""
        how, head, classes = self.config.head_init, model.head, self.data.num_classes
        if how == "random" or (how == "means" and not isinstance(head, CosineLinear)):
            return
        if how == "means":
            rows = class_means(apply(model.backbone, self.x_train), self.y_train, classes)
        else:
            rows = read_matrix(Path(how).expanduser(), self.data.class_names)
        if rows.shape != head.weight.shape:
            raise ValueError(
                f"head_init {how} holds {tuple(rows.shape)}; classes and features are {tuple(head.weight.shape)}"
            )
        with torch.no_grad():
            head.weight.copy_(rows)
            if not isinstance(head, CosineLinear):
                head.bias.zero_()

    def _sets(self, backbone: nn.Module | None = None) -> Sets:
        """The samples, or the backbone's features of them."""
        x_train, x_test = (self.x_train, self.x_test) if backbone is None else self._features_of(backbone)
        validation = None
        if self.validates:
            validation = (self.x_held if backbone is None else apply(backbone, self.x_held)), self.y_held
        return (x_train, self.y_train), (x_test, self.y_test), validation

    def _fit(self, phase: str, model: nn.Module, criterion: nn.Module, sets: Sets, recipe: Recipe, **more: Any) -> Fit:
        """`more` are further fields of `Training`."""
        train_set, test_set, val_set = sets
        pixels = self.pixels if train_set[0].dim() == 4 else None
        more = {"num_classes": self.data.num_classes, "val_set": val_set, "pixels": pixels, **more}
        about = {"recipe": recipe, "phase": self.prefix + phase, "journal": self.journal}
        return Training(model, criterion, train_set, test_set, **about, **more).fit()

    @property
    def validates(self) -> bool:
        """Whether the numbers of each epoch are those of a validation set, and the test set is read once."""
        return self.data.x_val is not None or self.config.val_split is not None

    @cached_property
    def pixels(self) -> Pixels | None:
        """How pictures came from pixels; None where the data are not images or bring no mean."""
        mean, std = self.data.mean, self.data.std
        if mean is None or std is None or self.x_train.dim() != 4:
            return None
        # Bytes, or fractions: no picture of bytes is so dark that none of its first neighbours is above 1.
        some = self.data.x_train[:256].double()
        largest = float((some * std.double().view(-1, 1, 1) + mean.double().view(-1, 1, 1)).max())
        return Pixels(mean, std, 255.0 if largest > 1.5 else 1.0)

    def _rotation_recipe(self) -> Recipe:
        seed, epochs = derived_seed(self.config.seed, 6), self.config.pretrain_epochs
        changes = {"task": "rotation", "epochs": epochs, "seed": seed, "patience": None, "keep_best": False}
        return dataclasses.replace(self._recipe(self.config.replace(**_PLAIN)), **changes)

    def _pretrain(self) -> dict[str, Tensor]:
        """The backbone's state after learning by how many quarter turns an image was rotated (Gidaris et al. 2018)."""
        backbone = self.build(loss_record("ce")).backbone
        width = apply(backbone, self.x_train[:2]).shape[1]
        head = HeadSpec("linear", "linear").build(width, 4, derived_seed(self.config.seed, 7))
        model = self._placed(Classifier(backbone, head))
        criterion = loss_record("ce").make([1] * 4).to(self.config.device)
        turned = torch.cat([self.x_test.rot90(k, (2, 3)) for k in range(4)])
        turns = torch.arange(4, device=turned.device).repeat_interleave(len(self.x_test))
        sets = (self.x_train, self.y_train), (turned, turns), None
        self._fit("pretrain/rotation", model, criterion, sets, self._rotation_recipe(), num_classes=4)
        return backbone.state_dict()

    def retrain(
        self,
        base: Trained,
        name: str,
        added: tuple[Tensor, Tensor] | None = None,
        *,
        record: Loss | None = None,
        head: nn.Module | None = None,
        sampler: str = "instance",
        note: dict[str, Any] | None = None,
    ) -> Trained:
        """A head for `base`'s features on the real samples and, with `added`, further features and their labels.

        `record` is the loss (None: `base`'s), its counts those of everything trained on; `head` is what starts (None: a fresh one
        as the loss asks for).
        """
        config, record = self.config, record or base.record
        sets: Any = self._sets(base.model.backbone)
        (features, labels), *rest = sets
        if added is not None:
            features, labels = torch.cat([features, added[0]]), torch.cat([labels, added[1]])
        head = self.head(self.head_spec(record), features.shape[1]) if head is None else head
        counts = torch.bincount(labels, minlength=self.data.num_classes).tolist()
        criterion, _ = self._criterion(record, counts)
        recipe = Recipe(
            epochs=config.retrain_epochs,
            batch_size=config.batch_size,
            lr=config.retrain_lr,
            weight_decay=config.weight_decay,
            decay=config.decay,
            seed=derived_seed(config.seed, 4),
            sampler=sampler,
        )
        fit = self._fit(f"retrain/{name}", head, criterion, ((features, labels), *rest), recipe)
        return Trained(name, record, Classifier(base.model.backbone, head), fit, note or {})

    def augmented(self, base: Trained, name: str, tail: list[TailClass], arm: str | None, **note: Any) -> Trained:
        """`retrain` on the real samples and, with `arm`, what it adds to the tail classes."""
        # Head classes of unequal size stay unequal: plain cross-entropy would learn a prior that completion turned around.
        record = loss_record("logit_adjusted") if base.record.name == "ce" else None
        if arm is None:
            return self.retrain(base, name, record=record, note=note)
        real = self.features(base)[0]
        parts = [t.completed(real[self.y_train == t.label], arm) for t in tail]
        features = torch.cat([real[:0], *parts])
        y = self.y_train
        labels = torch.cat([y[:0], *(y.new_full((len(part),), t.label) for part, t in zip(parts, tail))])
        note["fdg_tail"] = tail_mean(tail, arm, "fdg")
        return self.retrain(base, name, (features, labels), record=record, note=note)

    def untrained(self, base: Trained, name: str, head: nn.Module, **note: Any) -> Trained:
        """`base`'s backbone under a head that was computed and not trained, with its result on the test set."""
        start = time.perf_counter()
        model = Classifier(base.model.backbone, head.to(self.config.device))
        fit = Fit([], self.confusion(model), time.perf_counter() - start)
        shifted = isinstance(head, Shifted) and base.prior_power is not None
        return Trained(name, base.record, model, fit, note, base.prior_power - note["tau"] if shifted else None)

    def tune(self, logits_at: Callable[[float], Tensor], taus: list[float]) -> tuple[float, list[list[float]]]:
        """The tau with the best balanced accuracy on the held-out samples (the smallest of equals), and all of them."""
        scores = []
        for tau in taus:
            confusion = confusion_matrix(self.y_held, logits_at(tau).argmax(1), self.data.num_classes)
            scores.append([tau, float(class_recalls(confusion).mean())])
        return max(scores, key=lambda pair: (pair[1], -pair[0]))[0], scores

    def variant(self, trained: Trained) -> dict[str, Any]:
        """The summary's entry of one trained model."""
        entry: dict[str, Any] = {"name": trained.name, "title": trained.title}
        entry |= summarize(trained.fit.confusion, self.data.class_counts)
        entry |= describe_classifier(trained.model.head, self.test_scores(trained), self.y_test)
        best = [record["test_balanced_accuracy"] for record in trained.fit.history if not self.validates]
        entry["best_balanced_accuracy"] = None if self.validates else max([*best, entry["balanced_accuracy"]])
        entry["fdg_tail"] = None
        entry["confusion"] = trained.fit.confusion.tolist()
        entry["seconds"] = trained.fit.seconds
        entry["evaluation_seconds"] = trained.fit.evaluation_seconds
        return entry | trained.note

    def features(self, base: Trained) -> tuple[Tensor, Tensor]:
        """Features (n, d) of the training and of the test set, computed once for each backbone: retrainings share one."""
        return self._features_of(base.model.backbone)

    def _features_of(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        if backbone not in self._features:
            self._features[backbone] = apply(backbone, self.x_train), apply(backbone, self.x_test)
        return self._features[backbone]

    def test_scores(self, trained: Trained) -> Tensor:
        """(m, C) float64 log-probabilities of the test set (see `trained.logit_scale`)."""
        scale = logit_scale(trained.record, HeadSpec.of(trained.model.head), options_of(self.config, trained.record))
        return torch.log_softmax(scale * apply(trained.model.head, self.features(trained)[1]).double(), 1)

    def feature_space(self, base: Trained) -> dict[str, Any]:
        """The summary's `features`: diversity and similarity of the classes in `base`'s features, and a plane of them."""
        train, test = self.features(base)
        return describe_features((train, self.y_train), (test, self.y_test), self.data.num_classes)

    def complete(
        self,
        base: Trained,
        make_pool: Callable[[int, int], Tensor] | None = None,
        compared: Sequence[str] = (),
    ) -> tuple[list[int], list[TailClass]]:
        """Head classes, and the tail classes with their pools (None: FDC) and selections, by `base`'s features; `compared` as
        in `complete_tail`."""
        singles = [self.data.class_names[c] for c, count in enumerate(self.class_counts) if count == 1]
        if singles:
            self.notes.append(f"not completed, with one sample: {listed(singles)}: its diversity gain is undefined")
        held = apply(base.model.backbone, self.x_held)
        held_out = {label: held[self.y_held == label] for label in self.y_held.unique().tolist()}
        head, tail = complete_tail(
            self.features(base)[0],
            self.y_train,
            self.config,
            lambda done, total: self.journal.done("augment and select", done, total),
            make_pool=make_pool,
            held_out=held_out,
            compared=compared,
        )
        if not tail:
            self.notes.append(
                f"no class was completed: none beyond the head (head_ratio {self.config.head_ratio:g}) has two samples and fewer than "
                "the largest"
            )
        for entry in tail:
            if not entry.sets.reached or entry.sets.note:
                said = entry.sets.note or f"{self.config.select} was not reached; this is the nearest set found"
                self.notes.append(f"completion of class {self.data.class_names[entry.label]}: {said}")
        return head, tail
