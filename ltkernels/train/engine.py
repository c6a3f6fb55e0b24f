"""The training loop: SGD over batches that live on the device, an evaluation per epoch, no host sync per step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltkernels.train.metrics import confusion_matrix, summarize
from ltkernels.train.samplers import batches

_MOMENTUM = 0.9
# Share of the steps that raise the rate from 0, before a half cosine takes it back to 0.
_WARMUP = 0.05
# Activations of this many small images stay in the cache; 2048 of 28x28 were 200 MB a layer, and several times slower.
_EVAL_BATCH = 256

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""`progress(phase, done, total, record)`; `record` is the epoch's line of metrics.jsonl, or {}."""


@dataclass(frozen=True)
class Recipe:
    """How one model is fitted. `losses` pairs the first epoch (from 0) with the loss that holds from there on."""

    losses: Sequence[tuple[int, nn.Module]]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    sampler: str
    seed: int


@dataclass(frozen=True)
class Fit:
    """What a training left behind, besides the model: a record per epoch, the last confusion matrix, the best epoch."""

    history: list[dict[str, Any]]
    confusion: Tensor

    @property
    def best_balanced_accuracy(self) -> float:
        """The best epoch by the test set: an upper bound for reference, not a result."""
        return max(record["test_balanced_accuracy"] for record in self.history)


def rate_factor(step: int, steps: int) -> float:
    """The learning rate of step 0..steps-1 as a share of the peak: linear warm-up, then half a cosine towards 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """(n,) int64 predicted classes, in evaluation mode (the mode is restored)."""
    return apply(model, x).argmax(1)


@torch.no_grad()
def apply(model: nn.Module, x: Tensor) -> Tensor:
    """`model(x)` in evaluation mode, in batches, without gradients (the mode is restored)."""
    training = model.training
    model.eval()
    outputs = torch.cat([model(chunk) for chunk in x.split(_EVAL_BATCH)])
    model.train(training)
    return outputs


def fit(
    model: nn.Module,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    num_classes: int,
    recipe: Recipe,
    phase: str,
    progress: Progress | None = None,
) -> Fit:
    """Train `model` in place on (x, y), evaluating on the test set after every epoch.

    The same seed gives the same numbers on the same machine, torch version and number of threads; torch's global random
    state (dropout draws from it) is seeded here and put back. Raises ValueError where the loss stops being finite.
    """
    device = train_set[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        return _fit(model, train_set, test_set, num_classes, recipe, phase, progress)


def _fit(
    model: nn.Module,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    num_classes: int,
    recipe: Recipe,
    phase: str,
    progress: Progress | None,
) -> Fit:
    (x, y), (x_test, y_test) = train_set, test_set
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=_MOMENTUM, weight_decay=recipe.weight_decay)
    history: list[dict[str, Any]] = []
    confusion = torch.empty(0)
    model.train()
    for epoch in range(recipe.epochs):
        criterion = [loss for start, loss in recipe.losses if start <= epoch][-1]
        epoch_batches = list(batches(y, recipe.sampler, num_classes, recipe.batch_size, generator))
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for step, index in enumerate(epoch_batches, start=epoch * len(epoch_batches)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate_factor(step, recipe.epochs * len(epoch_batches))
            loss = criterion(model(x[index]), y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        mean_loss = float(total) / len(epoch_batches)
        if not math.isfinite(mean_loss):
            raise ValueError(f"lr {recipe.lr}: the loss became {mean_loss} in epoch {epoch + 1} of {phase}; lower it")
        confusion = confusion_matrix(y_test, predict(model, x_test), num_classes).cpu()
        scores = summarize(confusion, [1] * num_classes)
        record = {
            "phase": phase,
            "epoch": epoch + 1,
            "train_loss": mean_loss,
            "test_balanced_accuracy": scores["balanced_accuracy"],
            "test_top1": scores["top1"],
        }
        history.append(record)
        if progress:
            progress(phase, epoch + 1, recipe.epochs, record)
    return Fit(history=history, confusion=confusion)
