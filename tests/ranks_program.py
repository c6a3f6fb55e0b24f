"""Run by test_ranks.py in four processes: arguments rank, number of processes, folder with the rendezvous file."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ltkernels as ltk
from ltkernels._ranks import Ranks
from ltkernels.diversity import (
    ClassStatistics,
    FdgTarget,
    FeatureStatistics,
    _stream,
    feature_diversity_gain,
    standardized_offset,
)
from ltkernels.selection import _match, match_pool, select_subsets

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
passed = 0
_stream.BLOCK = 40  # scatters travel one to four rows at a time


def rows(seed, n, d, offset=2.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)) + offset)


# ---------------------------------------------------------------------------------------------------------- statistics

N, WIDTH, CLASSES = 240, 9, 7
X = rows(0, N, WIDTH, 30.0)
Y = torch.from_numpy(np.random.default_rng(1).choice(CLASSES, N, p=[0.5, 0.2, 0.1, 0.1, 0.07, 0.03, 0.0]))
# Where the rows of each rank end; the second of three ranks and the last of four have none.
ROWS = {1: [0, N], 2: [0, 31, N], 3: [0, 100, 100, N], 4: [0, 7, 100, N, N]}


def statistics(size, group):
    begin, end = ROWS[size][rank : rank + 2]
    x, y = X[begin:end], Y[begin:end]
    merged = FeatureStatistics(WIDTH).update(x).all_reduce(group)
    # Exactly the merges of one process in the order of the ranks, whatever the blocks.
    want = FeatureStatistics(WIDTH)
    for a, b in itertools.pairwise(ROWS[size]):
        want.merge(FeatureStatistics(WIDTH).update(X[a:b]))
    assert merged.count == N
    assert torch.equal(merged.mean, want.mean)
    assert torch.equal(merged.scatter, want.scatter)
    assert float(merged.diversity()) == pytest.approx(float(ltk.diversity.feature_diversity(X)), rel=1e-11)
    direct = ltk.diversity.class_diversities(X, Y, num_classes=CLASSES, alpha=1.5)
    # A class that nobody has; classes that one rank alone has; the number of classes found or given.
    got = ltk.diversity.class_diversities(x, y, num_classes=CLASSES, alpha=1.5, group=group)
    torch.testing.assert_close(got, direct, rtol=1e-10, atol=1e-12, equal_nan=True)
    found = ltk.diversity.class_diversities(x, y, alpha=1.5, group=group)
    assert torch.equal(found, got[: int(Y.max()) + 1])
    streamed = ClassStatistics(WIDTH, CLASSES)
    for xs, ys in zip(x.split(11), y.split(11)):
        streamed.update(xs, ys)
    streamed.all_reduce(group)
    assert streamed.counts == torch.bincount(Y, minlength=CLASSES).tolist()
    torch.testing.assert_close(streamed.diversity(alpha=1.5), direct, rtol=1e-10, atol=1e-12, equal_nan=True)


def bad_statistics(size, group):
    with pytest.raises(ValueError, match=f"disagree on the number of features: 3 to {3 + size - 1}"):
        FeatureStatistics(3 + rank).all_reduce(group)
    with pytest.raises(ValueError, match="class names: those of rank 1"):
        ClassStatistics(3, ["a", "b" if rank != 1 else "c"]).all_reduce(group)
    bad = X[:4].clone()
    bad[2, 0] = math.nan if rank == 1 else 0.0
    with pytest.raises(ValueError, match="holds NaN or infinity, first in row 2"):
        ltk.diversity.class_diversities(bad, Y[:4], group=group)
    with pytest.raises(TypeError, match="labels must be integers"):
        ltk.diversity.class_diversities(X[:4], Y[:4].double() if rank == 0 else Y[:4], group=group)
    with pytest.raises(ValueError, match="disagree on num_classes"):
        ltk.diversity.class_diversities(X[:4], Y[:4], num_classes=CLASSES + rank, group=group)
    with pytest.raises(ValueError, match="disagree on the number of features: 5 to 9"):
        ltk.diversity.class_diversities(X[:4, : 5 if rank else 9], Y[:4], group=group)


# ----------------------------------------------------------------------------------------------------------- selection

SUBSETS = 29
# Which rank holds which subsets: uneven, one rank with a single one, one rank with none.
SHARES = {1: [0, 29], 2: [0, 3, 29], 3: [0, 14, 14, 29], 4: [0, 12, 13, 29, 29]}
MODES = (
    {"mode": "max"},
    {"mode": "min"},
    {"mode": "quantile", "q": 0.3},
    {"mode": "target", "target": 0.4},
    {"mode": "target", "target": (0.1, 0.12), "tol": 0.02},
)


def pool(ragged, width, seed=5):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 7, SUBSETS) if ragged else np.full(SUBSETS, 4)
    offsets = torch.tensor([0, *np.cumsum(sizes).tolist()])
    scale = np.repeat(generator.uniform(0.3, 2.0, SUBSETS), sizes)[:, None]
    return torch.from_numpy(generator.normal(size=(int(offsets[-1]), width)) * scale + 1.0), offsets


def share(size, candidates, offsets, at=None):
    begin, end = (at or SHARES[size])[rank : rank + 2]
    bounds = offsets[begin : end + 1]
    return candidates[bounds[0] : bounds[-1]], bounds - bounds[0]


def same(got, want):
    assert got.picked.tolist() == want.picked.tolist()
    assert got.indices.tolist() == want.indices.tolist()
    torch.testing.assert_close(got.fdg, want.fdg, rtol=1e-9, atol=1e-11)
    for name in ("target", "reached", "stopped_early", "steps", "diversity"):
        assert got.stats.get(name) == want.stats.get(name), name


def selection(size, group):
    for engine, ragged, width, centering, m in (
        ("auto", False, 6, "joint", SUBSETS),
        ("lazy", True, 6, "separate", SUBSETS),
        ("full", True, 40, "joint", 7),
        ("full", False, 6, "joint", 7),
        ("lazy", False, 6, "none", 7),
    ):
        candidates, offsets = pool(ragged, width)
        original = rows(7, 220, width)[: 220 if width == 6 else 12]
        for keywords in MODES:
            want = select_subsets(original, candidates, offsets, m=m, centering=centering, **keywords)
            own = share(size, candidates, offsets)
            got = select_subsets(original, *own, m=m, centering=centering, engine=engine, group=group, **keywords)
            same(got, want)
            assert got.stats["shares"] == np.diff(SHARES[size]).tolist()
            assert got.stats["form"] == "ranks"
            assert got.stats["engine"] in ("none", "full" if engine == "auto" else engine)


def ties(size, group):
    # The same subset many times over, spread over all ranks: the lowest index of all, always.
    candidates, offsets = pool(False, 5)
    candidates = candidates[:8].repeat(8, 1)[: 4 * 15]
    offsets = torch.arange(0, 61, 4)
    at = [0, *(15 * (r + 1) // size for r in range(size))]
    for keywords in MODES[:3]:
        want = select_subsets(rows(7, 30, 5), candidates, offsets, m=15, **keywords)
        got = select_subsets(rows(7, 30, 5), *share(size, candidates, offsets, at), m=15, group=group, **keywords)
        assert got.picked.tolist() == want.picked.tolist()
    assert select_subsets(rows(7, 30, 5), *share(size, candidates, offsets, at), m=4, group=group).picked[
        :2
    ].diff().tolist() in ([2], [-2], [1], [-1])


def checkpoints(size, group):
    candidates, offsets = pool(True, 6)
    own = share(size, candidates, offsets)
    path = folder / f"steps-{size}.npz" if rank == 0 else Path("of-no-rank-but-the-first.npz")
    whole = select_subsets(rows(7, 40, 6), *own, m=20, group=group)
    select_subsets(rows(7, 40, 6), *own, m=9, group=group, checkpoint=path)
    for m in (9, 20, 4):
        got = select_subsets(rows(7, 40, 6), *own, m=m, group=group, checkpoint=path)
        assert got.picked.tolist() == whole.picked[:m].tolist()
        assert torch.equal(got.fdg, whole.fdg[:m])
        # Only steps that were not there are made.
        assert m == 20 or got.stats["evaluations"] == 0
    with pytest.raises(ValueError, match="belongs to another selection"):
        select_subsets(rows(7, 40, 6), *own, m=9, mode="min", group=group, checkpoint=path)


def bad_selections(size, group):
    candidates, offsets = pool(True, 6)
    original, own = rows(7, 40, 6), share(size, candidates, offsets)
    last = rank == size - 1

    def call(original=original, own=own, m=3, **keywords):
        return select_subsets(original, *own, m=m, group=group, **keywords)

    nan = original.clone()
    nan[1, 1] = math.nan
    elsewhere = "" if last else rf"rank {size - 1}: "
    with pytest.raises(ValueError, match=f"{elsewhere}original holds NaN or infinity, first in row 1"):
        call(nan if last else original)
    with pytest.raises(ValueError, match=f"{elsewhere}candidates has 5 features per sample, original has 6"):
        call(own=(rows(1, 4, 5), [0, 4]) if last else own)
    with pytest.raises(ValueError, match=f"{elsewhere}candidates must have shape"):
        call(own=(rows(1, 4, 6)[0], [0, 4]) if last else own)
    with pytest.raises(ValueError, match=f"{elsewhere}offsets must end at the 4 rows"):
        call(own=(rows(1, 4, 6), [0, 3]) if last else own)
    with pytest.raises(TypeError, match=f"{elsewhere}candidates must be float16"):
        call(own=(rows(1, 4, 6).long(), [0, 4]) if last else own)
    with pytest.raises(ValueError, match=f"{elsewhere}memory_budget = 1 bytes"):
        call(own=(rows(1, 4, 6), [0, 4]) if last else own, m=1, memory_budget=1 if last else None)
    with pytest.raises(ValueError, match="unknown engine 'D'"):
        call(engine="D")
    with pytest.raises(ValueError, match="m = 30 subsets are wanted, but the pool has 29"):
        call(m=30)
    with pytest.raises(ValueError, match="empty on every rank"):
        call(own=(candidates[:0], [0]))
    with pytest.raises(ValueError, match="not finite; scale the features down"):
        call(own=(torch.full((2, 6), 1e160, dtype=torch.float64), [0, 2]) if last else own, m=1)
    if size > 1:
        with pytest.raises(ValueError, match=f"original differs between rank 0 and rank {size - 1}"):
            call(original + last)
        with pytest.raises(ValueError, match="arguments differ: rank 0 has .*'m': 3.*'m': 4"):
            call(m=4 if last else 3)


def match(size, group):
    original, whole = rows(3, 30, WIDTH, 0.0), 1.3 * rows(4, N, WIDTH, 0.3)
    begin, end = ROWS[size][rank : rank + 2]
    cap = FdgTarget(0.2, 0.0, {}, [])
    sizes = _match._WHOLE, _match._BLOCK, _match._PART
    for small in (False, True):
        if small:  # blocks of six rows, and derivatives from a part of the pool
            _match._WHOLE, _match._BLOCK, _match._PART = 0, 6 * WIDTH, 100
        for keywords in ({}, {"fdg": 0.2}, {"fdg": cap}, {"fdg": 0.3, "mean": None}, {"mean": None}):
            # Of a long search rounding may decide between sets that are as good: the first steps are those of one process.
            for n, steps in ((60, 4), (N, 4), (60, 60)):
                want = match_pool(original, whole, n, seed=n, steps=steps, **keywords)
                got = match_pool(original, whole[begin:end], n, seed=n, steps=steps, group=group, **keywords)
                if steps == 4:
                    assert got.indices.tolist() == want.indices.tolist(), (small, keywords, n)
                    torch.testing.assert_close(got.fdg, want.fdg, rtol=1e-9, atol=1e-11)
                    assert got.offset == pytest.approx(want.offset, rel=1e-9, abs=1e-11)
                    assert (got.reached, got.stats["steps"]) == (want.reached, want.stats["steps"])
                elif "mean" not in keywords:
                    assert got.offset < 0.5
                    assert abs(got.stats.get("error", 0.0)) < 0.05
                assert Ranks(group).share(got.indices.tolist()) == [got.indices.tolist()] * size
                added = whole[got.indices]
                assert got.offset == pytest.approx(standardized_offset(original, added), rel=1e-9)
                assert float(got.fdg[0]) == pytest.approx(float(feature_diversity_gain(original, added)), rel=1e-9)
    _match._WHOLE, _match._BLOCK, _match._PART = sizes
    bad, last = whole[begin:end].clone(), rank == size - 1
    with pytest.raises(ValueError, match=f"{'' if last else f'rank {size - 1}: '}pool has 5 features per sample"):
        match_pool(original, bad[:, : 5 if last else WIDTH], 9, group=group)
    with pytest.raises(ValueError, match=f"n must be between 1 and the {N} rows of pool, got {N + 1}"):
        match_pool(original, bad, N + 1, group=group)
    if size > 1:
        with pytest.raises(ValueError, match=f"original differs between rank 0 and rank {size - 1}"):
            match_pool(original + last, bad, 9, group=group)
        with pytest.raises(ValueError, match="arguments differ: rank 0 has .9,.*has .10,"):
            match_pool(original, bad, 10 if last else 9, group=group)


def failing_engine(size, group):
    # What one rank cannot survive, the others learn of.
    from ltkernels.selection._engines.steps import StepEngine

    for method in ("judge", "join"):
        whole = getattr(StepEngine, method)

        def broken(self, argument, whole=whole):
            if len(self.free) - self.left > 1 and rank == 0:
                raise MemoryError("no room")
            return whole(self, argument)

        setattr(StepEngine, method, broken)
        try:
            error, words = (MemoryError, "no room") if rank == 0 else (RuntimeError, r"rank 0 failed in step \d+")
            with pytest.raises(error, match=words):
                select_subsets(rows(7, 40, 6), rows(1, 40, 6, 0.0), range(0, 41, 2), m=19 * size, group=group)
        finally:
            setattr(StepEngine, method, whole)


for size in range(1, world + 1):
    if rank < size:
        for check in (statistics, bad_statistics, selection, ties, checkpoints, bad_selections, match, failing_engine):
            if check is bad_statistics and size == 1:
                continue
            try:
                check(size, groups[size])
            except Exception as error:
                raise AssertionError(f"{check.__name__} in {size} processes") from error
            passed += 1
outsider = dist.new_group([0])
if rank:
    with pytest.raises(ValueError, match="not in group"):
        FeatureStatistics(2).all_reduce(outsider)
assert FeatureStatistics(1).update(torch.ones(rank, 1)).all_reduce("world").count == world * (world - 1) // 2
dist.barrier()
dist.destroy_process_group()
print("passed", passed)
