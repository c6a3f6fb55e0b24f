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

from ltkernels import diversity, selection
from ltkernels.augment import fdc, most_similar_class
from ltkernels.selection.recipe import head_tail_split
from ltkernels.train.config import Config, parse_select


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from a run's seed and a purpose, independent between purposes."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


_PATH_POINTS = 40


@dataclass(frozen=True)
class Arm:
    """One way to complete a tail class: rows of the pool, and FDG as (samples added, FDG) on the way there."""

    rows: Tensor
    path: list[tuple[int, float]]

    @property
    def fdg(self) -> float:
        """FDG of the class with everything that the arm adds."""
        return self.path[-1][1]


@dataclass(frozen=True)
class TailClass:
    """A tail class with its pool of synthetic features and the arms that were drawn from it."""

    label: int
    similar_head: int
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
    after each tail class. Raises ValueError where a class is empty or a tail class has a single sample (FDG undefined).
    """
    counts = torch.bincount(labels).tolist()
    head, tail = head_tail_split(counts, config.head_ratio)
    completed = []
    for done, label in enumerate(tail, start=1):
        need = max(counts) - counts[label]
        if need > 0:
            completed.append(_complete_class(features, labels, label, head, need, config))
        if progress:
            progress(done, len(tail))
    return head, completed


def _complete_class(
    features: Tensor, labels: Tensor, label: int, head: list[int], need: int, config: Config
) -> TailClass:
    original = features[labels == label]
    if len(original) < 2:
        raise ValueError(f"class {label} has one sample: its feature diversity gain is undefined")
    subsets = ceil(config.pool_factor * need / config.subset_size)
    pool = fdc(
        features,
        labels,
        label,
        subsets * config.subset_size,
        head_classes=head,
        similarity=config.similarity,
        shrinkage=config.shrinkage,
        generator=torch.Generator().manual_seed(derived_seed(config.seed, label, 0)),
    )
    # Balanced clusters: every subset has exactly subset_size samples, as the study assumes.
    clusters = selection.kmeans_subsets(pool, subsets, balanced=True, seed=derived_seed(config.seed, label, 1) % 2**31)
    pool = pool[clusters.order]
    arms: dict[str, Arm] = {}
    if config.select != "random":
        arms[config.select] = _select(original, pool, clusters.offsets, need, config)
    shuffles = torch.Generator().manual_seed(derived_seed(config.seed, label, 2))
    for name in random_arms(config):
        rows = torch.randperm(len(pool), generator=shuffles)[:need].to(pool.device)
        # The report draws one random path; of the other repeats it needs the end.
        arms[name] = _random(original, pool, rows, points=_PATH_POINTS if name == "random-0" else 1)
    similar = most_similar_class(features, labels, label, head, similarity=config.similarity)
    return TailClass(label=label, similar_head=similar, need=need, pool=pool, arms=arms)


def _select(original: Tensor, pool: Tensor, offsets: Tensor, need: int, config: Config) -> Arm:
    mode, target = parse_select(config.select)
    bounds = offsets.tolist()
    sizes = np.diff(bounds)
    # Enough steps even if the smallest subsets are the ones picked; a greedy pick does not depend on how many follow.
    steps = min(int(np.searchsorted(np.cumsum(np.sort(sizes)), need)) + 1, len(sizes))
    chosen = selection.select_subsets(original, pool, offsets, m=steps, mode=mode, target=target)
    picked = chosen.picked.tolist()
    added = np.cumsum(sizes[picked]).tolist()
    kept = next(i for i, size in enumerate(added, start=1) if size >= need)
    # The last subset is cut where the class would outgrow the largest one; FDG is that of what is really added.
    rows = torch.cat([torch.arange(bounds[c], bounds[c + 1]) for c in picked[:kept]])[:need].to(pool.device)
    path = [*zip(added[: kept - 1], chosen.fdg.tolist()), (need, _fdg(original, pool[rows]))]
    return Arm(rows=rows, path=path)


def _random(original: Tensor, pool: Tensor, rows: Tensor, points: int) -> Arm:
    """Samples drawn from the whole pool: what augmentation without clustering and selection would add."""
    ends = sorted({ceil(len(rows) * i / points) for i in range(1, points + 1)})
    return Arm(rows=rows, path=[(end, _fdg(original, pool[rows[:end]])) for end in ends])


def _fdg(original: Tensor, added: Tensor) -> float:
    return float(diversity.feature_diversity_gain(original, added))
