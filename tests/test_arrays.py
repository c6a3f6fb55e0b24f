"""Promise: arrays are read for their values, whatever their byte order, strides and flags, and seeds have up to 64 bits, in every public
function of features alike; nothing warns, and what is no array of numbers is refused by the argument's name."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from small_data import one_line, vectors

from ltkernels import diversity, selection, train
from ltkernels.cli import main

X = np.random.default_rng(0).normal(size=(40, 6)).astype("f4")
LABELS = np.repeat([0, 1], 20)


def read_only(x: np.ndarray) -> np.ndarray:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


# Each holds the values of its argument.
LAYOUTS = {
    "reversed": lambda x: x[::-1].copy()[::-1],
    "reversed columns": lambda x: x[:, ::-1].copy()[:, ::-1] if x.ndim == 2 else x[::-1].copy()[::-1],
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder("S")),
    "Fortran order": np.asfortranarray,
    "read only": read_only,
    "long double": lambda x: x.astype(np.longdouble) if x.dtype.kind == "f" else x,
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "nested lists": lambda x: x.tolist(),
    "memory map": lambda x: x.view(np.memmap),
}


def statistics(x, labels):
    found = diversity.ClassStatistics(6, 2)
    found.update(x, labels)
    return torch.stack([part.mean for part in found.classes])


CALLS = {
    "feature_diversity": lambda a, y: diversity.feature_diversity(a(X)),
    "feature_diversity_gain": lambda a, y: diversity.feature_diversity_gain(a(X[:20]), a(X[20:])),
    "fdg_infimum": lambda a, y: torch.tensor(diversity.fdg_infimum(a(X), 5)),
    "standardized_offset": lambda a, y: torch.tensor(diversity.standardized_offset(a(X[:20]), a(X[20:]))),
    "select_representatives": lambda a, y: diversity.select_representatives(a(X), 3).indices,
    "fdg_target": lambda a, y: torch.tensor(diversity.fdg_target({0: a(X)}, None, 5, added=5, seed=3).value),
    "class_diversities": lambda a, y: diversity.class_diversities(a(X), y(LABELS)),
    "ClassStatistics": lambda a, y: statistics(a(X), y(LABELS)),
    "kmeans_subsets": lambda a, y: selection.kmeans_subsets(a(X), 4).order,
    "match_pool": lambda a, y: selection.match_pool(a(X[:20]), a(X[20:]), 5).indices,
    "select_subsets": lambda a, y: selection.select_subsets(a(X[:20]), a(X[20:]), y(np.arange(0, 21, 4)), m=2).indices,
    "subset_gains": lambda a, y: torch.as_tensor(selection.subset_gains(a(X[:20]), a(X[20:]), y(np.arange(0, 21, 4)))),
    "uniform_fdg_sets": lambda a, y: torch.as_tensor(
        selection.uniform_fdg_sets(a(X[:20]), a(X[20:]), y(np.arange(0, 21, 4)), m=2, n_sets=2).fdg
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_are_read_for_their_values(name, layout) -> None:
    def double(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) if x.dtype.kind == "f" else x

    expected = CALLS[name](double, np.asarray)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CALLS[name](lambda x: LAYOUTS[layout](double(x)), LAYOUTS[layout])
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_one_row_with_a_negative_stride() -> None:
    one = X[:1][::-1]
    assert one.strides[0] < 0
    gains = (diversity.feature_diversity_gain(X[:20], row) for row in (one, X[:1].copy()))
    assert next(gains) == next(gains)


@pytest.mark.parametrize("given", [np.array([["a", "b"]]), np.array([[object(), 1]]), {0: [1.0]}, "words"])
@pytest.mark.parametrize("name", ["feature_diversity", "kmeans_subsets"])
def test_what_is_no_array_of_numbers_is_refused_by_name(name, given) -> None:
    with pytest.raises(TypeError, match="features must be a tensor or an array of numbers"):
        CALLS[name](lambda x: given, np.asarray)


SEEDED = {
    "kmeans_subsets": lambda seed: selection.kmeans_subsets(X, 4, seed=seed).order,
    "match_pool": lambda seed: selection.match_pool(X[:20], X[20:], 5, seed=seed).indices,
    "fdg_target": lambda seed: torch.tensor(diversity.fdg_target({0: X}, None, 5, added=5, seed=seed).value),
}


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**63, 2**64 - 1, np.uint64(2**64 - 1)])
@pytest.mark.parametrize("name", SEEDED)
def test_seeds_of_up_to_64_bits(name, seed) -> None:
    assert torch.equal(SEEDED[name](seed), SEEDED[name](int(seed)))


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (2**64, ValueError, "seed must be at most 18446744073709551615, got 18446744073709551616"),
        (-1, ValueError, "seed must be at least 0, got -1"),
        (1.5, TypeError, "seed must be an integer, got float"),
        (True, TypeError, "seed must be an integer, got bool"),
    ],
)
@pytest.mark.parametrize("name", SEEDED)
def test_what_is_no_seed_is_refused_by_name(name, seed, error, message) -> None:
    with pytest.raises(error, match=message):
        SEEDED[name](seed)


def test_a_large_seed_gives_starts_of_its_own() -> None:
    starts = {
        tuple(selection.kmeans_subsets(X, 8, niter=1, seed=seed).order.tolist()) for seed in range(2**40, 2**40 + 8)
    }
    assert len(starts) > 4


@pytest.mark.parametrize("name", ["niter", "nredo"])
def test_counts_beyond_the_library_s_integers_are_refused_by_name(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at most 2147483647, got 2147483648"):
        selection.kmeans_subsets(X, 4, **{name: 2**31})


# Python calls on arrays of other layouts


@pytest.mark.parametrize(
    "turn", [lambda a: a.astype(">f4"), lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.astype(">f8")]
)
def test_diversity_and_selection_read_arrays_for_their_values(turn):
    x = np.random.default_rng(0).normal(size=(24, 5)).astype("f4")
    odd, plain = turn(x), np.ascontiguousarray(turn(x)).astype(turn(x).dtype.newbyteorder("="))
    labels, offsets = np.repeat([0, 1], 12), np.arange(0, 25, 4)
    calls = (
        lambda a: diversity.feature_diversity(a),
        lambda a: diversity.feature_diversity_gain(a, a[:10] * 2),
        lambda a: selection.subset_gains(a, a, offsets.astype(">i8")),
        lambda a: selection.kmeans_subsets(a, 2).centroids,
        lambda a: selection.select_subsets(a, a, offsets.astype(">i8"), m=2).fdg,
        lambda a: selection.match_pool(a[:8], a, 4).indices,
        lambda a: _classes(diversity, a, labels.astype(">i8")),
    )
    for call in calls:
        assert torch.equal(torch.as_tensor(call(odd)), torch.as_tensor(call(plain)))


def _classes(diversity, x, y):
    statistics = diversity.ClassStatistics(x.shape[1], 2)
    statistics.update(x, y)
    return statistics.diversity()


# Files of features


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [(">i8", "f4"), ("i8", ">f4"), ("i8", ">f8"), ("f8", "f4"), ("S3", "f4"), ("U3", "f4"), ("from one", "f4")],
)  # fmt: skip
def test_select_audit_and_statistics_read_the_same_values(tmp_path, capsys, labels, dtype):
    x, y = vectors((30, 12, 6), features=6)
    given = {
        "S3": np.array(["c0", "c1", "c2"])[y].astype("S"),
        "U3": np.array(["c0", "c1", "c2"])[y],
        "from one": y + 1,
    }
    np.savez(tmp_path / "plain.npz", features=x.astype("f4"), labels=y)
    np.savez(
        tmp_path / "odd.npz",
        features=x.astype("f4").astype(dtype),
        labels=given[labels] if labels in given else y.astype(labels),
    )
    shown = []
    for name in ("plain", "odd"):
        path = tmp_path / f"{name}.npz"
        assert main(["statistics", str(path)]) == 0
        rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]]
        assert main(["audit", str(path), "--out", str(tmp_path / f"{name}.html")]) == 0
        capsys.readouterr()
        result = train.select_features(path, train.Config(head_ratio=0.6, random_repeats=1), out=tmp_path / name)
        shown.append((rows, result["class_counts"], result["fdg_tail"]))
    assert shown[0][:2] == shown[1][:2]
    assert shown[0][2] == pytest.approx(shown[1][2], rel=1e-5)


def test_class_names_as_bytes_are_the_same_names(tmp_path, capsys):
    x, y = vectors((30, 30))
    for name, names in (("f", np.array([b"ant", b"bee"])), ("g", np.array(["ant", "bee"]))):
        np.savez(tmp_path / f"{name}.npz", features=x, labels=y, class_names=names)
        assert main(["statistics", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / f"{name}s.npz")]) == 0
    capsys.readouterr()
    assert main(["statistics", "--merge", str(tmp_path / "fs.npz"), str(tmp_path / "gs.npz")]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["ant", "60"], ["bee", "60"]]


def test_select_leaves_classes_of_one_sample_out_and_names_the_file(tmp_path, capsys):
    x, y = vectors((40, 8, 1), features=6)
    path = tmp_path / "f.npz"
    np.savez(path, features=x, labels=y)
    flags = ["--random-repeats", "1", "--head-ratio", "0.6", "--out", str(tmp_path / "s")]
    assert main(["select", str(path), *flags]) == 0
    assert "note: not completed, with one sample: class 2\n" in capsys.readouterr().out
    with np.load(tmp_path / "s" / "selection.npz") as found:
        assert set(found["labels"]) == {1}
    flags[-1] = str(tmp_path / "t")
    for labels, more, word in (
        (y, ["--classes", "2"], "f.npz: class 2 has one sample"), (2 * y, [], "f.npz: labels have no sample of class 1"),
        (np.minimum(np.arange(49) // 48, 1), [], "f.npz: every tail class has one sample"),
    ):  # fmt: skip
        np.savez(path, features=x, labels=labels)
        assert word in one_line(capsys, "select", path, *flags, *more)
    np.savez(path, features=x, labels=y, class_names=["a", "b", "a"])
    for command in ("audit", "statistics"):
        assert "f.npz: class_names holds 'a' twice" in one_line(
            capsys, command, path, *(flags[-2:] if command != "statistics" else [])
        )


def test_select_names_a_class_whose_gain_is_undefined(tmp_path, capsys):
    for name, of, spoil, words in (
        ("equal", 1, lambda x: x[:1], "class 1: all 8 samples of original are equal"),
        ("huge", 0, lambda x: x * 1e37, "class 1: the log-determinants are not finite; scale the features down"),
    ):
        x, y = vectors((40, 8), features=6)
        x[y == of] = spoil(x[y == of])
        np.savez(tmp_path / f"{name}.npz", features=x.astype("f4"), labels=y)
        line = one_line(
            capsys,
            "select",
            tmp_path / f"{name}.npz",
            "--head-ratio",
            0.6,
            "--random-repeats",
            1,
            "--out",
            tmp_path / "s",
        )
        assert f"{name}.npz: {words}" in line
        assert not (tmp_path / "s").exists()


def test_labels_of_a_file_that_mean_nothing_are_named(tmp_path, capsys):
    x, y = vectors((30, 30))
    np.savez(tmp_path / "half.npz", features=x, labels=y + 0.5)
    assert "half.npz: labels must hold integers" in one_line(capsys, "statistics", tmp_path / "half.npz")
