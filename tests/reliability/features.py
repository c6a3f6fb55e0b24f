"""Fuzzing of feature diversity and selection: V and FDG against singular values, picks against a greedy loop that scores every candidate
with the public FDG, clusters against their definition."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside
import numpy as np
import torch
from _draw import DTYPES, Draw, loop, missing, refused
from _part import Part, Tally
from torch import Tensor

from ltkernels import _features, diversity, selection

CENTERINGS = ("joint", "separate", "none")


def diversity_of(rows: Tensor, alpha: float, count: int | None = None) -> float:
    """V in log2 units of rows that are centred already, by their singular values."""
    values = torch.linalg.svdvals(rows.double())
    return float(torch.log1p(alpha / (count or len(rows)) * values.square()).sum()) / (2 * math.log(2))


def gain_of(original: Tensor, extra: Tensor, centering: str, alpha: float) -> float:
    z, x = original.double(), extra.double()
    if centering == "joint":
        both = torch.cat([z, x])
        both = both - both.mean(0)
    elif centering == "separate":
        both = torch.cat([z - z.mean(0), x - x.mean(0)])
    else:
        both = torch.cat([z, x])
    alone = z if centering == "none" else z - z.mean(0)
    return diversity_of(both, alpha) / diversity_of(alone, alpha) - 1


def features(draw: Draw, rows: int, width: int, spread: float = 1.0) -> Tensor:
    """(rows, width), any dtype and layout: ordinary, low rank, shifted, scaled, with duplicates."""
    x = draw.normal(rows, width) * spread
    kind = draw.say("features", draw.choice(["normal", "normal", "low rank", "shifted", "scaled", "duplicates"]))
    if kind == "low rank" and width > 1:
        x[:, width // 2 :] = x[:, :1]
    elif kind == "shifted":
        x += 100.0
    elif kind == "scaled":
        x *= draw.choice([1e-3, 1e3])
    elif kind == "duplicates" and rows > 1:
        x[1::2] = x[: len(x[1::2])].clone()
    x = x.to(draw.choice(DTYPES)) if kind != "scaled" else x
    return draw.layout(x)


def spoiled(draw: Draw, x: Tensor) -> Any:
    """No features."""
    bad = x.double().clone(memory_format=torch.contiguous_format)
    if bad.numel():
        bad.view(-1)[draw.randrange(bad.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf])
    return draw.choice([bad if bad.numel() else x.long(), x.long(), x[:, :0], x[None]])


def close(got: float, wanted: float, scale: float = 1.0) -> None:
    assert abs(got - wanted) <= 1e-8 * (1 + abs(wanted)) * scale, f"{got} is not {wanted}"


def measures(draw: Draw) -> None:
    width, n = draw.size(30), 1 + draw.size(40)
    alpha = draw.say("alpha", draw.choice([1.0, 0.01, 50.0, 3]))
    centering = draw.say("centering", draw.choice(CENTERINGS))
    z, x = features(draw, n, width), draw.normal(draw.size(30, 0.1), width)
    centred = z.double() - z.double().mean(0)
    close(float(diversity.feature_diversity(draw.given(z), alpha=alpha)), diversity_of(centred, alpha))
    alone = z.double() if centering == "none" else centred
    if diversity_of(alone, alpha) < 1e-6:
        return
    gain = diversity.feature_diversity_gain(draw.given(z), draw.given(x), centering=centering, alpha=alpha)
    close(float(gain), gain_of(z, x, centering, alpha) if len(x) else 0.0, 10.0)
    close(
        float(_features.original_diversity(z.double(), centering, float(alpha))),
        diversity_of(alone, alpha) * 2 * math.log(2),
    )
    infimum = diversity.fdg_infimum(z, len(x), alpha, centering=centering)
    assert diversity.fdg_lower_bound(n, len(x)) <= infimum <= float(gain) + 1e-9
    matrix = torch.eye(width, dtype=torch.float64) + centred.T @ centred / n
    close(float(_features.cholesky_log_det(matrix)), float(torch.linalg.slogdet(matrix).logabsdet), 10.0)
    for call in (lambda bad: diversity.feature_diversity(bad), lambda bad: diversity.feature_diversity_gain(z, bad)):
        refused(lambda call=call: call(spoiled(draw, z)))
    refused(lambda: diversity.feature_diversity_gain(z[:1], x))
    refused(lambda: diversity.feature_diversity_gain(z[:1].expand(4, -1), x))
    refused(lambda: diversity.feature_diversity_gain(z, x[:, :1].expand(-1, width + 1)))
    refused(lambda: diversity.feature_diversity(z, alpha=draw.choice([0.0, -1.0, torch.nan, torch.inf, "1", True])))
    refused(lambda: diversity.feature_diversity_gain(z, x, centering=draw.choice(["mean", None, 3])))
    refused(lambda: diversity.fdg_lower_bound(*draw.choice([(0, 1), (1, -1)])))
    refused(lambda: diversity.fdg_infimum(z, -1))


def statistics(draw: Draw) -> None:
    width, n = draw.size(20), 2 + draw.size(60)
    x = features(draw, n, width)
    cuts = sorted(draw.randint(0, n) for _ in range(draw.randint(0, 4)))
    parts = [diversity.FeatureStatistics(width).update(draw.given(part)) for part in torch.tensor_split(x, cuts)]
    draw.shuffle(parts)
    whole = diversity.FeatureStatistics(width)
    for part in parts:
        whole.merge(part)
    assert whole.count == n
    direct = float(diversity.feature_diversity(x))
    close(float(whole.diversity()), direct, 100.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.npz")
        whole.save(path)
        loaded = diversity.FeatureStatistics.load(path)
        assert torch.equal(loaded.scatter, whole.scatter)
        data = bytearray(path.read_bytes())
        for _ in range(3):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data[: draw.randint(0, len(data))]))
        try:
            again = diversity.FeatureStatistics.load(path)
            assert again.count >= 0
        except ValueError as error:
            if str(path) not in str(error):
                raise AssertionError(f"an error that does not name the file: {error}") from error
    kept = (whole.count, whole.mean.clone(), whole.scatter.clone())
    refused(lambda: whole.update(spoiled(draw, x)))
    refused(lambda: whole.update(torch.ones(2, width + 1)))
    refused(lambda: whole.merge(diversity.FeatureStatistics(width + 1)))
    refused(lambda: diversity.FeatureStatistics(draw.choice([0, -1, 2.5, True])))
    assert whole.count == kept[0]
    assert torch.equal(whole.mean, kept[1])
    assert torch.equal(whole.scatter, kept[2])
    labels = draw.integers(0, 4, n)
    values = diversity.class_diversities(draw.given(x), draw.given(labels), num_classes=5)
    for c in range(5):
        own = x[labels == c]
        if len(own):
            close(float(values[c]), float(diversity.feature_diversity(own)), 100.0)
        else:
            assert math.isnan(float(values[c]))
    refused(lambda: diversity.class_diversities(x, draw.choice([labels[1:], labels.double(), labels - 9])))
    refused(lambda: diversity.class_diversities(x, labels, num_classes=0))


def parties(draw: Draw) -> None:
    """Statistics of the classes of two parties, joined by name and through files, are those of all samples."""
    width = draw.say("d", draw.size(10))
    sets = [features(draw, draw.size(40), width) for _ in range(2)]
    labels = [draw.integers(0, 3, len(x)) for x in sets]
    names = (["a", "b", "c"], draw.choice([["a", "b", "c"], ["c", "a", "new"]]))
    made = [
        diversity.ClassStatistics(width, own).update(draw.given(x), draw.given(y))
        for own, x, y in zip(names, sets, labels)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "party.npz"
        made[1].save(path)
        whole = made[0].merge(diversity.ClassStatistics.load(path))
    rows = {
        name: [x[y == own.index(name)] for own, x, y in zip(names, sets, labels) if name in own] for name in whole.names
    }
    for name, count, value in zip(whole.names, whole.counts, whole.diversity().tolist()):
        own = torch.cat(rows[name])
        assert count == len(own)
        if count:
            close(value, float(diversity.feature_diversity(own)), 100.0)
        else:
            assert math.isnan(value)
    refused(
        lambda: whole.update(sets[0], draw.choice([labels[0][1:], labels[0].double(), labels[0] - 9, labels[0] + 9]))
    )
    refused(lambda: whole.merge(diversity.ClassStatistics(width + 1, 2)))
    refused(lambda: diversity.ClassStatistics(width, draw.choice([[], ["a", "a"], [""], 0])))


def representatives(draw: Draw) -> None:
    x = features(draw, 1 + draw.size(40), draw.size(12))
    k = draw.randint(1, len(x))
    found = diversity.select_representatives(draw.given(x), k)
    assert len(set(found.indices.tolist())) == k, "a row was picked twice"
    centred = x.double() - x.double().mean(0)
    close(float(found.diversity[-1]), diversity_of(centred[found.indices], 1.0, k), 100.0)
    refused(lambda: diversity.select_representatives(x, draw.choice([0, len(x) + 1, 1.5, True])))


def pool_of(draw: Draw) -> tuple[Tensor, Tensor, list[int]]:
    """(original, candidates, offsets)"""
    width = draw.say("d", draw.size(24))
    n = draw.say("N", 2 + draw.size(30))
    sizes = [draw.randint(1, 4) for _ in range(draw.size(14))]
    if draw.chance(0.5):
        sizes = [draw.randint(1, 6)] * len(sizes)
    draw.say("sizes", sizes)
    z = draw.layout(draw.normal(n, width))
    x = features(draw, sum(sizes), width, draw.choice([0.1, 1.0, 4.0]))
    return z, x, [0, *np.cumsum(sizes).tolist()]


def subsets(draw: Draw) -> None:
    z, x, offsets = pool_of(draw)
    centering, alpha = draw.choice(CENTERINGS), draw.choice([1.0, 0.1, 20.0])
    gains = selection.subset_gains(
        draw.given(z), draw.given(x), draw.given(torch.tensor(offsets)), centering=centering, alpha=alpha
    )
    for c, gain in enumerate(gains.tolist()):
        close(gain, gain_of(z, x[offsets[c] : offsets[c + 1]], centering, alpha), 100.0)
    for bad in ([], [0], [0, 0, len(x)], [1, len(x)], [0, len(x) + 1], [0.0, float(len(x))], [len(x), 0]):
        refused(lambda bad=bad: selection.subset_gains(z, x, bad))
    refused(lambda: selection.subset_gains(z, spoiled(draw, x), offsets))


def targets(draw: Draw) -> None:
    """The offset by its definition; a target that lies between the draws it is the mean of."""
    width, n, more = draw.size(10), 2 + draw.size(20), 1 + draw.size(20)
    z, x = draw.normal(n, width), draw.normal(more, width)
    error = math.sqrt(float((z.double() - z.double().mean(0)).square().sum())) / n
    if error > 0.0:
        length = float((x.double().mean(0) - z.double().mean(0)).norm())
        close(diversity.standardized_offset(draw.given(z), draw.given(x)), length / error, 1e4)
    assert diversity.FAR > 0
    heads = {label: draw.normal(30 + draw.size(10), width) for label in "ab"}
    small = draw.randint(2, 9)
    seed = draw.any_seed()
    found = diversity.fdg_target(
        {label: draw.given(head) for label, head in heads.items()}, None, small, repeats=3, seed=seed
    )
    assert isinstance(found, diversity.FdgTarget)
    assert math.isfinite(found.value)
    assert found == diversity.fdg_target(heads, None, small, repeats=3, seed=seed)
    refused(lambda: diversity.standardized_offset(z, x[:0]))
    refused(lambda: diversity.standardized_offset(spoiled(draw, z), x))
    refused(lambda: diversity.fdg_target(heads, None, draw.choice([1, 0, 2.5, 10_000])))
    assert issubclass(diversity.NoHeadClass, ValueError)
    refused(lambda: diversity.fdg_target(heads, {"c": x}, 2))


DIVERSITY: dict[Callable[[Draw], None], set[str]] = {
    measures: {"feature_diversity", "feature_diversity_gain", "fdg_lower_bound", "fdg_infimum"},
    statistics: {"FeatureStatistics", "class_diversities"},
    parties: {"ClassStatistics"},
    representatives: {"select_representatives"},
    targets: {"FAR", "FdgTarget", "NoHeadClass", "fdg_target", "standardized_offset"},
}  # fmt: skip


def diversities(seed: int, cases: int) -> Tally:
    missing(set(diversity.__all__), set().union(*DIVERSITY.values()))
    checks = list(DIVERSITY)
    return loop(seed, cases, lambda draw: checks[draw.case % len(checks)](draw))


# ---- selection -------------------------------------------------------------------------------------------------------


def rule_of(draw: Draw) -> dict[str, Any]:
    mode = draw.choice(["max", "min", "quantile", "target"])
    rule: dict[str, Any] = {"mode": mode}
    if mode == "quantile":
        rule["q"] = draw.choice([0.0, 0.3, 0.5, 1.0])
    if mode == "target":
        rule["target"] = draw.choice([0.05, 0.5, (0.1, 0.2), -0.5, 100.0])
    return draw.say("rule", rule)


def check_selection(
    found: Any, z: Tensor, x: Tensor, offsets: list[int], centering: str, alpha: float, rule: dict[str, Any]
) -> None:
    """Picks are distinct, FDG is that of what was picked, and every step took what its rule says, ties within rounding aside."""
    picked = found.picked.tolist()
    assert len(set(picked)) == len(picked), f"a subset was picked twice: {picked}"
    rows = [row for c in picked for row in range(offsets[c], offsets[c + 1])]
    assert found.indices.tolist() == rows
    base, left, grown = z.double(), set(range(len(offsets) - 1)), x.double()
    have: list[Tensor] = []
    for step, c in enumerate(picked):
        values = {}
        for other in left:
            extra = grown[offsets[other] : offsets[other + 1]]
            values[other] = stepwise_gain(base, [*have, extra], centering, alpha)
        close(float(found.fdg[step]), values[c], 1e3)
        slack = 1e-7 * (1 + abs(values[c]))
        ranked = sorted(values.values())
        if rule["mode"] in ("max", "min"):
            best = ranked[-1] if rule["mode"] == "max" else ranked[0]
            assert abs(values[c] - best) <= slack, f"step {step} took {values[c]}, the best is {best}"
        elif rule["mode"] == "quantile":
            wanted = ranked[math.floor(rule["q"] * (len(ranked) - 1) + 0.5)]
            assert abs(values[c] - wanted) <= slack, f"step {step} took {values[c]}, the quantile is {wanted}"
        else:
            low, high = rule["target"] if isinstance(rule["target"], tuple) else (rule["target"], rule["target"])
            off = lambda value: max(0.0, low - value, value - high)  # noqa: B023, E731
            assert off(values[c]) <= min(map(off, ranked)) + slack
        have.append(grown[offsets[c] : offsets[c + 1]])
        left.remove(c)


def stepwise_gain(base: Tensor, extra: list[Tensor], centering: str, alpha: float) -> float:
    """FDG after several steps; "separate" centres what was added as one set."""
    return gain_of(base, torch.cat(extra), centering, alpha)


def one_selection(draw: Draw) -> None:
    z, x, offsets = pool_of(draw)
    centering, alpha = draw.say("centering", draw.choice(CENTERINGS)), draw.choice([1.0, 0.1, 20.0])
    rule, m = rule_of(draw), draw.say("m", draw.randint(1, min(6, len(offsets) - 1)))
    common = {"m": m, "centering": centering, "alpha": alpha}
    found = selection.select_subsets(draw.given(z), draw.given(x), draw.given(torch.tensor(offsets)), **common, **rule)
    assert len(found.picked) == m
    check_selection(found, z, x, offsets, centering, alpha, rule)
    engine = draw.say("engine", draw.choice(["full", "lazy"]))
    other = selection.select_subsets(z, x, offsets, **common, **rule, engine=engine)
    torch.testing.assert_close(other.fdg, found.fdg, rtol=1e-6, atol=1e-7)
    for bad in (
        {"m": 0},
        {"m": len(offsets)},
        {"m": 1.5},
        {"mode": "best"},
        {"mode": "max", "q": 0.5},
        {"engine": "D"},
        {"alpha": 0},
    ):
        refused(lambda bad=bad: selection.select_subsets(z, x, offsets, **{**common, **bad}))
    refused(lambda: selection.select_subsets(z, spoiled(draw, x), offsets, m=m))
    refused(
        lambda: selection.select_subsets(
            z, x, offsets, m=m, mode="quantile", q=draw.choice([-0.1, 1.1, None, torch.nan])
        )
    )
    refused(lambda: selection.select_subsets(z, x, offsets, m=m, memory_budget=1))


def batched(draw: Draw) -> None:
    pools = [pool_of(draw) for _ in range(draw.randint(1, 3))]
    rules = [rule_of(draw) for _ in pools]
    m = [draw.randint(1, min(4, len(pool[2]) - 1)) for pool in pools]
    lists = {name: [rule.get(name) for rule in rules] for name in ("mode", "q", "target")}
    parts = [list(part) for part in zip(*pools, strict=True)]
    found = selection.select_subsets_batched(*parts, m=m, **lists)
    for (z, x, offsets), rule, steps, one in zip(pools, rules, m, found, strict=True):
        alone = selection.select_subsets(z, x, offsets, m=steps, **rule)
        assert torch.equal(alone.picked, one.picked)
        assert torch.equal(alone.fdg, one.fdg)
    refused(lambda: selection.select_subsets_batched(*parts, m=[*m, 1]))


def clusters(draw: Draw) -> None:
    n, width = draw.size(150), draw.size(12)
    x = features(draw, n, width)
    k, balanced, spherical = draw.randint(1, n), draw.chance(0.5), draw.chance(0.3)
    draw.say("n, k, balanced, spherical", (n, k, balanced, spherical))
    options = {"balanced": balanced, "spherical": spherical, "seed": draw.any_seed(), "niter": 3}
    try:
        found = selection.kmeans_subsets(draw.given(x), k, **options)
    except ImportError:
        return
    assert sorted(found.order.tolist()) == list(range(n)), "a row is missing or comes twice"
    sizes = found.offsets.diff()
    assert found.offsets[0] == 0
    assert found.offsets[-1] == n
    assert bool((sizes > 0).all())
    assert not balanced or int(sizes.max() - sizes.min()) <= 1, f"sizes {sizes.tolist()} are not balanced"
    for c in range(k):
        rows = found.order[found.offsets[c] : found.offsets[c + 1]]
        assert rows.tolist() == sorted(rows.tolist())
        if not spherical:
            mean = x[rows].double().mean(0)
            assert bool(((found.centroids[c].double() - mean).abs() <= 1e-5 * (1 + mean.abs())).all())
    assert torch.equal(found.order, selection.kmeans_subsets(x, k, **options).order)
    refused(lambda: selection.kmeans_subsets(x, draw.choice([0, -1, n + 1, 1.5, True])))
    refused(lambda: selection.kmeans_subsets(spoiled(draw, x), 1))
    refused(
        lambda: selection.kmeans_subsets(
            x,
            k,
            **draw.choice(
                [{"seed": -1}, {"seed": 2**64}, {"niter": 0}, {"niter": 2**31}, {"device": "gpu"}, {"float16": True}]
            ),
        )
    )


def uniform_sets(draw: Draw) -> None:
    z, x, offsets = pool_of(draw)
    m, n_sets = draw.randint(1, min(3, len(offsets) - 1)), draw.randint(2, 4)
    found = selection.uniform_fdg_sets(z, x, offsets, m=m, n_sets=n_sets, max_runs_per_set=3)
    assert len(found.selections) == n_sets
    assert bool((found.fdg.diff() >= -1e-9).all()), f"FDG does not rise: {found.fdg}"
    for one in found.selections:
        assert len(set(one.picked.tolist())) == m
        close(float(one.fdg[-1]), gain_of(z, x[one.indices], "joint", 1.0), 1e3)
    refused(lambda: selection.uniform_fdg_sets(z, x, offsets, m=m, n_sets=draw.choice([1, 0, 2.5])))
    refused(lambda: selection.uniform_fdg_sets(z, x, offsets, m=m, tol=0.0))


def recipe(draw: Draw) -> None:
    width = draw.size(8)
    counts = [40, draw.randint(5, 30), draw.randint(2, 4), 2]
    head, tail = selection.head_tail_split(counts, 0.5)
    assert sorted(head + tail) == [0, 1, 2, 3]
    assert sum(counts[c] for c in head) > 0.5 * sum(counts)
    originals = {c: draw.normal(counts[c], width) for c in tail}
    try:
        found = selection.fdg_recipe(
            originals,
            lambda c, rows: draw.normal(rows, width),
            counts,
            head_ratio=0.5,
            classes=tail[-1:],
            n_sets=2,
            n_random=2,
            seed=3,
        )
    except ImportError:
        return
    (entry,) = found.classes
    assert len(set(entry.rows.tolist())) == entry.need == 40 - counts[entry.label]
    close(entry.fdg, gain_of(originals[entry.label], entry.pool[entry.rows], "joint", 1.0), 1e3)
    refused(lambda: selection.head_tail_split([3, 0, 1]))
    refused(lambda: selection.fdg_recipe(originals, lambda c, rows: None, counts, classes=[9]))
    refused(lambda: selection.fdg_recipe(originals, lambda c, rows: None, counts, classes=[0]))


def matched(draw: Draw) -> None:
    """Different rows, the same for a seed; nothing asked for is the random draw; what is reported is what was chosen."""
    width, n = draw.size(8), 2 + draw.size(20)
    z, pool = draw.normal(n, width), draw.normal(20 + draw.size(60), width)
    take = draw.randint(1, 20)
    options = draw.say("options", draw.choice([{}, {"fdg": 0.3}, {"mean": None, "fdg": 0.2}, {"mean": None}]))
    seed = draw.any_seed()
    found = selection.match_pool(draw.given(z), draw.given(pool), take, seed=seed, **options)
    rows = found.indices.tolist()
    assert len(set(rows)) == take
    assert rows == selection.match_pool(z, pool, take, seed=seed, **options).indices.tolist()
    close(float(found.fdg[-1]), gain_of(z, pool[found.indices], "joint", 1.0), 1e3)
    close(found.offset, diversity.standardized_offset(z, pool[found.indices]), 1e4)
    if options == {"mean": None}:
        drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:take]
        assert sorted(rows) == sorted(drawn.tolist())
    refused(lambda: selection.match_pool(z, pool, draw.choice([0, -1, 1.5, True, len(pool) + 1])))
    refused(lambda: selection.match_pool(z, spoiled(draw, pool), 1))
    refused(
        lambda: selection.match_pool(z, pool, 1, **draw.choice([{"fdg": "max"}, {"mean": "pool"}, {"fdg": "auto"}]))
    )


SELECTION: dict[Callable[[Draw], None], set[str]] = {
    one_selection: {"select_subsets", "Selection"},
    clusters: {"kmeans_subsets", "Subsets"},
    batched: {"select_subsets_batched"},
    uniform_sets: {"uniform_fdg_sets", "UniformSets"},
    matched: {"match_pool"},
    beside.k_dpp: {"sample_k_dpp", "k_dpp_log_probability"},
    subsets: {"subset_gains"},
    recipe: {"fdg_recipe", "head_tail_split", "ClassSets", "Recipe"},
}


def selections(seed: int, cases: int) -> Tally:
    missing(set(selection.__all__), set().union(*SELECTION.values()))
    checks = [*SELECTION, one_selection, clusters, batched, one_selection, clusters]
    return loop(seed, cases, lambda draw: checks[draw.case % len(checks)](draw))


PARTS = (
    Part(
        "diversity",
        "V, FDG, statistics and representatives against singular values, bad features refused",
        150,
        diversities,
    ),
    Part(
        "selection",
        "picks against a greedy loop over the public FDG, engines agree, clusters by their definition",
        70,
        selections,
    ),
)
