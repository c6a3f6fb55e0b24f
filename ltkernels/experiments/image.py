"""The FDG experiment in image space: every arm trains a network of its own, as Remix and CMO are meant.

A set has one long-tailed subset (a part of each head class, and the tail thinned by the protocol's divisor), one pool of images
for each tail class, and one initial network. The network that was trained with the first random draw gives the features in
which every other arm is chosen (Definition 4: features of a model trained on originals and augmented samples). Training is
with logit adjustment by the completed counts, so that no arm gains by its number. The head samples that training leaves out
calibrate the FDG target; spare tail samples, where there are enough, are the oracle.
"""

from __future__ import annotations

import functools
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels import augment
from ltkernels.diversity import FdgTarget, feature_diversity_gain, standardized_offset
from ltkernels.experiments.arms import HEAD_ROWS, arm_rows, make_arms, recalls
from ltkernels.selection._arms import calibrated, class_seed
from ltkernels.train.engine import Training, apply, predict
from ltkernels.train.features import derived_seed
from ltkernels.train.models import Classifier
from ltkernels.train.pipeline import Job
from ltkernels.train.recipe import Recipe
from ltkernels.train.schedules import loss_record

# Draws of the random arm: each is a network to train.
RANDOM = 2
POOLS = {"remix": augment.remix_pool, "cmo": augment.cmo_pool}

ArmRow = tuple[str, list[float], list[float], tuple[float, float]]
"""(arm, FDG of each tail class, offset of each, (balanced accuracy, accuracy of the tail))."""


class Subset(NamedTuple):
    """What a set trains on; unused: (images, labels) of the head classes' other samples; added: samples a tail class gets."""

    x: Tensor
    y: Tensor
    unused: tuple[Tensor, Tensor]
    added: dict[int, int]


def subset(job: Job, head: list[int], tail: list[int], index: int, divisor: int, added: int) -> Subset:
    generator = torch.Generator().manual_seed(derived_seed(job.config.seed, 11, index))
    kept, unused = [], []
    for label in range(job.data.num_classes):
        rows = (job.y_train == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        size = max(2, round(len(rows) / divisor)) if label in tail else HEAD_ROWS
        kept.append(rows[:size])
        unused.append(rows[size : 2 * size] if label in head else rows[:0])
    rows, others = torch.cat(kept), torch.cat(unused)
    counts = torch.bincount(job.y_train[rows], minlength=job.data.num_classes).tolist()
    needs = {label: min(added, max(counts) - counts[label]) for label in tail}
    return Subset(
        job.x_train[rows],
        job.y_train[rows],
        (job.x_train[others], job.y_train[others]),
        {label: n for label, n in needs.items() if n > 0},
    )


def train(job: Job, part: Subset, images: dict[int, Tensor]) -> Classifier:
    """A network on the subset and further images of tail classes."""
    config, record = job.config, loss_record("logit_adjusted")
    x = torch.cat([part.x, *images.values()])
    y = torch.cat([part.y, *(part.y.new_full((len(new),), label) for label, new in images.items())])
    model = job.build(record)
    criterion = record.make(torch.bincount(y, minlength=job.data.num_classes).tolist()).to(config.device)
    recipe = Recipe(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        seed=derived_seed(config.seed, 3),
    )
    # Epochs are not looked at on the way: a single sample stands for the evaluation.
    one = (part.x[:1], part.y[:1])
    Training(model, criterion, (x, y), one, job.data.num_classes, recipe, "train/arm").fit()
    return model


def accuracy(job: Job, tail: list[int], model: Classifier) -> tuple[float, float]:
    """(balanced accuracy, mean accuracy of the tail classes) on the test set."""
    return recalls(predict(model, job.x_test), job.y_test, job.data.num_classes, tail)


@functools.lru_cache(maxsize=1)
def _controls(
    context: Any, index: int, divisor: int, added: int
) -> tuple[Subset, tuple[float, float], tuple[dict[int, Tensor], tuple[float, float]] | None]:
    """What no method changes: the subset, no augmentation, and (images, accuracy) of unseen real samples."""
    job, tail, spare = context.job, context.tail, context.spare
    part = subset(job, context.head, tail, index, divisor, added)
    none = accuracy(job, tail, train(job, part, {}))
    if spare is None or any(int((spare.y_train == label).sum()) < n for label, n in part.added.items()):
        return part, none, None
    generator = torch.Generator().manual_seed(derived_seed(job.config.seed, 12, index))
    images = {}
    for label, n in part.added.items():
        rows = (spare.y_train == label).nonzero().flatten()
        images[label] = spare.x_train[rows[torch.randperm(len(rows), generator=generator)[:n]]].to(job.x_train)
    return part, none, (images, accuracy(job, tail, train(job, part, images)))


def image_rows(
    context: Any, method: str, index: int, seed: int, protocol: Any
) -> tuple[list[ArmRow], dict[int, FdgTarget | None]]:
    """Every arm of one set, "none" first, and the targets by label."""
    job, tail = context.job, context.tail
    part, none, real = _controls(context, index, protocol.tail_divisor, protocol.added)
    generator = torch.Generator().manual_seed(seed)
    pools = {
        label: POOLS[method](part.x, part.y, label, ceil(job.config.pool_factor * n), generator=generator)
        for label, n in part.added.items()
    }
    own = {label: part.x[part.y == label] for label in part.added}
    # The first random draw needs no features, only the size of a pool: its network makes them.
    draw = {
        label: arm_rows("random-0", own[label].flatten(1), pool.flatten(1), part.added[label], None, class_seed(seed, label), 1)
        for label, pool in pools.items()
    }  # fmt: skip
    eyes = train(job, part, {label: pools[label][rows] for label, rows in draw.items()})

    def see(x: Tensor) -> Tensor:
        return apply(eyes.backbone, x)

    features = {label: see(x) for label, x in own.items()}
    heads = {label: see(part.x[part.y == label]) for label in context.head}
    unused = {label: see(part.unused[0][part.unused[1] == label]) for label in context.head}
    targets = {
        label: calibrated(heads, unused, len(features[label]), n, seed + label) for label, n in part.added.items()
    }
    arms = make_arms(
        features,
        {label: see(pool) for label, pool in pools.items()},
        targets,
        part.added,
        levels=protocol.levels,
        names=protocol.arms,
        seed=seed,
        subset_size=job.config.subset_size or 10,
        draws=RANDOM,
    )
    rows: list[ArmRow] = [("none", [], [], none)]
    for name, arm in arms.items():
        images = {label: pools[label][chosen] for label, chosen in arm.rows.items()}
        model = eyes if name == "random-0" else train(job, part, images)
        rows.append((name, arm.fdg, arm.offset, accuracy(job, tail, model)))
    if real is not None:
        added = {label: see(x) for label, x in real[0].items()}
        gains = [float(feature_diversity_gain(features[label], x)) for label, x in added.items()]
        rows.append(("real", gains, [standardized_offset(features[label], x) for label, x in added.items()], real[1]))
    return rows, targets
