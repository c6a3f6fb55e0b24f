"""The recipe of the FDG paper, sections 4.1 and 4.2: from features and pools to sets of augmented samples.

Every tail class is brought to the size of the largest class with samples of its pool: at random (the random arm), by
greedy selection of clusters (the greedy arm), and as a series of sets whose FDG is uniformly spaced. What the paper
leaves open is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diversity import FeatureStatistics, check_features, feature_diversity_gain
from .greedy import select_subsets
from .kmeans import kmeans_subsets
from .sets import uniform_fdg_sets

# Points of a random arm's FDG path.
_POINTS = 40


def head_tail_split(class_counts: Sequence[int], head_ratio: float = 0.9) -> tuple[list[int], list[int]]:
    """Labels of the head and of the tail classes, each by descending count (ties by label).

    The head is the shortest run of largest classes that together hold more than `head_ratio` of the samples. Raises
    ValueError where a class is empty.
    """
    empty = [label for label, count in enumerate(class_counts) if count < 1]
    if empty:
        raise ValueError(f"class_counts must be positive; empty: class {', '.join(map(str, empty))}")
    order = sorted(range(len(class_counts)), key=lambda label: (-class_counts[label], label))
    total, held = sum(class_counts), 0
    for size, label in enumerate(order, start=1):
        held += class_counts[label]
        if held > head_ratio * total:
            return order[:size], order[size:]
    return order, []


class ClassSets(NamedTuple):
    """What `complete_class` made for one class.

    Attributes:
        label, need: the class, and how many samples it gets.
        pool: (P, d) its augmented features, cluster after cluster; offsets (K + 1,) says where each begins.
        rows: (need,) rows of the pool that the greedy arm adds; path: its FDG as (samples added, FDG) on the way.
        random_rows: (repeats, need), random_fdg (repeats,): the random arm; random_path: the first repeat's path.
        set_rows: (n_sets, need), set_fdg (n_sets,), FDG rising and uniformly spaced; spacing_error as in `UniformSets`.
    """

    label: int
    need: int
    pool: Tensor
    offsets: Tensor
    rows: Tensor
    path: list[tuple[int, float]]
    random_rows: Tensor
    random_fdg: Tensor
    random_path: list[tuple[int, float]]
    set_rows: Tensor
    set_fdg: Tensor
    spacing_error: float

    @property
    def fdg(self) -> float:
        return self.path[-1][1]


def parse_mode(mode: str) -> dict[str, Any]:
    """ "max", "min", "quantile:0.3", "target:0.1" or "target:0.1:0.2" as keywords of `select_subsets`."""
    name, *numbers = mode.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [math.nan]
    if name in ("max", "min") and not values:
        return {"mode": name}
    if name == "quantile" and len(values) == 1 and 0.0 <= values[0] <= 1.0:
        return {"mode": name, "q": values[0]}
    if name == "target" and len(values) in (1, 2) and all(map(math.isfinite, values)) and values == sorted(values):
        return {"mode": name, "target": values[0] if len(values) == 1 else (values[0], values[1])}
    raise ValueError(f"mode must be max, min, quantile:Q with 0 <= Q <= 1, target:X or target:LOW:HIGH, got {mode!r}")


def complete_class(
    label: int,
    original: Any,
    pool: Any,
    need: int,
    *,
    m: int | None = None,
    mode: str = "max",
    n_sets: int = 0,
    n_random: int = 100,
    subset_size: int = 10,
    subsets: int | None = None,
    balanced: bool = True,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
    seed: int = 0,
    niter: int = 25,
    nredo: int = 1,
    spherical: bool = False,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ClassSets:
    """Cuts the pool of one tail class into clusters and draws its arms.

    Args:
        label: of the class, for the result and for error messages.
        original: (N, d) features of the class, N >= 2; pool: (P, d) augmented ones, P >= need.
        need: samples to add; the last subset picked is cut there.
        m: subsets to pick instead; need is then at most what they hold.
        mode: of the greedy arm, see `parse_mode`.
        n_sets: uniformly spaced sets, 0 for none (else at least 2); n_random: repeats of the random arm.
        subset_size, subsets: size of the clusters, or their number (P / subset_size by default).
        balanced, niter, nredo, spherical: of `kmeans_subsets`.
        seed: of the clustering and of the random arm.
        checkpoint: file for the runs of the uniform sets.
        centering, alpha, engine, progress: as in `uniform_fdg_sets`.
    """
    z, x = check_features(original, "original"), check_features(pool, "pool")
    try:
        if z.shape[0] < 2:
            raise ValueError("has one sample: its feature diversity gain is undefined")
        if need < 1 or need > x.shape[0]:
            raise ValueError(f"needs {need} samples, its pool has {x.shape[0]}")
        count = subsets or max(1, -(-x.shape[0] // subset_size))
        clusters = kmeans_subsets(
            x, count, balanced=balanced, niter=niter, nredo=nredo, spherical=spherical, seed=seed % 2**31
        )
        x = x[clusters.order.to(x.device)]
        sizes = clusters.offsets.diff()
        # Enough steps even if the smallest subsets are the ones picked; a greedy pick does not depend on how many follow.
        steps = int(torch.searchsorted(sizes.sort().values.cumsum(0), need)) + 1 if m is None else m
        if m is not None:
            need = min(need, int(sizes.sort().values[: min(m, count)].sum()))
        keywords: dict[str, Any] = {"m": min(steps, count), "centering": centering, "alpha": alpha, "engine": engine}
        greedy = select_subsets(z, x, clusters.offsets, **parse_mode(mode), **keywords)
        sets = None
        if n_sets:
            sets = uniform_fdg_sets(
                z, x, clusters.offsets, n_sets=n_sets, checkpoint=checkpoint, progress=progress, **keywords
            )
    except ValueError as error:
        raise ValueError(
            f"class {label} {error}" if str(error)[:3] in ("has", "nee") else f"class {label}: {error}"
        ) from None
    gain = _Gain(z, centering, alpha)

    def cut(picked: Tensor) -> Tensor:
        return picked[:need]

    added = sizes[greedy.picked].cumsum(0).tolist()
    path = [(n, fdg) for n, fdg in zip(added, greedy.fdg.tolist()) if n < need]
    rows = cut(greedy.indices)
    path.append((need, gain(x[rows.to(x.device)])))
    generator = torch.Generator().manual_seed(seed)
    random_rows = torch.stack(
        [torch.randperm(x.shape[0], generator=generator)[:need] for _ in range(n_random)] or [rows]
    )
    random_rows = random_rows[:n_random]
    random_fdg = torch.tensor([gain(x[r.to(x.device)]) for r in random_rows], dtype=torch.float64)
    ends = sorted({-(-need * i // _POINTS) for i in range(1, _POINTS + 1)})
    random_path = [(end, gain(x[random_rows[0, :end].to(x.device)])) for end in ends] if n_random else []
    set_rows = torch.stack([cut(s.indices) for s in sets.selections]) if sets else rows[None, :][:0]
    set_fdg = torch.tensor([gain(x[r.to(x.device)]) for r in set_rows], dtype=torch.float64)
    return ClassSets(
        label,
        need,
        x,
        clusters.offsets,
        rows,
        path,
        random_rows,
        random_fdg,
        random_path,
        set_rows,
        set_fdg,
        sets.spacing_error if sets else math.nan,
    )


class _Gain:
    """FDG of one class for many added sets: the original's part is computed once."""

    def __init__(self, original: Tensor, centering: str, alpha: float) -> None:
        self.original, self.centering, self.alpha = original, centering, alpha
        self.statistics = FeatureStatistics(original.shape[1], device=original.device).update(original)

    def __call__(self, added: Tensor) -> float:
        if self.original.shape[0] + added.shape[0] < self.original.shape[1]:  # the n x n form is the smaller one
            return float(feature_diversity_gain(self.original, added, centering=self.centering, alpha=self.alpha))
        other = FeatureStatistics(added.shape[1], device=added.device).update(added)
        return float(self.statistics.gain(other, centering=self.centering, alpha=self.alpha))


