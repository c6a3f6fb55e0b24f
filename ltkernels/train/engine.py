"""The training loop: SGD over batches that live on the device, an evaluation per epoch, no host sync per step.

The loop's whole state can be written between any two steps and read back: a training that was stopped, or killed, goes
on to the same numbers, to the bit.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ltkernels.nn import CosineLinear
from ltkernels.schedules import Schedule
from ltkernels.train import distributed
from ltkernels.train.batching import Batches, Pixels, Target, denominator, rows_of
from ltkernels.train.checkpoint import capture_random, restore_random, seed_random
from ltkernels.train.data._lazy import Samples
from ltkernels.train.logs import Journal
from ltkernels.train.metrics import class_recalls, confusion_matrix
from ltkernels.train.models import block_depths
from ltkernels.train.recipe import Own, Recipe
from ltkernels.train.samplers import batches
from ltkernels.train.signals import Stopped

# Activations of this many small images stay in the cache; 2048 of 28x28 were 200 MB a layer, and several times slower.
_EVAL_BATCH = 256
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_UNDECAYED = (CosineLinear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)

# Of a training's state: what has a state dict of its own, and plain values.
_PARTS = ("model", "optimizer", "scheduler", "average", "scaler", "criterion")
_VALUES = ("best", "epoch", "step", "history", "confusion", "seconds", "evaluation_seconds")

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""`progress(phase, done, total, record)`; `record` is the epoch's line of metrics.jsonl, or {}. Where it has a `step`, that is called
after each step: `step(phase, epoch, epochs, step, steps)`, how many epochs, and steps of the one that runs, are done."""

Labelled = tuple[Samples, Tensor]
"""Samples (n, ...) and their labels (n,)."""


@dataclass(frozen=True)
class Fit:
    """What a training left behind, besides the model: a record per epoch, the last confusion matrix, the time it took
    and how much of it evaluation did; `best` is the epoch (from 1) of the best validation accuracy, and its state dict."""

    history: list[dict[str, Any]]
    confusion: Tensor
    seconds: float
    evaluation_seconds: float = 0.0
    best: tuple[int, dict[str, Tensor]] | None = None


def predict(model: nn.Module, x: Samples) -> Tensor:
    """(n,) int64 predicted classes, in evaluation mode (the mode is restored)."""
    return apply(model, x).argmax(1)


@torch.no_grad()
def apply(model: nn.Module, x: Samples) -> Tensor:
    """`model(x)` in evaluation mode, in batches, without gradients (the mode is restored)."""
    training = model.training
    model.eval()
    outputs = torch.cat([model(chunk) for chunk in x.split(_EVAL_BATCH)])
    model.train(training)
    return outputs


