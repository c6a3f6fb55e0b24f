"""The recipe of sections 4.1 and 4.2, as a call and as ``ltkernels select``."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels import train
from ltkernels.cli import main
from ltkernels.diversity import FdgTarget
from ltkernels.experiments.arms import make_arms
from ltkernels.selection import fdg_recipe
from ltkernels.selection._arms import calibrated, complete_class, cut, parse_mode
from ltkernels.selection._recipe import spread_evenly
from ltkernels.train.config import Config
from ltkernels.train.features import complete_tail
from ltkernels.train.select import load_features, select_features

COUNTS = [60, 40, 12, 6]
WIDTH = 5


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), COUNTS)
    return (rng.normal(size=(len(labels), WIDTH)) + rng.normal(size=(4, WIDTH))[labels]).astype(np.float32), labels


def pool_of(label: int, rows: int) -> torch.Tensor:
    rng = np.random.default_rng(label)
    return torch.from_numpy(rng.normal(size=(rows, WIDTH)) * rng.uniform(0.2, 2.0, size=(rows, 1)))


def recipe(**keywords):
    x, y = data()
    originals = {c: torch.from_numpy(x[y == c]) for c in range(4)}
    keywords = {"n_sets": 6, "n_random": 8, "subset_size": 4, **keywords}
    return ltk.selection.fdg_recipe(originals, pool_of, COUNTS, **keywords)


def test_every_set_brings_every_tail_class_to_the_largest() -> None:
    result = recipe()
    assert (result.head, result.tail) == ([0, 1, 2], [3])
    (entry,) = result.classes
    assert entry.need == 54
    assert entry.rows.shape == (54,)
    assert entry.set_rows.shape == (6, 54)
    assert [arm.rows.shape for arm in entry.random] == [(54,)] * 8
    x, y = data()
    for rows, fdg in [(entry.rows, entry.fdg), *zip(entry.set_rows, entry.set_fdg.tolist())]:
        assert len(set(rows.tolist())) == 54
        want = ltk.diversity.feature_diversity_gain(x[y == 3], entry.pool[rows])
        assert fdg == pytest.approx(float(want), rel=1e-9)
    # The greedy arm ends above the random one, the sets rise, and the first and last are near greedy min and max.
    assert entry.fdg > float(entry.random_fdg.max())
    assert (entry.set_fdg.diff() > 0).all()
    assert len(result.kept) == 6
    assert (result.fdg.diff() > 0).all()
    gaps = result.fdg.diff()
    assert float(gaps.max()) <= 2.5 * float(gaps.min())
    assert {kind for kind, _ in result.kept} <= {"greedy", "random"}


def test_sets_of_several_classes_go_together() -> None:
    result = recipe(classes=[2, 3])
    assert [entry.label for entry in result.classes] == [2, 3]
    for (kind, i), fdg in zip(result.kept, result.fdg.tolist()):
        parts = [(e.set_fdg if kind == "greedy" else e.random_fdg)[i] for e in result.classes]
        assert fdg == pytest.approx(float(sum(parts)) / 2, rel=1e-12)


def test_fewer_steps_and_other_modes() -> None:
    for mode, sign in (("max", 1), ("min", -1)):
        entry = recipe(classes=[3], m=3, mode=mode, n_sets=0).classes[0]
        assert entry.need == 12
        assert entry.set_rows.shape == (0, 12)
        assert sign * (entry.fdg - float(entry.random_fdg.mean())) > 0
    assert recipe(n_sets=0, n_random=0).kept == []


def test_interrupted_recipe_goes_on(tmp_path) -> None:
    want = recipe(classes=[2, 3])

    def stop(_: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe(classes=[2, 3], checkpoint=tmp_path / "work", progress=stop)
    assert (tmp_path / "work" / "class-2.npz").exists()
    before = (tmp_path / "work" / "class-2.npz").stat().st_mtime_ns
    got = recipe(classes=[2, 3], checkpoint=tmp_path / "work")
    assert (tmp_path / "work" / "class-2.npz").stat().st_mtime_ns == before
    assert torch.equal(got.fdg, want.fdg)
    assert got.kept == want.kept


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"classes": [9]}, "there is no class 9"),
        ({"classes": [0]}, "class 0 has 60 samples, as many as the largest"),
        ({"mode": "best"}, "^mode must be max, min, quantile"),
        ({"n_sets": 1}, "class 3: n_sets must be at least 2, got 1"),
        ({"m": 0}, "needs 0 samples"),
    ],
)
def test_bad_arguments(keywords, message) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**keywords)


def test_modes_parse() -> None:
    assert parse_mode("target:0.1") == {"mode": "target", "target": 0.1}
    assert parse_mode("target:0.1:0.2") == {"mode": "target", "target": (0.1, 0.2)}
    assert parse_mode("quantile:0.5") == {"mode": "quantile", "q": 0.5}
    for bad in ("max:1", "quantile", "quantile:2", "target:x", "target:2:1", "target:nan", ""):
        with pytest.raises(ValueError, match="mode must be"):
            parse_mode(bad)


def test_spread_evenly_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        values = rng.normal(size=7) ** 3
        count = int(rng.integers(2, 6))
        targets = np.linspace(values.min(), values.max(), count)
        best = min(
            sum(abs(values[i] - t) for i, t in zip(combination, targets))
            for chosen in itertools.combinations(range(7), count)
            for combination in itertools.permutations(chosen)
        )
        positions, error = spread_evenly(values.tolist(), count)
        assert len(set(positions)) == count
        found = values[positions]
        assert (np.diff(found) >= 0).all()
        assert np.abs(found - targets).sum() == pytest.approx(best, abs=1e-12)
        assert error == pytest.approx(np.abs(found - targets).max() / (targets[1] - targets[0]))
    with pytest.raises(ValueError, match="count must be between 2 and the 3 values, got 4"):
        spread_evenly([1.0, 2.0, 3.0], 4)


def run(*arguments: object) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_select_writes_sets_and_picture(dtype, tmp_path, capsys) -> None:
    x, y = data()
    np.savez(tmp_path / "f.npz", features=x.astype(dtype), labels=y)
    flags = [
        "--classes",
        2,
        3,
        "--sets",
        5,
        "--random-repeats",
        6,
        "--subset-size",
        4,
        "--select",
        "quantile:0.8",
        "--share",
        1,
    ]
    assert run("select", tmp_path / "f.npz", "--out", tmp_path / "out", *flags) == 0
    assert "5 sets, FDG_Tail" in capsys.readouterr().out
    saved = np.load(tmp_path / "out" / "selection.npz")
    assert saved["features"].dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert saved["labels"].tolist() == [2] * 48 + [3] * 54
    assert saved["sets_3"].shape == (5, 54)
    assert saved["pool_3"].shape[0] >= 4 * 54
    result = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert len(result["sets"]["fdg_tail"]) == 5
    assert result["selected"] == "quantile:0.8"
    assert (tmp_path / "out" / "selection.png").read_bytes()[:4] == b"\x89PNG"
    # The temporary folder of checkpoints is gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "out"]
    # Two arrays in files of their own give the same.
    np.save(tmp_path / "x.npy", x.astype(dtype))
    np.save(tmp_path / "y.npy", y)
    assert run("select", tmp_path / "x.npy", "--labels", tmp_path / "y.npy", "--out", tmp_path / "again", *flags) == 0
    again = json.loads((tmp_path / "again" / "selection.json").read_text())
    assert again["sets"] == result["sets"]


def test_select_takes_pools_of_the_file(tmp_path) -> None:
    x, y = data()
    pool, labels = pool_of(3, 200).numpy(), np.full(200, 3)
    # Rows of another class stand between those of the pool: what is returned are rows of the file.
    pool, labels = np.insert(pool, range(0, 200, 2), 9.0, axis=0), np.insert(labels, range(0, 200, 2), 0)
    files = np.array([f"{i}.jpg" for i in range(300)])
    np.savez_compressed(tmp_path / "f.npz", features=x, labels=y, pool=pool, pool_labels=labels, pool_files=files)
    flags = ("--out", tmp_path / "out", "--quiet", "--m", 2, "--sets", 3)
    assert run("select", tmp_path / "f.npz", *flags) == 0
    saved = np.load(tmp_path / "out" / "selection.npz")
    added = saved["features"]
    assert added.shape == (20, WIDTH)
    np.testing.assert_array_equal(pool[saved["indices"]].astype(np.float32), added)
    assert saved["files"].tolist() == [f"{i}.jpg" for i in saved["indices"]]
    np.testing.assert_array_equal(pool[saved["pool_indices_3"]].astype(np.float32), saved["pool_3"])
    lines = (tmp_path / "out" / "selection.csv").read_text().splitlines()
    assert lines[0] == "label,index,file"
    assert lines[1:] == [f"3,{i},{i}.jpg" for i in saved["indices"]]
    np.savez(tmp_path / "g.npz", features=x, labels=y, pool=pool, pool_labels=labels, pool_files=files[:5])
    assert run("select", tmp_path / "g.npz", "--out", tmp_path / "no") == 2
    rows = {row.tobytes() for row in pool.astype(np.float32)}
    assert all(row.tobytes() in rows for row in added)


def test_select_says_the_names_of_the_classes(tmp_path, capsys) -> None:
    x, y = data()
    named = {"features": x, "labels": y, "class_names": np.array(["Aal", "Bär", "Kuh", "Äsche"])}
    np.savez(tmp_path / "f.npz", **named)
    assert run("select", tmp_path / "f.npz", "--out", tmp_path / "out") == 0
    assert re.search(
        r"^class 3 \(Äsche\): \d+ added in the spread of class \d \((Aal|Bär|Kuh)\)", capsys.readouterr().out, re.M
    )
    assert json.loads((tmp_path / "out" / "selection.json").read_text())["class_names"] == [
        "Aal",
        "Bär",
        "Kuh",
        "Äsche",
    ]
    np.savez(tmp_path / "g.npz", **named, pool=x, pool_labels=np.ones_like(y))
    assert run("select", tmp_path / "g.npz", "--out", tmp_path / "no") == 2
    assert "pool has no samples of class 3 (Äsche); --classes says which classes to complete" in capsys.readouterr().err
    np.savez(tmp_path / "h.npz", **{**named, "class_names": np.array(["Aal"])})
    assert run("select", tmp_path / "h.npz", "--out", tmp_path / "no") == 2
    assert "h.npz: class_names must name 4 classes, got (1,)" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "marker", "title"), [("mean", "o", "mean (points), "), ("max", "", "max (solid), ")])
def test_the_picture_shows_what_was_chosen(mode, marker, title, tmp_path, monkeypatch) -> None:
    # Rows that are chosen at once have a path of one point, of which a line draws nothing.
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    x, y = data()
    np.savez(tmp_path / "f.npz", features=x, labels=y)
    assert run("select", tmp_path / "f.npz", "--out", tmp_path / "out", "--select", mode) == 0
    left, right = drawn[0].axes
    (chosen,) = [line for line in left.lines if line.get_label() == "class 3"]
    assert (chosen.get_marker(), len(chosen.get_xdata()) == 1) == (marker, marker == "o")
    assert left.get_title() == f"{title}at random (dotted)"
    (fdg,) = [line.get_xdata()[0] for line in right.lines if line.get_label() == mode]
    assert fdg == pytest.approx(json.loads((tmp_path / "out" / "selection.json").read_text())["fdg_tail"])


@pytest.mark.parametrize("mode", ["mean", "match", "random", "max", "min", "target:0.1"])
def test_run_select_and_experiment_take_the_same_rows(mode: str, tmp_path) -> None:
    # The three ways in, from their own entrances: `ltkernels select`, the completion of run and stage 2, the experiment's arms.
    x, y = data()
    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    pools = {label: pool_of(label, 160).float() for label in (2, 3)}
    pool_labels = np.repeat([2, 3], 160)
    np.savez(
        tmp_path / "f.npz", features=x, labels=y, pool=torch.cat([*pools.values()]).numpy(), pool_labels=pool_labels
    )
    config = Config(select=mode, head_ratio=0.8, random_repeats=1, seed=5)
    select_features(tmp_path / "f.npz", config, out=tmp_path / "out")
    selected = np.load(tmp_path / "out" / "selection.npz")
    head, tail = complete_tail(features, labels, config, make_pool=lambda label, _: pools[label])
    assert [entry.label for entry in tail] == [2, 3]
    originals = {label: features[labels == label] for label in range(4)}
    added = {entry.label: entry.need for entry in tail}
    heads = {label: originals[label] for label in head}
    targets = {c: calibrated(heads, None, len(originals[c]), n, config.seed + c) for c, n in added.items()}
    if mode == "target:0.1":
        targets = {c: FdgTarget(0.1, 0.0, {}, []) for c in added}
    name = {"random": "random-0", "max": "clusters-max", "min": "clusters-min", "target:0.1": "items"}.get(mode, mode)
    options = {"levels": 0, "names": [name][: name != "random-0"], "seed": config.seed, "subset_size": 10}
    arm = make_arms({c: originals[c] for c in added}, pools, targets, added, **options)[name]
    for entry in tail:
        want = entry.added("random-0" if mode == "random" else mode)
        assert len(want) == entry.need > 10
        np.testing.assert_array_equal(selected["features"][selected["labels"] == entry.label], want.numpy())
        assert torch.equal(pools[entry.label][arm.rows[entry.label]], want)
    # Uniform sets on the side change nothing.
    select_features(tmp_path / "f.npz", config, out=tmp_path / "sets", n_sets=3)
    np.testing.assert_array_equal(np.load(tmp_path / "sets" / "selection.npz")["features"], selected["features"])


def test_large_files_are_mapped(tmp_path) -> None:
    x, y = data()
    np.savez(tmp_path / "f.npz", features=x, labels=y)
    arrays = load_features(tmp_path / "f.npz")
    assert isinstance(arrays["features"], np.memmap)
    np.testing.assert_array_equal(arrays["features"], x)
    np.testing.assert_array_equal(arrays["labels"], y)


def test_an_interrupted_select_goes_on(tmp_path, monkeypatch, capsys) -> None:
    x, y = data()
    np.savez(tmp_path / "f.npz", features=x, labels=y)

    calls = []

    def stop(_: str, done: int, total: int, __: dict) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("ltkernels.commands.parts.Progress.__call__", lambda self, *a: stop(*a))
    flags = ["--classes", 2, 3, "--sets", 5, "--subset-size", 4]
    assert run("select", tmp_path / "f.npz", "--out", tmp_path / "out", *flags) == 130
    assert not (tmp_path / "out").exists()
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".out.select-")]) == 1
    assert run("select", tmp_path / "f.npz", "--out", tmp_path / "out", *flags) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "out"]


@pytest.mark.parametrize(
    ("arrays", "flags", "words"),
    [
        ({}, ["--select", "best"], "select must be"),
        ({}, ["--classes", 0], "as many as the largest"),
        ({}, ["--sets", 1], "n_sets must be at least 2"),
        ({"pool": np.zeros((3, 2)), "pool_labels": np.full(3, 3)}, [], "pool has 2 features"),
        ({"pool": np.zeros((3, WIDTH))}, [], "pool_labels"),
        (
            {"pool": np.full((3, WIDTH), math.inf), "pool_labels": np.full(3, 3)},
            [],
            "pool holds NaN or infinity, first in row 0",
        ),
        ({"pool": np.zeros((3, WIDTH)), "pool_labels": np.full(3, 3)}, [], "needs 54 samples, its pool has 3"),
        ({"pool": np.zeros((3, WIDTH)), "pool_labels": np.full(3, 1)}, [], "pool has no samples of class 3"),
        ({"features": np.array([{}], dtype=object)}, [], "f.npz"),
    ],
)
def test_bad_files_and_flags_are_named(arrays, flags, words, tmp_path, capsys) -> None:
    x, y = data()
    np.savez(tmp_path / "f.npz", **{"features": x, "labels": y, **arrays})
    assert run("select", tmp_path / "f.npz", "--out", tmp_path / "out", "--share", 1, *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz"]


@pytest.mark.parametrize("mode", ["mean", "match", "match:0.1", "target:0.1"])
def test_a_pool_that_cannot_give_what_is_asked_for_is_said(mode) -> None:
    g = torch.Generator().manual_seed(0)
    z, pool = torch.randn(30, 6, generator=g), torch.randn(200, 6, generator=g)
    target = FdgTarget(0.1, 0.0, {}, [])
    one_sided, equal = pool.abs() + 9.0, torch.ones(200, 6)
    drawn = complete_class(4, z, one_sided, 50, mode="random", n_random=1, seed=1)
    for given in (one_sided, equal):
        found = complete_class(4, z, given, 50, mode=mode, target=target, n_random=1, seed=1)
        assert not found.reached
        assert found.chosen.offset > 3.0
        assert len(found.rows.unique()) == 50
    if "match" in mode or mode == "mean":
        assert (
            complete_class(4, z, one_sided, 50, mode=mode, target=target, n_random=1, seed=1).chosen.offset
            < drawn.chosen.offset
        )
    with pytest.raises(ValueError, match="class 4 needs 50 samples, its pool has 49"):
        complete_class(4, z, pool[:49], 50, mode=mode, target=target)


def test_stratified_subsets_hold_a_row_of_every_cluster() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.arange(5.0)[:, None] * 20.0
    blob = torch.arange(103) % 5  # the blobs differ by a row in size
    pool = centres[blob] + torch.randn(103, 3, generator=g)
    subsets = cut(pool, 5, 0, stratified=True)
    assert subsets.order.sort().values.tolist() == list(range(103))
    parts = [blob[rows].sort().values.tolist() for rows in subsets.order.split(subsets.offsets.diff().tolist())]
    assert parts[:20] == [[0, 1, 2, 3, 4]] * 20
    assert [len(part) for part in parts[20:]] == [3]
    z = pool[:10] + torch.randn(10, 3, generator=g)
    found = complete_class(1, z, pool, 20, mode="target:0.1", subset_size=5, stratified=True, n_random=1)
    assert blob[found.rows].bincount().tolist() == [4] * 5
    with pytest.raises(ValueError, match="stratified needs subset_size of at least 2"):
        complete_class(1, z, pool, 20, mode="target:0.1", stratified=True)


def test_match_without_a_head_class_to_calibrate_on_says_so() -> None:
    g = torch.Generator().manual_seed(0)
    features = {label: torch.randn(n, 4, generator=g) for label, n in enumerate((10, 10, 9))}

    def make(label, rows):
        return torch.randn(rows, 4, generator=g)

    recipe = fdg_recipe(features, make, [10, 10, 9], mode="match", head_ratio=0.6, n_sets=0, n_random=1)
    (entry,) = recipe.classes
    assert entry.target is None
    assert entry.note == "no head class to calibrate FDG on: only the mean was matched"
    assert (
        fdg_recipe(features, make, [10, 10, 9], mode="mean", head_ratio=0.6, n_sets=0, n_random=1).classes[0].note == ""
    )


def test_run_says_what_a_completion_did_not_reach() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 6)
    data = train.data.Dataset.from_arrays(
        torch.randn(96, 5) + labels[:, None], labels, torch.randn(30, 5), torch.arange(30) % 3, class_names=list("abc")
    )
    config = train.Config(
        model="mlp",
        epochs=1,
        retrain_epochs=1,
        random_repeats=1,
        threads=1,
        loss="ce",
        select="match:9",
        head_ratio=0.8,
    )
    assert (
        "completion of class c: match:9 was not reached; this is the nearest set found"
        in train.run(config, data)["notes"]
    )
