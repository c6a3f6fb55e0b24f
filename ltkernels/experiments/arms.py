"""The arms of one tail of the FDG experiment, and the classifiers that judge them.

An arm is a choice of equally many rows from the same pools, one pool for each tail class. In feature space it is judged by a
linear classifier that scikit-learn solves to convergence, so that nothing but the rows differs; every class weighs the same in it, and
synthetic samples have a given share of the weight of their class. ("literal" is the paper's protocol instead: plain
cross-entropy on the counts as they are after completion.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltkernels.diversity import FdgTarget, feature_diversity_gain, standardized_offset
from ltkernels.experiments.protocol import ARMS
from ltkernels.selection import match_pool
from ltkernels.selection._arms import choose_rows, class_seed, cut

# Draws of the random arm: what an arm is compared with is their mean.
RANDOM = 3
# Samples of a head class that a classifier is solved on, or a network trained in image space; the heads are the same in every arm.
HEAD_ROWS = 600
_WEIGHT_DECAY = 5e-4
_TOLERANCE = 1e-6  # of the largest entry of the gradient


@dataclass
class Arm:
    """Added rows of every tail class (label -> row numbers of its pool), with FDG and offset of each class."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    fdg: list[float] = field(default_factory=list)
    offset: list[float] = field(default_factory=list)


def recalls(predicted: Tensor, truth: Tensor, classes: int, tail: Sequence[int]) -> tuple[float, float]:
    """(balanced accuracy, mean accuracy of the tail classes)."""
    recall = torch.bincount(truth, (predicted == truth).double(), classes) / torch.bincount(truth, minlength=classes)
    return float(recall.mean()), float(recall[list(tail)].mean())


def arm_rows(
    name: str, original: Tensor, pool: Tensor, added: int, target: FdgTarget | None, seed: int, subset_size: int
) -> Tensor | None:
    """The rows that an arm takes; None where it needs a target and there is none."""
    cap = None if target is None else target.value
    if name.startswith("random-"):
        return choose_rows(original, pool, added, "random", seed=seed + int(name[7:])).indices
    if name in ("mean", "match"):
        return choose_rows(original, pool, added, name, target=target, seed=seed).indices
    if name.startswith("clusters-") and name != "clusters-target":
        return choose_rows(original, pool, added, name[9:], clusters=cut(pool, subset_size, seed)).indices
    if cap is None:
        return None
    if name == "match-uncapped":
        return choose_rows(original, pool, added, f"match:{cap}", seed=seed).indices
    if name == "fdg":
        return match_pool(original, pool, added, fdg=cap, mean=None, seed=seed).indices
    size = 1 if name == "items" else subset_size
    return choose_rows(original, pool, added, f"target:{cap}", clusters=cut(pool, size, seed)).indices


def level_rows(original: Tensor, pool: Tensor, added: int, levels: int, seed: int) -> list[Tensor]:
    """Rows at `levels` uniformly spaced values of FDG, reached by tilting alone; the mean is left free."""

    def at(fdg: float) -> Any:
        return match_pool(original, pool, added, fdg=fdg, mean=None, seed=seed)

    low, high = (float(at(extreme).fdg[-1]) for extreme in (-1.0, 1e3))
    return [at(low + (high - low) * i / max(1, levels - 1)).indices for i in range(levels)]


def make_arms(
    originals: dict[int, Tensor],
    pools: dict[int, Tensor],
    targets: dict[int, FdgTarget | None],
    added: dict[int, int],
    *,
    levels: int,
    names: Sequence[str] = tuple(ARMS),
    seed: int,
    subset_size: int,
    draws: int = RANDOM,
) -> dict[str, Arm]:
    """Every arm over all tail classes, and `draws` of the random one."""
    arms: dict[str, Arm] = {}
    for label, pool in pools.items():
        z, own = originals[label], class_seed(seed, label)
        chosen = {
            name: arm_rows(name, z, pool, added[label], targets.get(label), own, subset_size)
            for name in (*(f"random-{i}" for i in range(draws)), *names)
        }
        if levels:
            found = level_rows(z, pool, added[label], levels, own)
            chosen |= {f"level-{i}": rows for i, rows in enumerate(found)}
        for name, rows in chosen.items():
            if rows is None:
                continue
            arm = arms.setdefault(name, Arm())
            arm.rows[label] = rows
            arm.fdg.append(float(feature_diversity_gain(z, pool[rows])))
            arm.offset.append(standardized_offset(z, pool[rows]))
    return {name: arm for name, arm in arms.items() if len(arm.rows) == len(pools)}


class Judge:
    """Solves classifiers on real features and an arm's, and scores them on the test set."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        test: tuple[Tensor, Tensor],
        tail: Sequence[int],
        classes: int,
        kind: str,
    ) -> None:
        keep = []
        for label in range(classes):
            rows = (labels == label).nonzero().flatten()
            # Under "literal" the counts are the point.
            keep.append(rows if label in tail or kind == "literal" else rows[:HEAD_ROWS])
        rows = torch.cat(keep)
        self.features, self.labels = features[rows].double().cpu(), labels[rows].cpu()
        self.test = test[0].double().cpu(), test[1].cpu()
        self.tail, self.classes, self.kind = list(tail), classes, kind

    def accuracy(self, added: dict[int, Tensor] | None, share: float) -> tuple[float, float]:
        """(balanced accuracy, mean accuracy of the tail classes) with `added` features, which have a `share` of the weight
        of their class."""
        from sklearn.linear_model import LogisticRegression

        features, labels, weights = [self.features], [self.labels], []
        counts = torch.bincount(self.labels, minlength=self.classes).double()
        real = 1.0 / counts
        for label, x in (added or {}).items():
            features.append(x.double().cpu())
            labels.append(self.labels.new_full((len(x),), label))
            real[label] = (1.0 - share) / counts[label]
            weights.append(torch.full((len(x),), share / len(x), dtype=torch.float64))
        y = torch.cat(labels)
        w = (
            torch.cat([real[self.labels], *weights])
            if self.kind == "balanced"
            else torch.ones(len(y), dtype=torch.float64)
        )
        # Loss and penalty as in training, but solved: the weights sum to 1, as the rows of a mean do.
        model = LogisticRegression(C=1 / _WEIGHT_DECAY, tol=_TOLERANCE, max_iter=5000)
        model.fit(torch.cat(features).numpy(), y.numpy(), sample_weight=(w / w.sum()).numpy())
        x, truth = self.test
        return recalls(torch.from_numpy(model.predict(x.numpy())), truth, self.classes, self.tail)
