"""Statistics of classes in files: merged between parties to what the samples together would give; hostile files refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ltkernels as ltk
from ltkernels.cli import main
from ltkernels.diversity import ClassStatistics, FeatureStatistics
from ltkernels.train.statistics import merge_statistics, write_statistics

WIDTH = 6
NAMES = ["cat", "dog", "emu"]


def data(seed: int, counts: tuple[int, ...] = (30, 12, 4)) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    return generator.normal(size=(len(labels), WIDTH)) * (1 + seed) + generator.normal(size=(3, WIDTH))[labels], labels


def run(*arguments: object) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_parties_that_share_no_samples(tmp_path, capsys) -> None:
    (x, y), (u, v) = data(0), data(1, (5, 40))
    np.savez(tmp_path / "x.npz", features=x, labels=y, class_names=NAMES)
    # The other party calls its classes differently, has them in another order, and one that the first does not have.
    np.savez(tmp_path / "u.npz", features=u.astype(np.float32), labels=v, class_names=["dog", "fox"])
    for name in "xu":
        assert run("statistics", tmp_path / f"{name}.npz", "--out", tmp_path / f"party-{name}.npz") == 0
    parties = [tmp_path / f"party-{name}.npz" for name in "xu"]
    capsys.readouterr()
    assert run("statistics", "--merge", *parties, "--out", tmp_path / "all.npz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "samples", "V", "FDG", "over", "party-x.npz", "FDG", "over", "party-u.npz"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:5]}
    u32 = torch.from_numpy(u.astype(np.float32))
    samples = {
        "cat": (torch.from_numpy(x[y == 0]), None),
        "dog": (torch.from_numpy(x[y == 1]), u32[v == 0]),
        "emu": (torch.from_numpy(x[y == 2]), None),
        "fox": (None, u32[v == 1]),
    }
    assert list(rows) == list(samples)
    for name, parts in samples.items():
        both = torch.cat([part.double() for part in parts if part is not None])
        assert rows[name][0] == str(len(both))
        assert float(rows[name][1]) == pytest.approx(float(ltk.diversity.feature_diversity(both)), abs=1e-4)
        for i, (own, other) in enumerate((parts, parts[::-1])):
            if own is None:
                assert rows[name][2 + i] == "-"
            else:
                gain = (
                    0.0 if other is None else float(ltk.diversity.feature_diversity_gain(own.double(), other.double()))
                )
                assert float(rows[name][2 + i]) == pytest.approx(gain, abs=1e-4)
    assert float(rows["dog"][2]) > 0.1
    merged = ClassStatistics.load(tmp_path / "all.npz")
    assert merged.names == ["cat", "dog", "emu", "fox"]
    # No sample, and nothing as large as the samples, is in the file.
    with np.load(tmp_path / "all.npz", allow_pickle=False) as archive:
        shapes = {name: archive[name].shape for name in archive.files}
    assert shapes == {
        "version": (), "count": (4,), "mean": (4, WIDTH), "scatter": (4, WIDTH, WIDTH), "class_names": (4,),
    }  # fmt: skip


def test_order_of_merging_changes_rounding_only(tmp_path) -> None:
    for seed in range(3):
        x, y = data(seed)
        ClassStatistics(WIDTH, NAMES).update(x, y).save(tmp_path / f"{seed}.npz")
    results = [merge_statistics([tmp_path / f"{i}.npz" for i in order]) for order in itertools.permutations(range(3))]
    for result in results:
        assert result["counts"] == [90, 36, 12]
        np.testing.assert_allclose(result["diversity"], results[0]["diversity"], rtol=1e-12)
    one = merge_statistics([tmp_path / "0.npz"])
    assert one["parties"][0]["gain"] == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


def test_a_class_too_small_for_a_gain_has_none(tmp_path) -> None:
    x, y = data(0, (5, 1))
    ClassStatistics(WIDTH, 3).update(x, y).save(tmp_path / "a.npz")
    result = merge_statistics([tmp_path / "a.npz"])
    assert result["names"] == ["0", "1", "2"]
    assert result["diversity"][1:] == [0.0, None]
    assert result["parties"][0]["gain"][1:] == [None, None]
    assert json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("command", ["audit", "select", "statistics"])
def test_two_classes_of_one_name_are_refused_by_every_command(tmp_path, capsys, command) -> None:
    rows, file = np.random.default_rng(0).normal(size=(6, 2)), tmp_path / "twice.npz"
    np.savez(file, features=rows, labels=[0, 0, 0, 1, 1, 1], class_names=np.array(["ant", "ant"]))
    assert run(command, file, "--out", tmp_path / "out") == 2
    assert f"{file}: class_names holds 'ant' twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_file_twice_is_refused_and_the_same_numbers_are_noticed(tmp_path, capsys) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 2))
    for name, names in (("text", ["ant", "bee"]), ("bytes", [b"ant", b"bee"])):
        np.savez(tmp_path / f"{name}.npz", features=rows, labels=[0, 0, 0, 1, 1, 1], class_names=np.array(names))
        write_statistics(tmp_path / f"{name}.npz", out=tmp_path / f"{name}-statistics.npz")
    first, second = tmp_path / "text-statistics.npz", tmp_path / "bytes-statistics.npz"
    assert ClassStatistics.load(second).names == ["ant", "bee"]
    (tmp_path / "link.npz").symlink_to(first)
    for same in (first, tmp_path / "link.npz"):
        with pytest.raises(ValueError, match=f"{same} is {first}: its samples would count twice"):
            merge_statistics((first, same))
    assert run("statistics", "--merge", first, second) == 0
    assert f"note: {second} holds the same numbers as {first}" in capsys.readouterr().err


def test_refused_batches_and_names() -> None:
    x, y = data(0)
    s = ClassStatistics(WIDTH, NAMES).update(x, y)
    bad = x.copy()
    bad[3, 0] = np.inf
    for batch, labels, words in (
        (bad, y, "first in row 3"),
        (x, y + 1, "labels must be below the number of classes = 3, got 3"),
        (x[:, :2], y, "batch has 2 features per sample, the statistics have 6"),
        (x, y[1:], "labels must have shape"),
    ):
        with pytest.raises(ValueError, match=words):
            s.update(batch, labels)
    assert s.counts == [30, 12, 4]
    for names, words in (
        (["a", "a"], "'a' twice"),
        (["a", "\x1b[2J"], "printable"),
        ([], "empty"),
        ([""], "not empty"),
    ):
        with pytest.raises(ValueError, match=words):
            ClassStatistics(WIDTH, names)
    with pytest.raises(ValueError, match="other has 2 features"):
        s.merge(ClassStatistics(2, NAMES))


GOOD = {"version": np.int64(1), "count": np.array([9, 0]), "class_names": np.array(["a", "b"])}
GOOD |= {"mean": np.array([[1.0, 2, 3], [0, 0, 0]]), "scatter": np.stack([np.diag([4.0, 5, 6]), np.zeros((3, 3))])}


def changed(name: str, at: tuple[int, ...], value: float) -> np.ndarray:
    array = np.array(GOOD[name])
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": np.int64(2)}, "format version 2 is not known; this release reads version 1"),
        ({"version": np.array(["x" * 99])}, "is not known"),
        ({"version": None}, "lacks version"),
        ({"scatter": None, "mean": None}, "lacks mean, scatter"),
        ({"scatter": changed("scatter", (0, 0, 1), 1.0)}, "class 'a': scatter is not symmetric"),
        ({"scatter": changed("scatter", (0, 2, 2), -1.0)}, "class 'a': scatter has a negative eigenvalue"),
        ({"scatter": changed("scatter", (0, 0, 0), math.nan)}, "class 'a': scatter holds NaN"),
        ({"mean": changed("mean", (0, 0), math.inf)}, "class 'a': mean holds NaN"),
        ({"mean": changed("mean", (0, 0), 1e200)}, "class 'a': mean reaches 1e\\+200"),
        ({"mean": changed("mean", (1, 0), 1.0)}, "class 'b': count is 0, but mean or scatter is not"),
        ({"count": np.array([1, 0])}, "class 'a': count is 1, but scatter reaches 6"),
        ({"count": np.array([-9, 0])}, "class 'a': count must be between 0 and 2\\^53, got -9"),
        ({"count": np.array([2**60, 0])}, "count must be between 0 and 2\\^53"),
        ({"count": np.array([9.0, 0.0])}, "count must be integer"),
        ({"count": np.array([9])}, "do not fit together"),
        ({"mean": np.zeros((2, 4))}, "do not fit together"),
        ({"scatter": np.zeros((2, 3))}, "do not fit together"),
        ({"scatter": GOOD["scatter"].astype(np.float32)}, "float64, got int64, float64 and float32"),
        ({"scatter": GOOD["scatter"].astype(">f8")}, "float64"),
        ({"mean": np.array([[{}, 1, 2], [0, 0, 0]], dtype=object)}, "it holds object"),
        ({"class_names": np.array(["a", "a"])}, "class_names holds 'a' twice"),
        ({"class_names": np.array(["a", "\x1b[31m"])}, "names must be printable"),
        ({"class_names": np.array(["a"])}, "class_names must hold 2 strings"),
        ({"class_names": np.array([1, 2])}, "class_names must hold 2 strings"),
    ],
)
def test_hostile_statistics_are_refused_with_the_name_of_the_file(changes, words, tmp_path, capsys) -> None:
    np.savez(tmp_path / "good.npz", **GOOD)
    assert ClassStatistics.load(tmp_path / "good.npz").counts == [9, 0]
    arrays = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{words}"):
        ClassStatistics.load(tmp_path / "bad.npz")
    assert run("statistics", "--merge", tmp_path / "good.npz", tmp_path / "bad.npz", "--out", tmp_path / "all.npz") == 2
    error = capsys.readouterr().err
    assert "bad.npz: " in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.npz", "good.npz"]


def test_a_small_file_asks_for_no_memory(tmp_path) -> None:
    """A compressed bomb and a header that claims terabytes: refused by what is in the file, before anything is allocated."""
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in GOOD.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(value))
    with pytest.raises(ValueError, match=r"bomb\.npz: .*compressed"):
        ClassStatistics.load(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        for name, value in GOOD.items():
            shape = (2, 10**6, 10**6) if name == "scatter" else np.shape(value)
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": np.asarray(value).dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(np.asarray(value).tobytes())
    with pytest.raises(ValueError, match=r"claim\.npz: not a usable \.npz file"):
        ClassStatistics.load(tmp_path / "claim.npz")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_give_one_error_or_sound_statistics(tmp_path_factory, data) -> None:
    """Bits flipped and ends cut off: never another exception, and what loads is a set of statistics."""
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez(path, **GOOD)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        loaded = ClassStatistics.load(path)
    except ValueError as error:
        words = str(error)
        loaded = None
    if loaded is None:
        assert "damaged.npz" in words
        return
    assert len(loaded.names) == len(loaded.classes)
    for part in loaded.classes:
        assert part.count == 0 or math.isfinite(part.diversity())


def test_kinds_of_files_are_not_mixed_up(tmp_path) -> None:
    FeatureStatistics(3).update(torch.randn(5, 3)).save(tmp_path / "one.npz")
    ClassStatistics(3, 2).update(torch.randn(5, 3), torch.ones(5).long()).save(tmp_path / "classes.npz")
    with pytest.raises(ValueError, match=r"classes\.npz: holds statistics of classes, not of one set"):
        FeatureStatistics.load(tmp_path / "classes.npz")
    with pytest.raises(ValueError, match=r"one\.npz: .*lacks class_names"):
        ClassStatistics.load(tmp_path / "one.npz")


def test_bad_calls_are_one_line(tmp_path, capsys) -> None:
    x, y = data(0)
    np.savez(tmp_path / "f.npz", features=x, labels=y)
    np.savez(tmp_path / "few.npz", features=x, labels=y, class_names=["a"])
    np.savez(tmp_path / "nan.npz", features=np.full((3, 2), np.nan), labels=[0, 0, 1])
    ClassStatistics(2, 3).save(tmp_path / "narrow.npz")
    out = tmp_path / "out.npz"
    assert run("statistics", tmp_path / "f.npz", "--out", out) == 0
    before = out.read_bytes()
    capsys.readouterr()
    for arguments, words in (
        ([], "takes either FEATURES.npz or --merge"),
        ([tmp_path / "f.npz", "--merge", out], "takes either FEATURES.npz or --merge"),
        ([tmp_path / "f.npz", "--out", out], "exists; --force replaces a file"),
        ([tmp_path / "f.npz", "--out", tmp_path, "--force"], "exists"),
        ([tmp_path / "no.npz", "--out", out, "--force"], "no.npz: no such file"),
        ([tmp_path / "few.npz", "--out", out, "--force"], "few.npz: labels must be below the number of classes = 1"),
        ([tmp_path / "nan.npz", "--out", out, "--force"], "nan.npz: features holds NaN or infinity, first in row 0"),
        (["--merge", out, tmp_path / "narrow.npz"], "narrow.npz: has 2 features per sample, these statistics have 6"),
        (["--merge", tmp_path / "f.npz"], "f.npz: not a file of feature statistics: lacks version"),
        (["--merge", out, "--labels", out], "--labels is for an .npy file"),
    ):
        assert run("statistics", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert out.read_bytes() == before


def torchrun(folder, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ltkernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_write_the_statistics_of_one(tmp_path, monkeypatch) -> None:
    x, y = data(0)
    np.savez(tmp_path / "f.npz", features=x, labels=y, class_names=NAMES)
    done = torchrun(tmp_path, "statistics", "f.npz", "--out", "two.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples") == 1  # one process speaks
    monkeypatch.setattr("ltkernels.train.statistics._BLOCK", 7)
    one = write_statistics(tmp_path / "f.npz")
    two = merge_statistics([tmp_path / "two.npz"])
    assert (two["names"], two["counts"]) == (one["names"], one["counts"])
    np.testing.assert_allclose(two["diversity"], one["diversity"], rtol=1e-12)


def test_numbers_and_names_of_numpy_are_numbers_and_names() -> None:
    assert ClassStatistics(3, np.int64(2)).names == ["0", "1"]
    assert ClassStatistics(3, np.array([b"ant", b"bee"])).names == ["ant", "bee"]