@dataclass(eq=False)
class Training:
    """A training of `model` in place on (x, y), evaluated after every epoch: on the test set, or on `val_set` where there is one;
    the test set is then read once, after the last.

    `criterion` is a Module of `ltkernels.nn`; `schedules` change its tables. `pixels` are what augmentation knows of the images,
    `own` replaces parts of the recipe. With `recipe.ema`, what is evaluated and left in `model` are averaged weights; with
    `recipe.patience` and a `val_set`, training may end early.
    """

    model: nn.Module
    criterion: nn.Module
    train_set: Labelled
    test_set: Labelled
    num_classes: int
    recipe: Recipe
    phase: str
    schedules: Sequence[Schedule] = ()
    val_set: Labelled | None = None
    pixels: Pixels | None = None
    own: Own = field(default_factory=Own)
    journal: Journal = field(default_factory=Journal)

    def fit(self) -> Fit:
        """Train, once. The same seed gives the same numbers on the same machine, torch version and number of threads; the global
        random states of torch, numpy and python (a model or a data set may draw from them) are seeded here and put back. Training
        goes on from the newest checkpoint in the journal's store. Raises ValueError where the loss stops being finite, and `Stopped`
        after a signal, once a checkpoint is written."""
        self.device = self.train_set[0].device
        outside = capture_random(self.device)
        try:
            self._begin()
            return self._run()
        finally:
            restore_random(outside, self.device)

    def _begin(self) -> None:
        recipe, own = self.recipe, self.own
        self.world = distributed.World()
        # Two seeds from one: the order of the batches does not depend on what is done to the samples.
        self.order = torch.Generator().manual_seed(recipe.seed)
        seed = recipe.seed ^ 0x5DEECE66D
        self.batches = Batches(*self.train_set, self.num_classes, recipe, seed, self.pixels, own.transform)
        self.optimizer = optimizer_of(self.model, recipe, own)
        # The rate of each group over that of the recipe, which rises and falls.
        self.shares = [group["lr"] / recipe.lr for group in self.optimizer.param_groups]
        self.least = 2 * self.world.size * recipe.accumulate
        self.steps = len(batches(torch.arange(len(self.train_set[0])), recipe.batch_size, self.least))
        self.scheduler = own.scheduler(self.optimizer, recipe.epochs * self.steps) if own.scheduler else None
        self.average = None
        if recipe.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=self._blend, use_buffers=True)
        self.best: dict[str, Any] | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.epoch = self.step = 0
        self.epoch_order = self.order.get_state()
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.history: list[dict[str, Any]] = []
        self.confusion = torch.empty(0)
        self.seconds = self.evaluation_seconds = 0.0
        seed_random(recipe.seed)

    def _state(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings: all that changes from step to step. `epoch` and `step` are the next to be done."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return {
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
            **{name: getattr(self, name) for name in _VALUES},
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": self.world.gather(capture_random(self.device)),
            "order": self.epoch_order,
            "batches": self.batches.state(),
            "total": self.world.sum(self.total.clone()),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        # Schedules first: they make the buffers that the criterion's state fills.
        for schedule, saved in zip(self.schedules, state["schedules"]):
            schedule.load_state_dict(saved)
        for name in _PARTS:
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])
        for name in _VALUES:
            setattr(self, name, state[name])
        restore_random(state["random"][self.world.rank], self.device)
        self.order.set_state(state["order"])
        self.epoch_order = state["order"]
        self.batches.set_state(state["batches"])
        # The total of all processes goes on in the first.
        self.total.copy_(state["total"] if self.world.is_main else torch.zeros(()))

    def _run(self) -> Fit:
        # The first process writes, but all take part in gathering what it writes.
        self.store = self.journal.store(self.phase)
        saved = self.world.share(self.store.load() if self.store is not None and self.world.is_main else None)
        self.checkpointed = bool(self.world.any(int(self.store is not None)))
        # Wrapping comes first: DistributedDataParallel would send rank 0's initial weights over the loaded ones.
        self.trained = self.world.wrap(self.model)
        if self.recipe.compile != "off":
            mode = None if self.recipe.compile == "default" else self.recipe.compile
            self.trained = torch.compile(self.trained, mode=mode)
        if saved is not None:
            self._load_state(saved)
            self.journal.restored(list(self.history), self.seconds)
        self.model.train()
        with self.journal.stop.loop():
            while not self._done():
                self._epoch()
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        best = (self.best["epoch"], self.best["state"]) if self.best and self.recipe.keep_best else None
        return Fit(self.history, self.confusion, self.seconds, self.evaluation_seconds, best)

    def _done(self) -> bool:
        """Whether all epochs are done, or so many of them brought nothing that patience has ended."""
        waited = self.epoch - self.best["epoch"] if self.best else 0
        return self.epoch >= self.recipe.epochs or (self.recipe.patience is not None and waited >= self.recipe.patience)

    @torch.no_grad()
    def _blend(self, averages: list[Tensor], current: list[Tensor], _: object) -> None:
        """The average of few steps at first, which forgets the initial weights: decay is at most (1 + t) / (10 + t) after t."""
        if not averages[0].is_floating_point():
            return torch._foreach_copy_(averages, current)
        done = self.epoch * self.steps + self.step
        return torch._foreach_lerp_(averages, current, 1 - min(self.recipe.ema or 1.0, (1 + done) / (10 + done)))

    def _evaluated(self) -> nn.Module:
        """What is evaluated, and kept in the end: the averaged weights where there are any."""
        return self.model if self.average is None else self.average.module

    def _epoch(self) -> None:
        recipe, stop = self.recipe, self.journal.stop
        started = time.perf_counter()
        for schedule in self.schedules:
            schedule.step(self.epoch)
        share = self.epoch / max(1, recipe.epochs - 1)
        order = self.batches.sampler.epoch(recipe.sampler_at(self.epoch), self.order, share)
        steps = batches(order, recipe.batch_size, self.least)
        self.batches.ahead(steps[self.step :])
        while self.step < len(steps):
            if self.scheduler is None:
                rate = recipe.lr_at(self.epoch, self.step, len(steps))
                for group, part in zip(self.optimizer.param_groups, self.shares, strict=True):
                    group["lr"] = rate * part
            x, target = self.batches.make(steps[self.step], self.epoch)
            self.total += self._train_step(x, target)
            self.step += 1
            if self.journal.on_step:
                self.journal.on_step(self.phase, self.epoch, recipe.epochs, self.step, len(steps))
            # Processes that wait for each other in a gradient cannot stop one by one: they agree at the epoch's end.
            if self.world.size == 1 and self.step < len(steps):
                self._pause(stop.signum or 0, started)
        self._finish_epoch(len(steps))
        self.seconds += time.perf_counter() - started
        self.journal.epoch(self.phase, self.epoch, recipe.epochs, self.history[-1])
        self._pause(self.world.any(stop.signum or 0), None)

    def _train_step(self, x: Tensor, target: Target) -> Tensor:
        """One step of SGD; the loss of the rows of this process, divided by what the whole step divides by."""
        recipe, world, criterion = self.recipe, self.world, self.criterion
        self.optimizer.zero_grad(set_to_none=True)
        if recipe.accumulate == 1 and world.size == 1:
            # Said ahead, so that float16 gradients are rounded after the scaler's factor.
            one = torch.ones((), device=self.device)
            said = {"grad_scale": self.scaler.scale(one)} if self.scaler.is_enabled() else {}
            loss = criterion(self._forward(x), target, **said)
            self.scaler.scale(loss).backward()
            total = loss.detach()
        else:
            total = torch.zeros((), device=self.device)
            divisor = denominator(criterion.weight if criterion.reduction == "mean" else None, target)
            # DistributedDataParallel averages over the processes; the divisor is of all of them already.
            factor = self.scaler.scale(torch.as_tensor(world.size / divisor, dtype=torch.float64, device=self.device))
            # Parts first, then this process's rows of each: batch normalisation sees the parts of a single process.
            parts = torch.arange(len(x), device=self.device).tensor_split(recipe.accumulate)
            for i, whole in enumerate(parts):
                part = whole[world.rows()]
                last = i == len(parts) - 1
                with nullcontext() if last or world.size == 1 else self.trained.no_sync():
                    loss = _summed(criterion, self._forward(x[part]), rows_of(target, part), factor)
                    (loss * factor).backward()
                total += loss.detach() / divisor
        if recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return total

    def _forward(self, x: Tensor) -> Tensor:
        dtype = _DTYPES.get(self.recipe.precision)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            return self.trained(x)

    def _finish_epoch(self, steps: int) -> None:
        mean_loss = float(self.world.sum(self.total)) / steps
        if not math.isfinite(mean_loss):
            lr = self.recipe.lr
            raise ValueError(
                f"lr {lr}: the loss became {mean_loss} in epoch {self.epoch + 1} of {self.phase}; lower it"
            )
        # Reading the loss waited for the device: what follows is evaluation alone.
        started = time.perf_counter()
        record = {"phase": self.phase, "epoch": self.epoch + 1, "train_loss": mean_loss}
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        self.epoch, self.step = self.epoch + 1, 0
        if self.val_set is not None:
            record |= _accuracies("val", self._confusion(self.val_set))
            self._keep_best(record["val_balanced_accuracy"])
        if self.val_set is None or self._done():
            self.confusion = self._confusion(self.test_set)
        if self.val_set is None:
            record |= _accuracies("test", self.confusion)
        self.evaluation_seconds += time.perf_counter() - started
        self.history.append(record)
        self.total.zero_()
        self.epoch_order = self.order.get_state()

    def _keep_best(self, accuracy: float) -> None:
        if self.recipe.patience is None and not self.recipe.keep_best:
            return
        # Processes must not part over the last bit of a sum.
        accuracy = self.world.share(accuracy)
        if self.best is None or accuracy > self.best["accuracy"]:
            weights = self._evaluated().state_dict() if self.recipe.keep_best else {}
            kept = {key: value.detach().clone() for key, value in weights.items()}
            self.best = {"epoch": self.epoch, "accuracy": accuracy, "state": kept}

    def _confusion(self, samples: Labelled) -> Tensor:
        x, y = samples
        return confusion_matrix(y, predict(self._evaluated(), x), self.num_classes).cpu()

    def _pause(self, signum: int, started: float | None) -> None:
        """Write a checkpoint where one is due, the training is done or a signal came; then end it for the signal."""
        store = self.store
        due = self.checkpointed and (signum or self._done() or self.world.any(int(store is not None and store.due())))
        if due:
            before = self.seconds
            if started is not None:
                self.seconds += time.perf_counter() - started
            state = self._state()
            self.seconds = before
            if store is not None:
                store.save(state)
        if signum:
            raise Stopped(signum)


