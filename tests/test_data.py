"""Data sets: golden counts typed by hand, and files that are refused in words."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from ltkernels.train import data
from ltkernels.train.data import DataRequest, Dataset, class_sizes, make_long_tailed
from ltkernels.train.data.fashion_mnist import read_idx

CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_exponential_profile_is_the_published_one():
    assert class_sizes(5000, 10, 100) == CIFAR10_LT_100
    assert [sum(class_sizes(5000, 10, f)) for f in (10, 50, 100)] == [20431, 13996, 12406]
    assert [sum(class_sizes(500, 100, f)) for f in (10, 50, 100)] == [19573, 12608, 10847]
    assert [sum(class_sizes(6000, 10, f)) for f in (10, 50, 100)] == [24516, 16796, 14886]


def test_step_profile():
    assert class_sizes(100, 5, 10, "step") == [100, 100, 10, 10, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5000, 10, 0.5), "imbalance"), ((10, 10, 100), "rarest class"), ((10, 10, 2, "cosine"), "profile")],
)
def test_bad_profiles_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_sizes(*arguments)


def test_thinning_keeps_label_order_and_follows_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 100))
    kept = make_long_tailed(labels, 10, seed=1)
    assert np.bincount(labels[kept]).tolist() == [100, 31, 10]
    assert len(set(kept.tolist())) == 141
    assert np.array_equal(kept, make_long_tailed(labels, 10, seed=1))
    assert not np.array_equal(kept, make_long_tailed(labels, 10, seed=2))


def test_digits_golden_counts_and_held_out_test():
    digits = data.load("digits-lt")
    assert digits.class_counts == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert torch.bincount(digits.y_test).tolist() == [50] * 10
    assert digits.input_shape == (1, 8, 8)
    train = {x.numpy().tobytes() for x in digits.x_train}
    assert not train & {x.numpy().tobytes() for x in digits.x_test}
    assert data.load("digits-lt", DataRequest(imbalance=10)).class_counts == [124, 96, 74, 57, 44, 34, 26, 20, 16, 12]


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"digits-lt, fashion-mnist-lt, .*folder:PATH, npz:PATH"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="unknown data set 'npz:'"):
        data.load("npz:")


@pytest.mark.parametrize(
    ("name", "kind"), [("pictures", "folder"), ("a.csv", "csv"), ("a.npz", "npz"), ("a.txt", "list")]
)
def test_a_path_alone_is_answered_with_the_way_to_read_it(name, kind, tmp_path):
    path = tmp_path / name
    if path.suffix:
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"(did you mean {kind}:{path}?)")):
        data.load(str(path))
    for name in ("9" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="unknown data set"):
            data.load(name)


def test_image_size_is_refused_where_it_would_do_nothing():
    for name in ("digits-lt", "npz:x.npz"):
        with pytest.raises(ValueError, match="image_size is 16: the samples of data set"):
            data.load(name, DataRequest(image_size=16))


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), [20, 10, 5])
    y_test = np.repeat(np.arange(3), 4)
    return {"x_train": rng.normal(size=(35, 4)), "y_train": y, "x_test": rng.normal(size=(12, 4)), "y_test": y_test}


def test_custom_data_in_two_lines(monkeypatch):
    monkeypatch.setattr(data, "_LOADERS", dict(data._LOADERS))
    data.register("mine", lambda request: Dataset.from_arrays(**_arrays()))
    loaded = data.load("mine")
    assert loaded.class_counts == [20, 10, 5]
    assert loaded.x_train.mean().abs() < 1e-6
    assert (loaded.x_train.std(0) - 1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="registered already"):
        data.register("mine", lambda request: loaded)


def test_what_is_given_is_left_as_it_is():
    arrays = _arrays()
    before = {name: array.copy() for name, array in arrays.items()}
    Dataset.from_arrays(**arrays)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def test_npz_with_and_without_imbalance(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, class_names=["a", "b", "<c>"], **_arrays())
    assert data.load(f"npz:{path}").class_counts == [20, 10, 5]
    assert data.load(f"npz:{path}").class_names == ("a", "b", "<c>")
    # The smallest class sets n_max: 5, 5 / sqrt(2.5) = 3, 5 / 2.5 = 2.
    assert data.load(f"npz:{path}", DataRequest(imbalance=2.5)).class_counts == [5, 3, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": np.repeat(np.arange(3), [20, 15, 0])}, "y_train has no sample of class 2"),
        ({"y_train": np.full(35, 0.5)}, "y_train must hold integers"),
        ({"y_train": np.zeros(34, int)}, "y_train must have shape"),
        ({"x_train": np.full((35, 4), np.nan)}, "x_train holds NaN"),
        ({"x_test": np.zeros((12, 5))}, "x_test has samples of shape"),
        ({"y_test": np.array([-1] * 12)}, "negative label -1"),
        ({"class_names": ["a", "b"]}, "label 2, but there are 2 classes"),
    ],
)
def test_bad_arrays_are_named(change, message):
    error = TypeError if "integers" in message else ValueError
    with pytest.raises(error, match=message):
        Dataset.from_arrays(**{**_arrays(), **change})


def test_bad_npz_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(f"npz:{tmp_path / 'nowhere.npz'}")
    np.savez(tmp_path / "short.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match=r"short\.npz.*lacks the array y_train \(it holds x_train\)"):
        data.load(f"npz:{tmp_path / 'short.npz'}")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.npz"):
        data.load(f"npz:{tmp_path / 'junk.npz'}")
    np.savez(tmp_path / "other.npz", X=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"needs the arrays x_train and y_train, or features and labels, or .* \(it holds X\)"
    ):
        data.load(f"npz:{tmp_path / 'other.npz'}")
    np.savez(tmp_path / "features.npz", features=np.zeros((3, 2)), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"features\.npz: labels must have shape \(3,\), got \(2,\)"):
        data.load(f"npz:{tmp_path / 'features.npz'}")
    np.savez(tmp_path / "features.npz", features=np.full((3, 2), np.nan), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"features\.npz: features holds NaN"):
        data.load(f"npz:{tmp_path / 'features.npz'}")
    np.savez(tmp_path / "pickled.npz", **{**_arrays(), "y_train": np.array([object()])})
    with pytest.raises(ValueError, match=r"pickled\.npz"):
        data.load(f"npz:{tmp_path / 'pickled.npz'}")


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def test_fashion_mnist_from_idx_files(tmp_path):
    labels = np.tile(np.arange(10), 40)
    images = np.random.default_rng(0).integers(0, 256, (400, 28, 28))
    _write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    _write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    _write_idx(tmp_path / "t10k-images-idx3-ubyte", images[:50])
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels[:50])
    loaded = data.load("fashion-mnist-lt", DataRequest(data_dir=tmp_path, imbalance=10))
    assert loaded.class_counts == [40, 30, 23, 18, 14, 11, 8, 6, 5, 4]
    assert loaded.input_shape == (1, 28, 28)
    assert loaded.class_names[9] == "Ankle boot"


def test_missing_fashion_mnist_says_where_to_put_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir.*apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist-lt", DataRequest(data_dir=tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 2, 2) + bytes(7), "promises"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1), "promises"),
        (b"\0\0\x0d\x03" + struct.pack(">3I", 1, 1, 1) + bytes(4), "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path, dims=3)
    (tmp_path / "images.gz").write_bytes(gzip.compress(content)[:-3])
    with pytest.raises(ValueError, match=r"images\.gz: not a complete gzip"):
        read_idx(tmp_path / "images.gz", dims=3)
