"""The arms of one tail class: what the greedy selection, random draws and the uniformly spaced sets take from its pool."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diversity import FeatureStatistics, check_features, feature_diversity_gain
from .greedy import select_subsets
from .kmeans import kmeans_subsets
from .sets import uniform_fdg_sets

# Points of a random arm's FDG path.
_POINTS = 40


class Arm(NamedTuple):
    """One way to complete a class: rows of its pool, and FDG as (samples added, FDG) on the way there."""

    rows: Tensor
    path: list[tuple[int, float]]

    @property
    def fdg(self) -> float:
        """FDG of the class with everything that the arm adds."""
        return self.path[-1][1]


class ClassSets(NamedTuple):
    """What `complete_class` made for one class.

    Attributes:
        label, need: the class, and how many samples it gets; mode: that of its first arm.
        pool: (P, d) its augmented features, cluster after cluster; offsets (K + 1,) says where each begins.
        rows: (need,) rows of the pool that the arm `mode` adds; path: its FDG as (samples added, FDG) on the way.
        random_rows: (repeats, need), random_fdg (repeats,): the random arm; random_path: the first repeat's path.
        set_rows: (n_sets, need), set_fdg (n_sets,), FDG rising and uniformly spaced; spacing_error as in `UniformSets`.
    """

    label: int
    mode: str
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

    @property
    def arms(self) -> dict[str, Arm]:
        """The arm `mode`, and "random-0", "random-1", ...; of the random ones only the first has more than the end of its
        path."""
        arms = {} if self.mode == "random" else {self.mode: Arm(self.rows, self.path)}
        for i, (rows, fdg) in enumerate(zip(self.random_rows, self.random_fdg.tolist())):
            arms[f"random-{i}"] = Arm(rows, self.random_path if i == 0 else [(self.need, fdg)])
        return arms


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
    random_seed: int | None = None,
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
        mode: of the greedy arm, see `parse_mode`; "random" for none: the first random repeat takes its place.
        n_sets: uniformly spaced sets, 0 for none (else at least 2); n_random: repeats of the random arm.
        subset_size, subsets: size of the clusters, or their number (P / subset_size by default).
        balanced, niter, nredo, spherical: of `kmeans_subsets`.
        seed: of the clustering, and of the random arm unless `random_seed` is that.
        checkpoint: file for the runs of the uniform sets.
        centering, alpha, engine, progress: as in `uniform_fdg_sets`.
    """
    z, x = check_features(original, "original"), check_features(pool, "pool")
    try:
        if z.shape[0] < 2:
            raise ValueError("has one sample: its feature diversity gain is undefined")
        if mode == "random" and n_random < 1:
            raise ValueError('mode "random" needs n_random of at least 1')
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
        greedy = None
        if mode != "random":
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

    generator = torch.Generator().manual_seed(seed if random_seed is None else random_seed)
    random_rows = torch.empty(n_random, need, dtype=torch.int64)
    for repeat in random_rows:
        repeat.copy_(torch.randperm(x.shape[0], generator=generator)[:need])
    random_fdg = torch.tensor([gain(x[r.to(x.device)]) for r in random_rows], dtype=torch.float64)
    ends = sorted({-(-need * i // _POINTS) for i in range(1, _POINTS + 1)})
    random_path = [(end, gain(x[random_rows[0, :end].to(x.device)])) for end in ends] if n_random else []
    if greedy is None:
        rows, path = random_rows[0], random_path
    else:
        # The last subset is cut where the class would outgrow the largest one; FDG is that of what is really added.
        added = sizes[greedy.picked].cumsum(0).tolist()
        rows = greedy.indices[:need]
        path = [(n, fdg) for n, fdg in zip(added, greedy.fdg.tolist()) if n < need]
        path.append((need, gain(x[rows.to(x.device)])))
    set_rows = torch.stack([s.indices[:need] for s in sets.selections]) if sets else rows[None, :][:0]
    set_fdg = torch.tensor([gain(x[r.to(x.device)]) for r in set_rows], dtype=torch.float64)
    return ClassSets(
        label,
        mode,
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
