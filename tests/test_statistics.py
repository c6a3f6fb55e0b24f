"""Streamed statistics against the direct measures; classes at once; representatives."""

from __future__ import annotations

import itertools
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import ltkernels as ltk

FeatureStatistics = ltk.diversity.FeatureStatistics
CENTERINGS = ("joint", "separate", "none")


def rows(seed: int, n: int, d: int, offset: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)) + offset)


def test_by_hand() -> None:
    # {-1, 1} then {3}: mean 1, squares 4 + 0 + 4.
    s = FeatureStatistics(1).update(torch.tensor([[-1.0], [1.0]])).update(torch.tensor([[3.0]]))
    assert (s.count, float(s.mean), float(s.scatter)) == (3, 1.0, 8.0)
    assert float(s.diversity()) == pytest.approx(0.5 * math.log2(1 + 8 / 3), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_streamed_equals_direct(dtype: torch.dtype, offset: float) -> None:
    if dtype == torch.float16 and offset > 1e3:
        offset = 500.0
    x = rows(1, 3000, 24, offset).to(dtype)
    streamed = FeatureStatistics(24)
    for part in x.split(171):
        assert streamed.update(part) is streamed
    direct = float(ltk.diversity.feature_diversity(x))
    assert float(streamed.diversity()) == pytest.approx(direct, rel=1e-9)
    # Any order and tree of merges.
    parts = [FeatureStatistics(24).update(p) for p in x.split(500)]
    while len(parts) > 1:
        parts = [parts[-1].merge(parts[0]), *parts[1:-1]]
    assert float(parts[0].diversity()) == pytest.approx(direct, rel=1e-9)


def test_a_large_batch_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltkernels.diversity._stream.BLOCK", 1000)
    x = rows(2, 777, 10)
    s = FeatureStatistics(10).update(x)
    assert s.count == 777
    torch.testing.assert_close(s.mean, x.mean(0))
    torch.testing.assert_close(s.scatter, (x - x.mean(0)).T @ (x - x.mean(0)))


@pytest.mark.parametrize("centering", CENTERINGS)
def test_gain_equals_direct(centering: str) -> None:
    z, x = rows(3, 40, 7), rows(4, 25, 7, 2.0)
    want = float(ltk.diversity.feature_diversity_gain(z, x, centering=centering, alpha=1.5))
    original, added = FeatureStatistics(7).update(z), FeatureStatistics(7).update(x)
    assert float(original.gain(added, centering=centering, alpha=1.5)) == pytest.approx(want, rel=1e-10)
    assert original.count == 40
    assert float(original.gain(FeatureStatistics(7), centering=centering)) == pytest.approx(0.0, abs=1e-12)


def test_save_and_load(tmp_path: pathlib.Path) -> None:
    s = FeatureStatistics(5).update(rows(5, 30, 5))
    s.save(tmp_path / "s.npz")
    back = FeatureStatistics.load(tmp_path / "s.npz")
    assert back.count == 30
    assert torch.equal(back.mean, s.mean)
    assert torch.equal(back.scatter, s.scatter)
    assert float(back.update(rows(6, 4, 5)).diversity()) == float(s.update(rows(6, 4, 5)).diversity())
    (tmp_path / "bad.npz").write_bytes(b"PK nonsense")
    np.savez(tmp_path / "odd.npz", count=3, mean=np.zeros(3), scatter=np.zeros((2, 2)))
    np.savez(tmp_path / "pickled.npz", count=3, mean=np.array([{}], dtype=object), scatter=np.zeros((1, 1)))
    for name in ("bad", "odd", "pickled"):
        with pytest.raises(ValueError, match=rf"{name}\.npz"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "none.npz")


def test_bad_batches_change_nothing() -> None:
    s = FeatureStatistics(3).update(rows(7, 5, 3))
    bad = rows(8, 6, 3)
    bad[4, 1] = math.nan
    for batch, error, words in (
        (bad, ValueError, "batch holds NaN or infinity, first in row 4"),
        (rows(8, 6, 2), ValueError, "batch has 2 features per sample, the statistics have 3"),
        (rows(8, 6, 3)[0], ValueError, "batch must have shape"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "batch must be float16"),
    ):
        with pytest.raises(error, match=words):
            s.update(batch)
    assert s.count == 5
    assert s.update(rows(8, 0, 3)).count == 5
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="no samples were seen"):
        FeatureStatistics(3).diversity()
    with pytest.raises(ValueError, match="N = 1"):
        FeatureStatistics(3).update(rows(9, 1, 3)).gain(s)
    with pytest.raises(ValueError, match="zero diversity"):
        FeatureStatistics(3).update(torch.ones(4, 3)).gain(s)
    with pytest.raises(ValueError, match="other has 4 features"):
        s.merge(FeatureStatistics(4))