def spread_evenly(values: Sequence[float], count: int) -> tuple[list[int], float]:
    """`count` of the values, one to one and as near as can be (least sum of distances) to `count` uniformly spaced ones
    from the smallest to the largest: (their positions, FDG rising; the largest distance in units of the spacing)."""
    if not 2 <= count <= len(values):
        raise ValueError(f"count must be between 2 and the {len(values)} values, got {count}")
    order = np.argsort(values, kind="stable")
    v = np.asarray(values, dtype=np.float64)[order]
    targets = np.linspace(v[0], v[-1], count)
    # Sorted against sorted, the best match never crosses: cost[j] is the least for the first i targets among the first
    # j values.
    cost = np.zeros(len(v) + 1)
    taken = np.zeros((count, len(v) + 1), dtype=bool)
    for i, target in enumerate(targets):
        new = np.full(len(v) + 1, np.inf)
        for j in range(i + 1, len(v) + 1):
            with_j = cost[j - 1] + abs(v[j - 1] - target)
            taken[i, j] = with_j <= new[j - 1]
            new[j] = with_j if taken[i, j] else new[j - 1]
        cost = new
    chosen, j = [], len(v)
    for i in range(count - 1, -1, -1):
        while not taken[i, j]:
            j -= 1
        j -= 1
        chosen.append(j)
    chosen.reverse()
    spacing = float(targets[1] - targets[0])
    error = float(np.abs(v[chosen] - targets).max() / spacing) if spacing > 0.0 else 0.0
    return order[chosen].tolist(), error


