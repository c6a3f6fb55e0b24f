"""From features to a completed tail: head/tail split, augmented pools, clustering, selection by FDG.

The recipe of the data-centric study (sections 4.1 and 4.2), with its open choices as settings of `Config`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels.augment import fdc, most_similar_class
from ltkernels.selection.arms import Arm, complete_class
from ltkernels.selection.recipe import head_tail_split
from ltkernels.train.config import Config


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from a run's seed and a purpose, independent between purposes."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class TailClass:
    """A tail class with its pool of synthetic features and the arms that were drawn from it."""

    label: int
    similar_head: int | None  # None: the pool was given
    need: int
    pool: Tensor
    arms: dict[str, Arm]

    def added(self, arm: str) -> Tensor:
        """(need, d): the synthetic features that the arm adds."""
        return self.pool[self.arms[arm].rows]

    def to_dict(self) -> dict[str, Any]:
        arms = {name: {"fdg": arm.fdg, "path": arm.path} for name, arm in self.arms.items()}
        sizes = {"need": self.need, "pool": len(self.pool)}
        return {"label": self.label, "similar_head": self.similar_head, **sizes, "arms": arms}


def selected_arm(config: Config) -> str:
    """Name of the arm that `config.select` asks for."""
    return "random-0" if config.select == "random" else config.select


def random_arms(config: Config) -> list[str]:
    """Names of the random arms."""
    return [f"random-{i}" for i in range(config.random_repeats)]


def complete_tail(
    features: Tensor, labels: Tensor, config: Config, progress: Callable[[int, int], None] | None = None
) -> tuple[list[int], list[TailClass]]:
    """Head classes, and for every tail class a pool and the selections from it that bring it to the largest class.

    `features` (n, d) float32 or float64 of the real training samples, `labels` (n,). `progress(done, total)` is called
    after each tail class. A tail class of a single sample is left out: its FDG is undefined.
    Raises ValueError where a class is empty.
    """
    counts = torch.bincount(labels).tolist()
    head, tail = head_tail_split(counts, config.head_ratio)
    completed = []
    for done, label in enumerate(tail, start=1):
        need = max(counts) - counts[label]
        # Of a single sample there is no diversity to gain on.
        if need > 0 and counts[label] > 1:
            completed.append(_complete_class(features, labels, label, head, need, config))
        if progress:
            progress(done, len(tail))
    return head, completed


def _complete_class(
    features: Tensor, labels: Tensor, label: int, head: list[int], need: int, config: Config
) -> TailClass:
    rows = ceil(config.pool_factor * need / config.subset_size) * config.subset_size
    entry = complete_class(
        label,
        features[labels == label],
        fdc_pool(features, labels, label, rows, head, config),
        need,
        mode=config.select,
        n_random=config.random_repeats,
        subset_size=config.subset_size,
        seed=derived_seed(config.seed, label, 1),
        random_seed=derived_seed(config.seed, label, 2),
    )
    similar = most_similar_class(features, labels, label, head, similarity=config.similarity)
    return TailClass(label, similar, need, entry.pool.to(features.dtype), entry.arms)


def fdc_pool(features: Tensor, labels: Tensor, label: int, rows: int, head: list[int], config: Config) -> Tensor:
    """(rows, d): synthetic features of the class, in the spread of the most similar head class."""
    return fdc(
        features,
        labels,
        label,
        rows,
        head_classes=head,
        similarity=config.similarity,
        shrinkage=config.shrinkage,
        generator=torch.Generator().manual_seed(derived_seed(config.seed, label, 0)),
    )