def _accuracies(name: str, confusion: Tensor) -> dict[str, float]:
    top1 = float(confusion.diagonal().sum() / confusion.sum())
    return {f"{name}_balanced_accuracy": float(class_recalls(confusion).mean()), f"{name}_top1": top1}


def optimizer_of(model: nn.Module, recipe: Recipe, own: Own = Own()) -> torch.optim.Optimizer:  # noqa: B008 (frozen)
    """The optimizer of the parameters that require a gradient, in groups of one rate and one decay."""
    backbone = getattr(model, "backbone", None)
    depths = {} if backbone is None or recipe.layer_decay is None else block_depths(backbone)
    inside = set() if backbone is None else set(backbone.parameters())
    # What multiplies features or pixels; not a norm's scale, a table that is looked up, or a cosine head, which divides by its rows'
    # norms: decay would only raise its rate.
    owners = [module for module in model.modules() if not isinstance(module, _UNDECAYED)]
    matrices = {
        p for m in owners for name, p in m.named_parameters(recurse=False) if name.endswith("weight") and p.dim() > 1
    }
    everything = (recipe.decay or ("all" if recipe.optimizer == "sgd" else "weights")) == "all"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = recipe.lr_backbone if recipe.lr_backbone and parameter in inside else recipe.lr
            rate *= recipe.layer_decay ** depths[parameter] if parameter in depths else 1.0
            decay = recipe.weight_decay if everything or parameter in matrices else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    parts = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    if own.optimizer is not None:
        return own.optimizer(parts)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parts, lr=recipe.lr)
    return torch.optim.SGD(parts, lr=recipe.lr, momentum=recipe.momentum)


def _summed(criterion: nn.Module, logits: Tensor, target: Target, grad_scale: Tensor) -> Tensor:
    """The sum of the rows' losses, whatever the criterion's own reduction."""
    reduction, criterion.reduction = criterion.reduction, "sum"
    try:
        return criterion(logits, target, grad_scale=grad_scale)
    finally:
        criterion.reduction = reduction