RANK = """
import sys, torch, torch.distributed as dist
import ltkernels as ltk
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = torch.load(f"{folder}/x.pt", weights_only=True)
s = ltk.diversity.FeatureStatistics(x.shape[1]).update(x[:70] if rank == 0 else x[70:])
s.all_reduce()
s.save(f"{folder}/rank-{rank}.npz")
wide = ltk.diversity.FeatureStatistics(3 + rank)
try:
    wide.all_reduce()
except ValueError as error:
    assert "ranks disagree on the number of features: 3 to 4" in str(error), error
    open(f"{folder}/refused-{rank}", "w").close()
dist.destroy_process_group()
"""


def test_all_reduce_over_two_processes(tmp_path: pathlib.Path) -> None:
    x = rows(10, 100, 6, 50.0)
    torch.save(x, tmp_path / "x.pt")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [subprocess.Popen([sys.executable, script, str(r), str(tmp_path)], cwd=tmp_path) for r in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    direct = float(ltk.diversity.feature_diversity(x))
    both = [FeatureStatistics.load(tmp_path / f"rank-{r}.npz") for r in range(2)]
    for s in both:
        assert s.count == 100
        assert float(s.diversity()) == pytest.approx(direct, rel=1e-10)
    # The merges of one process, in the order of the ranks, to the bit.
    want = FeatureStatistics(6).update(x[:70]).merge(FeatureStatistics(6).update(x[70:]))
    for s in both:
        assert torch.equal(s.scatter, want.scatter)
        assert torch.equal(s.mean, want.mean)
    assert all((tmp_path / f"refused-{r}").exists() for r in range(2))


def test_classes_at_once() -> None:
    counts = [1, 0, 5, 200, 8, 9, 33, 2]
    labels = torch.repeat_interleave(torch.arange(8), torch.tensor(counts))
    x = rows(11, len(labels), 12)
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, labels = x[shuffle], labels[shuffle]
    got = ltk.diversity.class_diversities(x, labels, num_classes=9, alpha=2.0)
    for c, count in enumerate([*counts, 0]):
        if count == 0:
            assert math.isnan(got[c])
        else:
            want = float(ltk.diversity.feature_diversity(x[labels == c], alpha=2.0))
            assert float(got[c]) == pytest.approx(want, rel=1e-10, abs=1e-12)
    for bad, words in ((labels - 1, "negative"), (labels[:-1], "shape")):
        with pytest.raises(ValueError, match=words):
            ltk.diversity.class_diversities(x, bad)
    with pytest.raises(ValueError, match="below num_classes = 3, got 7"):
        ltk.diversity.class_diversities(x, labels, num_classes=3)
    with pytest.raises(TypeError, match="labels must be integers"):
        ltk.diversity.class_diversities(x, labels.double())


@pytest.mark.parametrize(("n", "d"), [(12, 3), (12, 30)])
def test_representatives_equal_greedy_by_brute_force(n: int, d: int) -> None:
    x = rows(12 + d, n, d).numpy()
    f = (x - x.mean(0)) * math.sqrt(1.5 / 5)
    left, picks, path = list(range(n)), [], []
    for _ in range(5):
        values = [
            np.linalg.slogdet(np.eye(len(picks) + 1) + f[[*picks, c]] @ f[[*picks, c]].T)[1] / (2 * math.log(2))
            for c in left
        ]
        path.append(max(values))
        picks.append(left.pop(int(np.argmax(values))))
    got = ltk.diversity.select_representatives(x, 5, alpha=1.5)
    assert got.indices.tolist() == picks
    np.testing.assert_allclose(got.diversity.numpy(), path, rtol=1e-11)


def test_representatives_ties_bounds_and_errors() -> None:
    # Four corners, each twice: the first four picks are one of each pair, the lowest of it.
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(2, 1)
    assert ltk.diversity.select_representatives(x, 2).indices.tolist() == [0, 2]
    got = ltk.diversity.select_representatives(x, 8).indices.tolist()
    assert sorted(got) == list(range(8))
    for k, error in ((0, ValueError), (9, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="k must be"):
            ltk.diversity.select_representatives(x, k)


def test_orders_of_merging_agree() -> None:
    parts = [FeatureStatistics(4).update(rows(s, 7 + s, 4, 10.0 * s)) for s in range(4)]
    values = []
    for order in itertools.permutations(range(4)):
        total = FeatureStatistics(4)
        for i in order:
            total.merge(parts[i])
        values.append(float(total.diversity()))
    np.testing.assert_allclose(values, values[0], rtol=1e-12)
