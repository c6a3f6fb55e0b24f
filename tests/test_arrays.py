"""Promise: arrays are read for their values, whatever their byte order, strides and flags, and seeds have up to 64 bits, in every public
function of features alike; nothing warns, and what is no array of numbers is refused by the argument's name."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from small_data import one_line, vectors

import ltkernels as ltk
from ltkernels import augment, diversity, neighbors, selection, train
from ltkernels.cli import main
from ltkernels.train.report.audit import out_of_sample_probabilities

X = np.random.default_rng(0).normal(size=(40, 6)).astype("f4")
LABELS = np.repeat([0, 1], 20)
PRIOR = np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1], "f4")


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


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


CALLS = {
    "nearest_neighbors": lambda a, y: neighbors.nearest_neighbors(a(X), a(X[:5]), 4).similarity,
    "nearest_neighbors, own": lambda a, y: (
        neighbors.nearest_neighbors(a(X), a(X), 4, metric="euclidean", own=y(np.arange(40))).indices
    ),
    "KNeighborsClassifier": lambda a, y: neighbors.KNeighborsClassifier(a(X), y(LABELS), 3).scores(a(X[:5])),
    "NearestClassMean": lambda a, y: neighbors.NearestClassMean(6, 2).update(a(X), y(LABELS)).logits(a(X[:5])),
    "knn_shapley": lambda a, y: neighbors.knn_shapley(a(X), y(LABELS), a(X[:5]), y(LABELS[:5])),
    "sample_k_dpp": lambda a, y: selection.sample_k_dpp(a(X), 3, quality=a(X[:, 0] ** 2), seed=1),
    "k_dpp_log_probability": lambda a, y: torch.tensor(
        selection.k_dpp_log_probability(a(X), y(np.array([7, 0, 39])), quality=a(X[:, 0] ** 2))
    ),
    "sinkhorn, prior": lambda a, y: ltk.functional.sinkhorn(torch.from_numpy(X), a(PRIOR)).labels,
    "threshold_move, cost": lambda a, y: ltk.inference.threshold_move(torch.from_numpy(X).softmax(1), a(PRIOR)),
    "fdc": lambda a, y: augment.fdc(a(X), y(LABELS), 1, 4, head_classes=[0], generator=generator()),
    "smote": lambda a, y: augment.smote(a(X), y(LABELS), 1, 4, generator=generator()),
    "most_similar_class": lambda a, y: torch.tensor(augment.most_similar_class(a(X), y(LABELS), 1, [0])),
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


# Of every width: torch compares and indexes by few of them, and takes uint8 for a mask.
WIDTHS = ("i1", "i2", "i4", "u1", "u2", "u4", "u8", ">i2", ">u4", ">u8")
OF_INTEGERS = (
    "nearest_neighbors, own", "KNeighborsClassifier", "NearestClassMean", "knn_shapley", "k_dpp_log_probability", "fdc", "smote",
    "class_diversities", "ClassStatistics", "select_subsets", "subset_gains", "uniform_fdg_sets",
)  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integers_of_every_width_are_the_same_numbers(name, width) -> None:
    expected, found = (CALLS[name](np.asarray, lambda y, kind=kind: y.astype(kind)) for kind in ("i8", width))
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("width", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_labels_of_every_width_in_what_gathers_features(width) -> None:
    x, y = torch.from_numpy(X[:, :4]), torch.from_numpy(LABELS)
    found = []
    for labels in (y, y.to(width)):
        torch.manual_seed(0)
        contrast = ltk.nn.ProCo([30, 10], 4)
        loss = contrast(x, labels)
        found.append(
            torch.cat(
                [loss[None], contrast.sums.flatten(), ltk.nn.ClassVariances(4, 2).update(x, labels).scatter.flatten()]
            )
        )
    assert torch.equal(*found)


def test_an_integer_of_more_than_63_bits_is_named() -> None:
    with pytest.raises(ValueError, match="labels holds 18446744073709551615: more than 63 bits"):
        diversity.class_diversities(X, np.full(40, 2**64 - 1, np.uint64))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: selection.sample_k_dpp(X, 2, quality=np.ones(40) * 1j), "quality"),
        (lambda: ltk.functional.sinkhorn(torch.from_numpy(X), PRIOR + 1j), "prior"),
        (lambda: ltk.inference.threshold_move(torch.from_numpy(X), PRIOR + 1j), "cost"),
    ],
)
def test_an_imaginary_part_is_refused_by_name(call, name) -> None:
    with pytest.raises(TypeError, match=f"{name} must hold real numbers, got torch.complex"):
        call()


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


def labelled(**options) -> train.data.Dataset:
    return train.data.Dataset.from_arrays(X, LABELS, **options)


SEEDED = {
    "sample_k_dpp": lambda seed: selection.sample_k_dpp(X, 3, seed=seed),
    "Dataset": lambda seed: labelled(seed=seed).y_test,
    "k_fold": lambda seed: next(train.data.k_fold(labelled(), 3, seed=seed)).x_test,
    "with_counts": lambda seed: train.data.with_counts(labelled(), [16, 5], seed=seed).x_train,
    "make_long_tailed": lambda seed: torch.from_numpy(train.data.make_long_tailed(LABELS, 4.0, seed=seed)),
    "mix_categories": lambda seed: train.data.mix_categories(labelled(), 0, 1, 0.5, 0.5, seed=seed).x_train,
    "audit": lambda seed: out_of_sample_probabilities(torch.from_numpy(X), torch.from_numpy(LABELS), 2, seed=seed),
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


def test_seeds_of_losses_are_64_bits_with_or_without_a_sign() -> None:
    z, y, views = torch.from_numpy(X), torch.from_numpy(LABELS), torch.randn(2, 300, 4).repeat(2, 1, 1, 1)
    for loss in (ltk.nn.GCL, ltk.nn.SoftmaxEqualization):
        (one, same, low, other) = (
            loss([50, 20, 10, 5, 2, 1], seed=seed)(z, y) for seed in (2**64 - 1, -1, 2**32 - 1, np.uint64(2**63))
        )
        assert one == same
        assert len({float(one), float(low), float(other)}) == 3
    for seed in (2**63, 2**64 - 1, -1):
        assert torch.isfinite(ltk.inference.expert_weights(*views, epochs=1, seed=seed)).all()
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"seed is {seed}; it must be an integer of 64 bits"):
            ltk.inference.expert_weights(*views, seed=seed)


def test_seeds_of_64_bits_on_the_command_line(tmp_path, capsys) -> None:
    x, y = vectors((40, 8), features=6)
    np.savez(tmp_path / "f.npz", features=x, labels=y)
    flags = ["--random-repeats", "1", "--head-ratio", "0.6", "--quiet"]
    assert (
        main(["select", str(tmp_path / "f.npz"), *flags, "--seed", str(2**64 - 1), "--out", str(tmp_path / "s")]) == 0
    )
    config = train.Config(model="mlp", epochs=1, threads=1, seed=2**64 - 1, data_seed=2**64 - 1)
    assert train.train(config, out=tmp_path / "t")["seed"] == 2**64 - 1
    assert train.config.from_mapping(train.config.read_toml(tmp_path / "t" / "config.toml"), "").seed == 2**64 - 1
    line = one_line(capsys, "train", "--seed", 2**64, "--out", tmp_path / "u")
    assert "seed must have 64 bits at most, got an integer of 65" in line
    assert not (tmp_path / "u").exists()
    assert "epochs must have 63 bits at most, got an integer of 64" in one_line(capsys, "train", "--epochs", 2**63)


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