class Recipe(NamedTuple):
    """What `fdg_recipe` made.

    Attributes:
        head, tail: labels of the head classes, and of the completed tail classes.
        classes: one `ClassSets` per completed class.
        kept: the sets to train on, FDG rising: ("greedy", i) is set i of every class, ("random", j) the j-th repeat.
        fdg: (len(kept),) FDG_Tail of each, the mean over the classes.
        spacing_error: how far `fdg` is from uniform, in units of the spacing.
    """

    head: list[int]
    tail: list[int]
    classes: list[ClassSets]
    kept: list[tuple[str, int]]
    fdg: Tensor
    spacing_error: float


def fdg_recipe(
    originals: Mapping[int, Any],
    make_pool: Callable[[int, int], Any],
    class_counts: Sequence[int],
    *,
    head_ratio: float = 0.9,
    classes: Sequence[int] | None = None,
    m: int | None = None,
    mode: str = "max",
    n_sets: int = 50,
    n_random: int = 100,
    pool_factor: float = 4.0,
    subset_size: int = 10,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **keywords: Any,
) -> Recipe:
    """Sections 4.1 and 4.2: completes every tail class and keeps n_sets sets whose FDG_Tail is uniformly spaced.

    Half of the random repeats (every second by FDG_Tail) and the n_sets greedy sets (set i of every class together)
    compete; the n_sets nearest to uniform spacing are kept. FDG_Tail is the mean over the tail classes.

    Args:
        originals: features (n_c, d) by label; only those of completed classes are read.
        make_pool: called with (label, rows): at least `rows` augmented features for the class.
        class_counts: training samples of every class.
        head_ratio: head classes hold more than this share of the samples; the rest are the tail.
        classes: complete these instead of the whole tail.
        m: subsets to pick per class; by default as many as bring it to the largest class.
        mode: of the single greedy arm that every class also gets, see `parse_mode`.
        n_sets, n_random: sets wanted (0: none), repeats of the random arm.
        pool_factor: size of a pool in units of what the class needs. The paper's own pool of 5000 is nearly all taken
            on CIFAR-10-LT; 4 and more leaves a choice.
        subset_size, seed, keywords: as in `complete_class`.
        checkpoint: folder for the runs of every class: an interrupted call, made again, repeats only its last round.
        progress: called with (what, done, total).

    Raises:
        TypeError, ValueError: as the steps; a class that is no tail class, has one sample, or needs nothing.
    """
    head, tail = head_tail_split(class_counts, head_ratio)
    largest = max(class_counts)
    wanted = [c for c in tail if class_counts[c] < largest] if classes is None else list(classes)
    for c in wanted:
        if not 0 <= c < len(class_counts):
            raise ValueError(f"classes: there is no class {c}; labels are 0 to {len(class_counts) - 1}")
        if class_counts[c] >= largest:
            raise ValueError(f"classes: class {c} has {class_counts[c]} samples, as many as the largest; it needs none")
    folder = None if checkpoint is None else Path(checkpoint)
    done = []
    for number, c in enumerate(wanted):
        need = largest - class_counts[c] if m is None else min(largest - class_counts[c], m * subset_size)
        rows = -(-math.ceil(pool_factor * need) // subset_size) * subset_size

        def report(found: int, total: int, number: int = number) -> None:
            if progress:
                progress("select", number * total + found, len(wanted) * total)

        done.append(
            complete_class(
                c,
                originals[c],
                make_pool(c, rows),
                need,
                m=m,
                mode=mode,
                n_sets=n_sets,
                n_random=n_random,
                subset_size=subset_size,
                seed=int(np.random.SeedSequence((seed, c)).generate_state(1)[0]),
                checkpoint=None if folder is None else folder / f"class-{c}.npz",
                progress=report,
                **keywords,
            )
        )
        if progress:
            progress("select", number + 1, len(wanted))
    kept: list[tuple[str, int]] = []
    fdg, error = torch.empty(0, dtype=torch.float64), math.nan
    if n_sets and done:
        arms = [("greedy", i) for i in range(n_sets)]
        values = torch.stack([entry.set_fdg for entry in done]).mean(0).tolist()
        if n_random:
            mean = torch.stack([entry.random_fdg for entry in done]).mean(0)
            every_second = mean.argsort(descending=True, stable=True)[::2].tolist()
            arms += [("random", j) for j in every_second]
            values += mean[every_second].tolist()
        positions, error = spread_evenly(values, n_sets)
        kept = [arms[i] for i in positions]
        fdg = torch.tensor([values[i] for i in positions], dtype=torch.float64)
    return Recipe(head, wanted, done, kept, fdg, error)
