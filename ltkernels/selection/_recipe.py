"""The completion of a tail: from features and pools to sets of augmented samples, for every tail class by one function.

The recipe is that of the FDG paper, sections 4.1 and 4.2, with what it leaves open as arguments: every tail class is brought
to the size of the largest class with samples of its pool, at random (the random arm), by a rule (`mode`), and as a series of
sets whose FDG is uniformly spaced. `run`, `select`, the second stages and the experiment all choose here, so that equal
features, pools and seeds give equal sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import ClassCounts, count_list
from .._ranks import Ranks, together
from ._arms import ClassSets, calibrated, class_seed, complete_class, rows_together


def head_tail_split(class_counts: ClassCounts, head_ratio: float = 0.9) -> tuple[list[int], list[int]]:
    """Labels of the head and of the tail classes, each by descending count (ties by label).

    The head is the shortest run of largest classes that together hold more than `head_ratio` of the samples. Raises
    ValueError where a class is empty.
    """
    counts = count_list(class_counts)
    empty = [label for label, count in enumerate(counts) if count < 1]
    if empty:
        raise ValueError(f"class_counts must be positive; empty: class {', '.join(map(str, empty))}")
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    total, held = sum(counts), 0
    for size, label in enumerate(order, start=1):
        held += counts[label]
        if held > head_ratio * total:
            return order[:size], order[size:]
    return order, []


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
    cost, taken = np.zeros(len(v) + 1), []
    for target in targets:
        with_j = np.append(np.inf, cost[:-1] + np.abs(v - target))
        cost = np.minimum.accumulate(with_j)
        taken.append(with_j <= np.append(np.inf, cost[:-1]))
    chosen, j = [], len(v)
    for row in reversed(taken):
        while not row[j]:
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
    class_counts: ClassCounts,
    *,
    head_ratio: float = 0.9,
    classes: Sequence[int] | None = None,
    m: int | None = None,
    mode: str = "max",
    share: float = 1.0,
    held_out: Mapping[int, Any] | None = None,
    n_sets: int = 50,
    n_random: int = 100,
    pool_factor: float = 4.0,
    subset_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    group: Any = None,
    **keywords: Any,
) -> Recipe | None:
    """Sections 4.1 and 4.2: completes every tail class and keeps n_sets sets whose FDG_Tail is uniformly spaced.

    Half of the random repeats (every second by FDG_Tail) and the n_sets greedy sets (set i of every class together)
    compete; the n_sets nearest to uniform spacing are kept. FDG_Tail is the mean over the tail classes.

    Args:
        originals: features (n_c, d) by label; those of completed classes are read, and with mode "match" those of the head.
        make_pool: called with (label, rows): at least `rows` augmented features for the class.
        class_counts: (C,) training samples of every class, integers: a sequence, a tensor, or a mapping from every class id.
        head_ratio: head classes hold more than this share of the samples; the rest are the tail.
        classes: complete these instead of the whole tail.
        m: subsets to pick per class; by default as many as bring it to the largest class.
        mode: of the single chosen arm that every class also gets, see `arms.parse_mode`. The cap of "match" is calibrated on
            the head classes (`fdg_target`), for each class by its size.
        share: most that synthetic samples may make up of a completed class; the rest are repeats of its real ones.
        held_out: features of head classes that the network was not trained on, by label, for that cap.
        n_sets, n_random: sets wanted (0: none), repeats of the random arm.
        pool_factor: size of a pool in units of what the class needs. The paper's own pool of 5000 is nearly all taken
            on CIFAR-10-LT; 4 and more leaves a choice.
        subset_size, seed, keywords (`compared`, `stratified` too): as in `complete_class`.
        checkpoint: folder for the runs of every class: an interrupted call, made again, repeats only its last round.
        progress: called with (what, done, total).
        group: process group over whose ranks the classes are dealt ("world" is the default one); all ranks give the same
            arguments. The classes are independent, so the result is that of one process.

    Returns:
        The `Recipe`; with `group`, on its rank 0, and None on the others.

    Raises:
        TypeError, ValueError: as the steps; a class that is no tail class, has one sample, or needs nothing. With
            `group`, on every rank.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    ranks = None if group is None else Ranks(group)
    class_counts = count_list(class_counts)
    head, tail = head_tail_split(class_counts, head_ratio)
    largest = max(class_counts)
    size = subset_size or rows_together(mode)
    wanted = [c for c in tail if class_counts[c] < largest] if classes is None else list(classes)
    for c in wanted:
        if not 0 <= c < len(class_counts):
            raise ValueError(f"classes: there is no class {c}; labels are 0 to {len(class_counts) - 1}")
        if class_counts[c] >= largest:
            raise ValueError(f"classes: class {c} has {class_counts[c]} samples, as many as the largest; it needs none")
    folder = None if checkpoint is None else Path(checkpoint)
    mine = wanted if ranks is None else wanted[ranks.rank :: ranks.size]
    done = []
    with together(ranks):
        for number, c in enumerate(mine):
            if class_counts[c] == 1:  # before its arms: what they would report is FDG
                raise ValueError(f"class {c} has one sample: its feature diversity gain is undefined")
            need = min(largest - class_counts[c], max(1, math.floor(share * largest)))
            if m is not None:
                need = min(need, m * size)
            target = None
            if mode == "match":
                heads = {label: originals[label] for label in head}
                options = {name: keywords[name] for name in ("centering", "alpha") if name in keywords}
                target = calibrated(heads, held_out, class_counts[c], need, (seed + c) % 2**64, **options)
            rows = -(-math.ceil(pool_factor * need) // size) * size

            def report(found: int, total: int, number: int = number) -> None:
                if progress:
                    progress("select", number * total + found, len(mine) * total)

            done.append(
                complete_class(
                    c,
                    originals[c],
                    make_pool(c, rows),
                    need,
                    m=m,
                    mode=mode,
                    target=target,
                    n_sets=n_sets,
                    n_random=n_random,
                    subset_size=subset_size,
                    seed=class_seed(seed, c),
                    checkpoint=None if folder is None else folder / f"class-{c}.npz",
                    progress=report,
                    **keywords,
                )
            )
            if progress:
                progress("select", number + 1, len(mine))
    if ranks is not None:
        shares = ranks.collect(done)
        if shares is None:
            return None
        done = [shares[number % ranks.size][number // ranks.size] for number in range(len(wanted))]
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
