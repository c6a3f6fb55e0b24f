"""The arms of one tail class: what each way to choose, and the uniformly spaced sets, take from its pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._features import check_features, original_diversity
from ..diversity import FdgTarget, NoHeadClass, fdg_target, standardized_offset
from ._greedy import Selection, select_subsets
from ._kmeans import Subsets, kmeans_subsets
from ._match import Gain, match_pool
from ._sets import uniform_fdg_sets

# Points of a random arm's FDG path.
_POINTS = 40


class Arm(NamedTuple):
    """One way to complete a class: rows of its pool, and FDG as (samples added, FDG) on the way there."""

    rows: Tensor
    path: list[tuple[int, float]]
    offset: float
    """`standardized_offset` of everything that the arm adds."""

    @property
    def fdg(self) -> float:
        """FDG of the class with everything that the arm adds."""
        return self.path[-1][1]


class ClassSets(NamedTuple):
    """What `complete_class` made for one class.

    Attributes:
        label, need: the class, and how many samples it gets; mode: how they are chosen.
        pool: (P, d) its augmented features.
        arms: by name (see `arm_name`): `mode`, the draws of "random", and those of the modes that were to be compared.
        set_rows: (n_sets, need) rows of the pool; set_fdg (n_sets,), rising and uniformly spaced; spacing_error as in `UniformSets`.
        target: the calibrated FDG that capped "match"; None where nothing did.
        reached, note: whether `mode` got what it aims at, and what it has to say.
    """

    label: int
    mode: str
    need: int
    pool: Tensor
    arms: dict[str, Arm]
    set_rows: Tensor
    set_fdg: Tensor
    spacing_error: float
    target: FdgTarget | None
    reached: bool
    note: str

    @property
    def chosen(self) -> Arm:
        return self.arms[arm_name(self.mode)]

    @property
    def rows(self) -> Tensor:
        return self.chosen.rows

    @property
    def fdg(self) -> float:
        return self.chosen.fdg

    @property
    def random(self) -> list[Arm]:
        return [arm for name, arm in self.arms.items() if name.startswith("random-")]

    @property
    def random_fdg(self) -> Tensor:
        return torch.tensor([arm.fdg for arm in self.random], dtype=torch.float64)


def arm_name(mode: str, number: int = 0) -> str:
    """The name of the arm of a mode's draw: "max", "max-1", ...; "random-0", "random-1", ... of the random one."""
    return f"{mode}-{number}" if number or mode == "random" else mode


def class_seed(seed: int, label: int) -> int:
    """The seed of everything that is chosen for a class, in run, select, experiment and stage 2 alike."""
    return (seed + 7919 * label) % 2**64


def calibrated(
    heads: Mapping[int, Any],
    held_out: Mapping[int, Any] | None,
    count: int,
    added: int,
    seed: int,
    *,
    centering: str = "joint",
    alpha: float = 1.0,
) -> FdgTarget | None:
    """The FDG that real samples bring to a class of `count` (`fdg_target`); None where no head class can tell, or FDG is
    undefined."""
    if count < 2:
        return None
    held = {label: x for label, x in (held_out or {}).items() if label in heads and len(x)}
    try:
        return fdg_target(heads, held, count, added=added, seed=seed, centering=centering, alpha=alpha)
    except NoHeadClass:
        return None


def parse_mode(mode: str) -> dict[str, Any]:
    """A way to choose, as keywords: "random", "mean", "match" or "match:0.1" of `match_pool`; "max", "min", "quantile:0.3",
    "target:0.1" or "target:0.1:0.2" of `select_subsets`."""
    name, *numbers = mode.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [math.nan]
    if name in ("max", "min", "random", "mean", "match") and not values:
        return {"mode": name}
    if name == "match" and len(values) == 1 and math.isfinite(values[0]):
        return {"mode": name, "fdg": values[0]}
    if name == "quantile" and len(values) == 1 and 0.0 <= values[0] <= 1.0:
        return {"mode": name, "q": values[0]}
    if name == "target" and len(values) in (1, 2) and all(map(math.isfinite, values)) and values == sorted(values):
        return {"mode": name, "target": values[0] if len(values) == 1 else (values[0], values[1])}
    raise ValueError(
        f"mode must be max, min, quantile:Q with 0 <= Q <= 1, target:X, target:LOW:HIGH, match, match:X, mean or random, got {mode!r}"
    )


