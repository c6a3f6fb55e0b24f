"""From features to a completed tail: head/tail split, augmented pools, selection; `selection.recipe` does the work.

The open choices of the data-centric study (sections 4.1 and 4.2) are settings of `Config`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels.augment import fdc, most_similar_class
from ltkernels.diversity import FAR
from ltkernels.selection._arms import Arm, ClassSets
from ltkernels.selection._recipe import fdg_recipe, head_tail_split
from ltkernels.train.config import Config

__all__ = ["TailClass", "complete_tail", "derived_seed", "fdc_pool", "head_tail_split", "tail_mean"]


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from a run's seed and a purpose, independent between purposes."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 cannot shift a uint64 by 1


@dataclass(frozen=True)
class TailClass:
    """A tail class with its pool of synthetic features and the arms that were drawn from it.

    `need` synthetic samples and `repeated` repeats of real ones bring it to the size of the largest class.
    """

    label: int
    similar_head: int | None  # None: the pool was given
    need: int
    repeated: int
    sets: ClassSets
    dtype: torch.dtype

    @property
    def arms(self) -> dict[str, Arm]:
        return self.sets.arms

    def added(self, arm: str) -> Tensor:
        """(need, d): the synthetic features that the arm adds."""
        return self.sets.pool[self.arms[arm].rows.to(self.sets.pool.device)].to(self.dtype)

    def completed(self, original: Tensor, arm: str) -> Tensor:
        """(need + repeated, d): what joins the real features `original` (n, d) of the class."""
        repeats = torch.arange(self.repeated, device=original.device) % len(original)
        return torch.cat([self.added(arm), original[repeats]])

    def to_dict(self) -> dict[str, Any]:
        arms = {
            name: {"fdg": arm.fdg, "offset": arm.offset, "far": bool(arm.offset > FAR), "path": arm.path}
            for name, arm in self.arms.items()
        }
        target = self.sets.target
        return {
            "label": self.label,
            "similar_head": self.similar_head,
            "need": self.need,
            "repeated": self.repeated,
            "pool": len(self.sets.pool),
            "arms": arms,
            "reached": self.sets.reached,
            "note": self.sets.note,
            "target": None
            if target is None
            else {"fdg": target.value, "spread": target.spread, "heads": len(target.classes)},
        }


def tail_mean(tail: Sequence[TailClass], arm: str, what: str) -> float | None:
    """The mean over the tail classes of an arm's `fdg` or `offset`; None where no class was completed."""
    values = [getattr(t.arms[arm], what) for t in tail]
    return sum(values) / len(values) if values else None


def complete_tail(
    features: Tensor,
    labels: Tensor,
    config: Config,
    progress: Callable[[int, int], None] | None = None,
    *,
    make_pool: Callable[[int, int], Tensor] | None = None,
    held_out: Mapping[int, Tensor] | None = None,
    compared: Sequence[str] = (),
) -> tuple[list[int], list[TailClass]]:
    """Head classes, and for every tail class a pool and the selections from it that bring it to the largest class.

    `features` (n, d) float32 or float64 of the real training samples, `labels` (n,). `make_pool(label, rows)` gives a pool
    (None: FDC features); `held_out` are features of real samples by label that training did not see; `compared` are modes
    that get as many draws as the random arm. `progress(done, total)` is called after each tail class. A tail class of a single
    sample is left out: its FDG is undefined. Raises ValueError where a class is empty.
    """
    counts = torch.bincount(labels).tolist()
    head, tail = head_tail_split(counts, config.head_ratio)
    able = [label for label in tail if 1 < counts[label] < max(counts)]
    if not able:
        return head, []
    by_class = {label: features[labels == label] for label in range(len(counts))}
    recipe = fdg_recipe(
        by_class,
        make_pool or (lambda label, rows: fdc_pool(features, labels, label, rows, head, config)),
        counts,
        classes=able,
        held_out=held_out,
        compared=compared,
        n_sets=0,
        progress=None if progress is None else (lambda _, done, total: progress(done, total)),
        **recipe_settings(config),
    )
    assert recipe is not None
    completed = []
    for entry in recipe.classes:
        similar = None
        if make_pool is None:
            similar = most_similar_class(features, labels, entry.label, head, similarity=config.similarity)
        completed.append(tail_class(entry, similar, counts, features.dtype))
    return head, completed


def recipe_settings(config: Config) -> dict[str, Any]:
    """The settings that `fdg_recipe` takes."""
    return {
        "head_ratio": config.head_ratio,
        "mode": config.select,
        "share": config.share,
        "n_random": config.random_repeats,
        "pool_factor": config.pool_factor,
        "subset_size": config.subset_size,
        "seed": config.seed,
    }


def tail_class(entry: ClassSets, similar: int | None, counts: list[int], dtype: torch.dtype) -> TailClass:
    return TailClass(entry.label, similar, entry.need, max(counts) - counts[entry.label] - entry.need, entry, dtype)


def fdc_pool(features: Tensor, labels: Tensor, label: int, rows: int, head: list[int], config: Config) -> Tensor:
    """(rows, d) float64: synthetic features of the class, in the spread of the most similar head class."""
    # In one precision whatever the features are stored in: a selection may turn on the last digit of a candidate.
    return fdc(
        features.double(),
        labels,
        label,
        rows,
        head_classes=head,
        similarity=config.similarity,
        shrinkage=config.shrinkage,
        generator=torch.Generator().manual_seed(derived_seed(config.seed, label, 0)),
    )