def is_greedy(mode: str) -> bool:
    """Whether a mode picks clusters by FDG."""
    return parse_mode(mode)["mode"] not in ("random", "mean", "match")


def rows_together(mode: str) -> int:
    """Rows that are picked together where nothing else is asked for: the paper's clusters of ten, single rows where FDG has a target."""
    return 1 if mode.partition(":")[0] in ("target", "quantile") else 10


def cut(pool: Any, subset_size: int, seed: int, stratified: bool = False) -> Subsets:
    """The pool in subsets of about `subset_size` rows: clusters, or, `stratified`, a random row from each of `subset_size`
    clusters. Of single rows there is nothing to find."""
    n = pool.shape[0]
    if subset_size == 1:
        return Subsets(torch.arange(n), torch.arange(n + 1), pool, 0.0)
    if not stratified:
        return kmeans_subsets(pool, max(1, -(-n // subset_size)), balanced=True, seed=seed)
    strata = kmeans_subsets(pool, min(subset_size, n), balanced=True, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # Which subset each row of strata.order joins.
    place = torch.cat([torch.randperm(size, generator=generator) for size in strata.offsets.diff().tolist()])
    ends = place.bincount().cumsum(0)
    return strata._replace(order=strata.order[place.argsort(stable=True)], offsets=torch.cat([ends[:1] * 0, ends]))


def choose_rows(
    original: Any,
    pool: Any,
    need: int,
    mode: str,
    *,
    target: FdgTarget | None = None,
    clusters: Subsets | None = None,
    seed: int = 0,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
) -> Selection:
    """`need` rows of a pool by a mode (see `parse_mode`): the one place where run, select, experiment and stage 2 choose.

    `target` is the cap of "match" without a number (None: the mean alone). `clusters` of the pool are needed by max, min,
    quantile and target, which pick them until they hold `need` rows; the last one is cut there. The indices are rows of `pool`.
    """
    parsed = parse_mode(mode)
    name = parsed.pop("mode")
    common = {"centering": centering, "alpha": alpha}
    if name in ("random", "mean", "match"):
        fdg = parsed.get("fdg", target if name == "match" else None)
        mean = None if name == "random" else "original"
        found = match_pool(original, pool, need, fdg=fdg, mean=mean, seed=seed, **common)
        if name == "match" and fdg is None:
            found.stats["note"] = found.stats["note"] or "no head class to calibrate FDG on: only the mean was matched"
        return found
    if clusters is None:
        raise ValueError(f"mode {mode} picks clusters: give them")
    sizes = clusters.offsets.diff()
    # Enough steps even if the smallest subsets are the ones picked; a greedy pick does not depend on how many follow.
    steps = int(torch.searchsorted(sizes.sort().values.cumsum(0), need)) + 1
    order = clusters.order.to(pool.device)
    found = select_subsets(
        original, pool[order], clusters.offsets, m=min(steps, len(sizes)), mode=name, engine=engine, **parsed, **common
    )
    rows = clusters.order[found.indices[:need]]
    return found._replace(indices=rows)


def complete_class(
    label: int,
    original: Any,
    pool: Any,
    need: int,
    *,
    m: int | None = None,
    mode: str = "match",
    target: FdgTarget | None = None,
    n_sets: int = 0,
    n_random: int = 100,
    compared: Sequence[str] = (),
    subset_size: int | None = None,
    stratified: bool = False,
    centering: str = "joint",
    alpha: float = 1.0,
    engine: str = "auto",
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ClassSets:
    """Draws the arms of one tail class from its pool.

    Args:
        label: of the class, for the result and for error messages.
        original: (N, d) features of the class; pool: (P, d) augmented ones, P >= need.
        need: samples to add; the last subset picked is cut there.
        m: subsets of `subset_size` to take instead; need is then at most what they hold.
        mode: see `parse_mode`; target: the cap of "match".
        n_sets: uniformly spaced sets, 0 for none (else at least 2); n_random: draws of the random arm.
        compared: modes of which there are to be as many draws as of the random arm.
        subset_size: size of the clusters (None: `rows_together`); stratified: subsets with a row from each of as many clusters,
            not clumps.
        seed: of the first draw of each arm, the next one of the second: of its clusters, or of the random order that "match" bends.
        checkpoint: file for the runs of the uniform sets.
        centering, alpha, engine, progress: as in `uniform_fdg_sets`.
    """
    z, x = check_features(original, "original"), check_features(pool, "pool")
    keywords: dict[str, Any] = {"centering": centering, "alpha": alpha, "engine": engine}
    sets, clusters = None, None
    greedy = {which: is_greedy(which) for which in (mode, *compared, "random")}
    if z.shape[0] < 2 and (n_sets or any(greedy.values())):
        raise ValueError(f"class {label} has one sample: its feature diversity gain is undefined")
    if mode == "random" and n_random < 1:
        raise ValueError('mode "random" needs n_random of at least 1')
    if stratified and (subset_size or rows_together(mode)) < 2:
        raise ValueError("stratified needs subset_size of at least 2, the number of strata")
    if need < 1 or need > x.shape[0]:
        raise ValueError(f"class {label} needs {need} samples, its pool has {x.shape[0]}")
    gain = Gain(z, centering, alpha)

    def draw(which: str, number: int, clusters: Subsets | None = None) -> tuple[Selection, Arm]:
        start = (seed + number) % 2**64
        if greedy[which] and clusters is None:
            clusters = cut(x, subset_size or rows_together(which), start, stratified)
        found = choose_rows(z, x, need, which, target=target, clusters=clusters, seed=start, **keywords)
        ends: Sequence[int] = ()
        if greedy[which] and clusters:
            ends = clusters.offsets.diff()[found.picked].cumsum(0).tolist()
        elif which == "random" and not number:
            ends = sorted({-(-need * i // _POINTS) for i in range(1, _POINTS)})
        # The last subset is cut where the class would outgrow the largest one; FDG is that of what is really added.
        added = x[found.indices.to(x.device)]
        path = [(end, gain.of(added[:end])) for end in ends if end < need]
        return found, Arm(found.indices, [*path, (need, gain.of(added))], standardized_offset(z, added))

    size, arms = subset_size or rows_together(mode), dict[str, Arm]()
    try:
        if n_sets or greedy[mode]:
            clusters = cut(x, size, seed, stratified)
        sizes = clusters.offsets.diff().sort().values if clusters else torch.full((m or 1,), size)
        if m is not None:
            need = min(need, int(sizes[:m].sum()))
        chosen, arms[arm_name(mode)] = draw(mode, 0, clusters)
        for which in dict.fromkeys(["random", *compared]):
            for number in range(n_random):
                if (name := arm_name(which, number)) not in arms:
                    arms[name] = draw(which, number)[1]
        if z.shape[0] > 1 and any(math.isnan(fdg) for arm in arms.values() for _, fdg in arm.path):
            original_diversity(z, centering, alpha)  # says why, where it is the originals
            raise ValueError("the log-determinants are not finite; scale the features down")
        if clusters and n_sets:
            steps = min(int(torch.searchsorted(sizes.cumsum(0), need)) + 1 if m is None else m, len(sizes))
            pool = x[clusters.order.to(x.device)]
            sets = uniform_fdg_sets(
                z, pool, clusters.offsets, m=steps, n_sets=n_sets, checkpoint=checkpoint, progress=progress, **keywords
            )
    except ValueError as error:
        raise ValueError(f"class {label}: {error}") from None
    set_rows = chosen.indices[None, :][:0]
    if sets and clusters:
        set_rows = torch.stack([clusters.order[found.indices[:need]] for found in sets.selections])
    set_fdg = torch.tensor([gain.of(x[rows.to(x.device)]) for rows in set_rows], dtype=torch.float64)
    error = sets.spacing_error if sets else math.nan
    note = str(chosen.stats.get("note", ""))
    return ClassSets(label, mode, need, x, arms, set_rows, set_fdg, error, target, chosen.reached, note)
