"""Where data comes from and how it is read: list files, tables, arrays as people have them, other libraries' data sets."""

import sys
import types

import numpy as np
import pytest
import torch

from ltkernels import train
from ltkernels._arrays import class_indices
from ltkernels.cli import main
from ltkernels.train import data
from ltkernels.train.data import DataRequest, Dataset, make_long_tailed
from ltkernels.train.data._objects import _stored
from ltkernels.train.jobs import vector_defaults

SIZES = (30, 14, 6)


def _vectors(sizes, seed=0, features=4):
    y = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).normal(size=(len(y), features)) + y[:, None], y


def _npz(path, sizes=SIZES, **change):
    x, y = _vectors(sizes)
    x_test, y_test = _vectors([4] * len(sizes), 1)
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, **change})
    return f"npz:{path}"


def _one_line(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1), captured.err
    return captured.err


# Labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array(["c10", "c2", "a"]), ("a", "c2", "c10")), (np.array([b"c10", b"c2", b"a"]), ("a", "c2", "c10")),
        (np.array([3, 2, 1]), ("1", "2", "3")), (np.array([2.0, 1.0, 0.0]), None), (np.array([2, 1, 0], ">i8"), None),
        (np.array([2, 1, 0], "u1"), None), (np.array([0, 1, 2])[::-1], None), (np.array([3.0, 2.0, 1.0], ">f4"), ("1", "2", "3")),
    ],
)  # fmt: skip
def test_labels_are_read_for_their_values(labels, names):
    numbers, found = class_indices({"y": labels})
    assert numbers["y"].tolist() == [2, 1, 0]
    assert numbers["y"].dtype == np.int64
    assert found == names


def test_labels_of_several_arrays_share_one_numbering():
    numbers, names = class_indices({"a": np.array(["x", "z"]), "b": np.array([b"y", b"x"])})
    assert (numbers["a"].tolist(), numbers["b"].tolist(), names) == ([0, 2], [1, 0], ("x", "y", "z"))
    # Only where both together are exactly 1..C do they count from 1.
    assert class_indices({"a": np.array([1, 2]), "b": np.array([0, 1])})[0]["a"].tolist() == [1, 2]
    assert class_indices({"a": np.array([1, 3])})[0]["a"].tolist() == [1, 3]
    assert class_indices({"a": np.array([1, 2])}, [b"ant", "bee"])[1] == ("ant", "bee")
    for bad, message in (
        ({"a": np.array([0.5])}, "a must hold integers or names"), ({"a": np.array([np.nan])}, "a must hold integers"),
        ({"a": np.array([True])}, "a must hold integers"), ({"a": np.array(["x"]), "b": np.array([1])}, "a and b must all"),
        ({"a": np.array([2**63], np.uint64)}, "63 bits"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            class_indices(bad)
    with pytest.raises(ValueError, match="a holds 'z', which class_names does not"):
        class_indices({"a": np.array(["z"])}, ["x", "y"])
    with pytest.raises(ValueError, match="class_names holds 'x' twice"):
        class_indices({"a": np.array([0, 1])}, ["x", b"x"])


# Arrays


def test_arrays_of_any_layout_give_the_same_data():
    x, y = _vectors(SIZES)
    expected = Dataset.from_arrays(x, y, x, y)
    back = np.ascontiguousarray(x[::-1])
    for given in (x.astype(">f8"), back[::-1], np.asfortranarray(x), x.astype(np.longdouble), torch.from_numpy(x)):
        assert torch.equal(Dataset.from_arrays(given, y, given, y).x_train, expected.x_train)
    assert torch.equal(
        Dataset.from_arrays(x, np.array(["a", "b", "c"])[y], x, np.array(["a", "b", "c"])[y]).y_train, expected.y_train
    )
    pictures = np.random.default_rng(0).integers(0, 255, (20, 3, 8, 9)).astype("u1")
    y = np.repeat([0, 1], 10)
    first = Dataset.from_arrays(pictures, y, pictures, y)
    last = Dataset.from_arrays(pictures.transpose(0, 2, 3, 1), y, pictures.transpose(0, 2, 3, 1), y)
    assert torch.equal(first.x_train, last.x_train)
    assert (first.notes, last.notes) == ((), ("images are read as (n, height, width, channels)",))
    flipped = Dataset.from_arrays(pictures[:, ::-1], y, pictures[:, ::-1], y)
    assert torch.equal(flipped.x_train, first.x_train.flip(1))


@pytest.mark.parametrize("offset", [0, 1e6, 1e7, 1e9])
def test_large_offsets_lose_nothing(offset):
    x, y = _vectors((30, 30), features=8)
    x += offset
    loaded = Dataset.from_arrays(x, y, x, y)
    assert np.abs(loaded.x_train.numpy() - (x - x.mean(0)) / x.std(0, ddof=1)).max() < 1e-6
    assert torch.equal(loaded.preprocessing(x), loaded.x_train)


def test_columns_that_are_strange_are_named():
    x, y = _vectors(SIZES, features=4)
    x[:, 1] = 0.1
    x[:, 2] *= 1e4
    loaded = Dataset.from_arrays(x, y, x, y)
    assert loaded.notes[0] == "constant, and of no use: column 1 of 4"
    assert loaded.notes[1].startswith("column 2 spreads ")
    assert "each column is standardised by itself" in loaded.notes[1]
    assert loaded.x_train[:, 1].abs().max() < 1e-6
    assert (loaded.x_train.std(0)[[0, 2, 3]] - 1).abs().max() < 1e-5


def test_a_table_with_a_column_in_thousands_trains_as_well_as_scikit_learn(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 30)) * 0.35

    def draw(sizes):
        y = np.repeat(np.arange(3), sizes)
        x = rng.normal(size=(len(y), 30)) + means[y]
        x[:, 0] *= 1000
        x[:, 1] += 50
        return x, y

    (x, y), (x_test, y_test) = draw((1900, 80, 20)), draw((300, 300, 300))
    np.savez(tmp_path / "tab.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    scaler = StandardScaler().fit(x)
    peer = LogisticRegression(class_weight="balanced", max_iter=1000).fit(scaler.transform(x), y)
    reference = balanced_accuracy_score(y_test, peer.predict(scaler.transform(x_test)))
    summary = train.train(train.Config(data=f"npz:{tmp_path / 'tab.npz'}", threads=1))
    assert summary["config"]["model"] == "wide"
    assert summary["balanced_accuracy"] > reference - 0.02, (summary["balanced_accuracy"], reference)


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_the_defaults_reach_scikit_learn_on_small_real_tables(name):
    """Long-tailed, imbalance 10: 40 and 139 samples are left. Means over three splits, classes in another order in each; seeds that the
    defaults were not chosen on."""
    from sklearn import datasets
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    differences = []
    for seed in (3, 4, 5):
        labels = np.random.default_rng(seed).permutation(y.max() + 1)[y]
        own, held, y_own, y_held = train_test_split(x, labels, test_size=0.4, stratify=labels, random_state=seed)
        kept = make_long_tailed(y_own, 10, "exp", seed)
        own, y_own = own[kept], y_own[kept]
        peer = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000)).fit(
            own, y_own
        )
        summary = train.train(train.Config(threads=1, seed=seed), Dataset.from_arrays(own, y_own, held, y_held))
        differences.append(summary["balanced_accuracy"] - balanced_accuracy_score(y_held, peer.predict(held)))
    assert np.mean(differences) > -0.02, differences


def test_the_defaults_for_vectors_follow_the_number_of_samples():
    few, many = vector_defaults(40), vector_defaults(100_000)
    assert (few["batch_size"], few["epochs"], few["weight_decay"]) == (16, 400, 1 / 40)
    assert (many["batch_size"], many["epochs"], many["weight_decay"]) == (64, 20, 5e-4)
    # Biases stand for how frequent the classes are.
    assert few["decay"] == many["decay"] == "weights"


# Files


def _pictures(folder, count=3):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for c in range(2):
        for i in range(count):
            image.new("RGB", (4, 4), (100 * c, i, 0)).save(folder / f"{c} {i}.png")


def test_list_files_with_their_siblings(tmp_path):
    _pictures(tmp_path / "img", 4)
    for part, rows in (("train", (0, 1)), ("test", (2,)), ("val", (3,))):
        lines = [f"img/{c} {i}.png {c + 1}\n" for c in range(2) for i in rows]
        (tmp_path / f"My_{part}.txt").write_text("\n".join(lines))
    loaded = data.load(f"list:{tmp_path / 'My_train.txt'}")
    assert (loaded.class_counts, loaded.class_names) == ([2, 2], ("1", "2"))
    assert loaded.train_files == ("img/0 0.png", "img/0 1.png", "img/1 0.png", "img/1 1.png")
    assert loaded.test_files == ("img/0 2.png", "img/1 2.png")
    assert loaded.y_val.tolist() == [0, 1]
    assert loaded.notes == ("the test set is My_test.txt", "the val set is My_val.txt")
    raw = loaded.x_train[:, 0] * loaded.std[0] + loaded.mean[0]
    assert raw[:, 0, 0].round().tolist() == [0, 0, 100, 100]
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (elsewhere / "all.txt").write_text("".join(f"{c} {i}.png class{c}\n" for c in range(2) for i in range(4)))
    loaded = data.load(f"list:{elsewhere / 'all.txt'}", DataRequest(data_dir=tmp_path / "img"))
    assert (loaded.class_names, loaded.class_counts) == (("class0", "class1"), [3, 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\n", r"mine\.txt: line 1: not `path label`: 'a\.png'"),
        ("no.png 0\n", r"mine\.txt: .*no\.png: no such file \(--data-dir"),
        ("../secret.png 0\n", r"mine\.txt: \.\./secret\.png leads out of"),
        ("img/0 0.png 0\nimg/1 0.png 9\n", r"mine\.txt: the train set has 2 samples for 10 classes: some have none"),
        ("", r"mine\.txt: holds no line"),
        ("a\0.png 0\n", r"mine\.txt: 'a\\x00\.png' is no name of a file"),
    ],
)
def test_bad_lists_are_named(tmp_path, text, message):
    _pictures(tmp_path / "img")
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(f"list:{tmp_path / 'mine.txt'}")


def test_csv_of_pictures_and_of_numbers(tmp_path):
    _pictures(tmp_path / "img", 3)
    rows = [f"img/{c} {i}.png,{'ab'[c]},{'Test' if i == 2 else 'train'}\n" for c in range(2) for i in range(3)]
    (tmp_path / "p.csv").write_text("file,label,split\n" + "".join(rows))
    loaded = data.load(f"csv:{tmp_path / 'p.csv'}")
    assert (loaded.class_names, loaded.class_counts, loaded.test_files) == (
        ("a", "b"),
        [2, 2],
        ("img/0 2.png", "img/1 2.png"),
    )
    x, y = _vectors((20, 10, 5), features=3)
    lines = [f"{a!r};{b!r};cow{c};{d!r}\n" for (a, b, d), c in zip(x.tolist(), y)]
    (tmp_path / "t.csv").write_text("\ufeffone;two;Class;three\n" + "".join(lines))
    loaded = data.load(f"csv:{tmp_path / 't.csv'}")
    assert (loaded.class_names, loaded.class_counts) == (("cow0", "cow1", "cow2"), [16, 8, 4])
    assert loaded.preprocessing.input_shape == (3,)
    whole = torch.cat([loaded.x_train, loaded.x_test]).double() * loaded.std + loaded.mean
    assert np.allclose(np.sort(whole.numpy(), 0), np.sort(x, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column is called label, class, target, category, y; it has a, b"),
        ("a,label\n1,x\nz,y\n", "row 2: a is 'z', not a number"),
        ("a,label\n1,x\n2\n", "row 2 has 1 cells, the header 2"),
        ("label\nx\ny\n", "no column beside the label"),
        ("a,label,split\n1,x,dev\n", "row 1: split is 'dev', not train, val or test"),
        ("a,label\n", "holds no row below a header"),
        ("a,label\nnan,x\n1,x\n2,y\n3,y\n", "x_train holds NaN"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"t\.csv: {message}"):
        data.load(f"csv:{tmp_path / 't.csv'}")


def test_npz_under_either_naming_and_without_a_test_set(tmp_path):
    x, y = _vectors(SIZES)
    np.savez(tmp_path / "f.npz", features=x, labels=np.array(["a", "b", "c"])[y], files=[f"{i}.png" for i in range(50)])
    loaded = data.load(f"npz:{tmp_path / 'f.npz'}")
    assert (loaded.class_counts, torch.bincount(loaded.y_test).tolist()) == ([24, 11, 5], [6, 3, 1])
    assert sorted((*loaded.train_files, *loaded.test_files)) == sorted(f"{i}.png" for i in range(50))
    # The split follows the seed, and the share.
    other = data.load(f"npz:{tmp_path / 'f.npz'}", DataRequest(seed=1))
    assert other.train_files != loaded.train_files
    assert data.load(f"npz:{tmp_path / 'f.npz'}", DataRequest(test_split=0.5)).class_counts == [15, 7, 3]
    # What is left after the split is thinned, and the files with it.
    thinned = data.load(f"npz:{tmp_path / 'f.npz'}", DataRequest(imbalance=2))
    assert (thinned.class_counts, thinned.test_files) == ([5, 3, 2], loaded.test_files)
    assert set(thinned.train_files) < set(loaded.train_files)
    assert len(thinned.train_files) == 10


# Other libraries


class _Torch(torch.utils.data.Dataset):
    classes = ("ant", "bee")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):  # never raises IndexError: iterating it by Python's protocol would not end
        return torch.full((3, 4, 4), float(i)), i % 2


def test_torch_data_sets_and_a_function_by_import_path(tmp_path, monkeypatch):
    loaded = data.from_torch(_Torch(8), _Torch(4))
    assert (loaded.class_names, loaded.class_counts, loaded.input_shape) == (("ant", "bee"), [4, 4], (3, 4, 4))
    batches = data.from_torch(torch.utils.data.DataLoader(_Torch(8), batch_size=3), _Torch(4))
    assert torch.equal(batches.x_train, loaded.x_train)
    module = types.ModuleType("my_data")
    module.pair = lambda request: (_Torch(8), _Torch(4))
    module.alone = lambda request: _Torch(20)
    module.own = lambda request: loaded
    module.wrong = lambda request: 3
    monkeypatch.setitem(sys.modules, "my_data", module)
    assert torch.equal(data.load("my_data:pair").x_train, loaded.x_train)
    assert data.load("my_data:alone").class_counts == [8, 8]
    assert data.load("my_data:own") is loaded
    with pytest.raises(TypeError, match="returned int, not a Dataset"):
        data.load("my_data:wrong")
    with pytest.raises(ValueError, match="'my_data:none' cannot be imported"):
        data.load("my_data:none")
    with pytest.raises(TypeError, match="train must give"):
        data.from_torch([1, 2])
    with pytest.raises(ValueError, match=r"did you mean digits-lt\?"):
        data.load("Digits_LT")


def test_a_saved_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (6, 4), (20 * i, 0, 0)) for i in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    part = datasets.Dataset.from_dict({"image": pictures, "label": [0] * 6 + [1] * 4}, features=features)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(str(tmp_path / "saved"))
    loaded = data.load(f"hf:{tmp_path / 'saved'}", DataRequest(image_size=4))
    assert (loaded.class_names, loaded.class_counts, loaded.input_shape) == (("ant", "bee"), [6, 4], (3, 4, 4))
    raw = loaded.x_test[:, 0, 0, 0] * loaded.std[0] + loaded.mean[0]
    assert raw.round().tolist() == [20 * i for i in range(10)]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.load(f"hf:{tmp_path / 'none'}")


def _saved_pictures(tmp_path, **columns):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (6, 4), (20 * i, 0, 0)) for i in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    part = datasets.Dataset.from_dict({"image": pictures, "label": [0] * 6 + [1] * 4, **columns}, features=features)
    part.save_to_disk(str(tmp_path / "saved"))
    return part


def test_hugging_face_pictures_are_files_like_any(tmp_path, monkeypatch):
    part = _saved_pictures(tmp_path)
    whole = data.from_huggingface(part, image_size=4)
    assert whole.class_counts == [5, 3]
    assert data.from_huggingface(part, image_size=4, test_split=0.5).class_counts == [3, 2]
    thinned = data.load(f"hf:{tmp_path / 'saved'}", DataRequest(image_size=4, imbalance=1.5))
    assert thinned.class_counts == [3, 2]
    assert thinned.test_files == whole.test_files
    monkeypatch.setattr("ltkernels.train.data._lazy.MAX_IN_MEMORY", 10)
    lazy = data.load(f"hf:{tmp_path / 'saved'}", DataRequest(image_size=4, workers=1))
    assert torch.equal(torch.cat(list(lazy.x_train.split(3))), whole.x_train)
    monkeypatch.undo()
    monkeypatch.setattr("ltkernels.train.data._images.MAX_PIXELS", 20)
    with pytest.raises(ValueError, match=r"train\[\d\]: not a usable image: 6 x 4 pixels are more than 20"):
        data.load(f"hf:{tmp_path / 'saved'}", DataRequest(image_size=4))


def test_hugging_face_pictures_outside_of_the_folder_are_refused(tmp_path):
    """`save_to_disk` packs pictures; a stranger's set may name a path in their place."""
    (tmp_path / "set").mkdir()
    for place in (tmp_path / "secret.png", tmp_path / "set" / "own.png"):
        place.write_bytes(b"x")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", "link.png"):
        rows = [{"image": {"bytes": None, "path": str(tmp_path / "set" / name)}}]
        with pytest.raises(ValueError, match=r"\.png lies outside of the data set's folder"):
            _stored(rows, "image", 0, tmp_path / "set")
    rows[0]["image"]["path"] = str(tmp_path / "set" / "own.png")
    with _stored(rows, "image", 0, tmp_path / "set") as file:
        assert file.read() == b"x"


def test_hugging_face_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    x, y = _vectors(SIZES)
    columns = {f"c{j}": (1000.0 if j else 1.0) * x[:, j] for j in range(4)}
    table = datasets.Dataset.from_dict({**columns, "label": [("a", "b", "c")[c] for c in y]})
    loaded = data.from_huggingface(table)
    assert (loaded.class_names, loaded.class_counts, loaded.input_shape) == (("a", "b", "c"), [24, 11, 5], (4,))
    assert any("column c" in note and "times as far as column c0" in note for note in loaded.notes)
    listed = datasets.Dataset.from_dict({"features": x.tolist(), "label": y.tolist()})
    assert torch.equal(data.from_huggingface(listed).x_train, data.Dataset.from_arrays(x, y).x_train)
    with pytest.raises(ValueError, match="column c0 holds no numbers"):
        data.from_huggingface(datasets.Dataset.from_dict({"c0": ["x", "y"], "label": [0, 1]}))


# Folds


def test_folds_test_every_sample_once_and_every_class_in_each():
    x, y = _vectors((20, 7, 2, 1))
    names = [f"{i}" for i in range(30)]
    whole = Dataset.from_arrays(x, y, x, y, class_names=["a", "b", "c", "d"], train_files=tuple(names))
    parts = list(data.k_fold(whole, 5, seed=1))
    assert len(parts) == 5
    assert parts[0].notes[-2:] == (
        "left out, with one sample: d",
        "tested more than once, with fewer samples than 5 folds: c",
    )
    tested = sorted(int(name) for part in parts for name in part.test_files)
    assert sorted(set(tested)) == list(range(29))
    assert [tested.count(i) for i in range(27)] == [1] * 27
    for part in parts:
        assert part.class_names == ("a", "b", "c")
        assert not set(part.train_files) & set(part.test_files)
        assert torch.bincount(part.y_test).min() >= 1
        assert part.class_counts[2] == 1
        # By what it trains on, and back to the raw samples.
        rows = [int(name) for name in part.train_files]
        expected = (x[rows] - x[rows].mean(0)) / x[rows].std(0, ddof=1)
        assert np.allclose(part.x_train.numpy(), expected, atol=1e-5)
        held = [int(name) for name in part.test_files]
        assert np.allclose(part.x_test.double().numpy() * part.std.numpy() + part.mean.numpy(), x[held], atol=1e-5)
    for folds, message in ((1, "at least 2"), (21, "has 20 samples"), (True, "got True")):
        with pytest.raises(ValueError, match=message):
            next(data.k_fold(whole, folds))


def test_cross_validation_leaves_the_test_set_alone(tmp_path):
    x, y = _vectors((40, 20, 10))
    whole = Dataset.from_arrays(x, y, x[:0:-1][:3], [0, 1, 2])
    config = train.Config(epochs=3, threads=1)
    summary = train.cross_validate(config, whole, folds=3, out=tmp_path / "cv")
    assert (summary["folds"], len(summary["runs"])) == (3, 3)
    confusion = np.array(summary["variants"][0]["confusion"])
    assert confusion.sum(1).tolist() == [40, 20, 10]
    accuracies = [run["variants"][0]["balanced_accuracy"] for run in summary["runs"]]
    assert summary["balanced_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["std"]["balanced_accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert sum(summary["variants"][0]["reliability"]["samples"]) == 70
    again = train.cross_validate(config, whole, folds=3, out=tmp_path / "cv", resume="auto")
    assert again["runs"] == summary["runs"]
    assert train.load(tmp_path / "cv" / "fold-2").class_names == ("0", "1", "2")


# Validation


def test_with_a_validation_set_the_test_set_is_read_once(tmp_path):
    name = _npz(tmp_path / "d.npz", (40, 20, 1))
    config = train.Config(data=name, epochs=3, threads=1, val_split=0.25, loss="ce")
    said = []
    summary = train.train(config, out=tmp_path / "run", on_notes=said.extend)
    assert (
        said[-2:]
        == summary["notes"][-2:]
        == [
            "validated on 15 of 61 training samples, 0.25 of every class, at least one of each",
            "not among them, with one sample: 2",
        ]
    )
    from ltkernels.train.rundir import read_metrics

    records = read_metrics(tmp_path / "run")
    assert all("val_balanced_accuracy" in r and "test_balanced_accuracy" not in r for r in records)
    assert summary["best_balanced_accuracy"] is None
    # 10 and 5 are held out; the single sample stays in training.
    assert train.load(tmp_path / "run").class_counts == [30, 15, 1]
    # The numbers of the last epoch do not depend on what is looked at along the way.
    x, y = _vectors((40, 20, 1))
    data_set = data.load(name)
    val = Dataset.from_arrays(x, y, data_set.x_test, data_set.y_test, x_val=x[:5], y_val=y[:5])
    with_val, without = (
        train.train(train.Config(epochs=2, threads=1, loss="ce"), d)
        for d in (val, Dataset.from_arrays(x, y, data_set.x_test, data_set.y_test))
    )
    assert with_val["variants"][0]["confusion"] == without["variants"][0]["confusion"]
    assert with_val["best_balanced_accuracy"] is None
    assert without["best_balanced_accuracy"] is not None


# Refusals come before the first step


@pytest.mark.parametrize(
    ("sizes", "arguments", "words"),
    [
        ((30, 10), ("train", "--warmup", "99"), "warmup 99 is not below the number of epochs, 80"),
        ((30, 1), ("train", "--relative"), "relative"),
        ((30, 10), ("train", "--crop", "2"), "crop and flip need images"),
    ],
)
def test_counts_and_settings_are_refused_before_training(tmp_path, capsys, monkeypatch, sizes, arguments, words):
    from ltkernels.train import engine

    monkeypatch.setattr(engine.Training, "fit", lambda *_: pytest.fail("it trained"))
    name = _npz(tmp_path / "d.npz", sizes)
    line = _one_line(capsys, *arguments, "--data", name, "--epochs", 80, "--out", tmp_path / "run")
    assert words in line
    assert not (tmp_path / "run").exists()


def test_a_log_without_its_package_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in _one_line(
        capsys, "train", "--log", "tensorboard", "--epochs", 1, "--out", tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("x")
    assert "file is a file, not a folder" in _one_line(capsys, "train", "--epochs", 1, "--out", tmp_path / "file" / "x")


def test_a_class_of_one_sample_is_left_out_of_the_selection(tmp_path):
    name = _npz(tmp_path / "d.npz", (60, 20, 8, 1))
    summary = train.run(
        train.Config(data=name, epochs=2, retrain_epochs=1, random_repeats=1, head_ratio=0.5, threads=1)
    )
    assert [entry["label"] for entry in summary["tail"]["classes"]] == [1, 2]
    assert any("with one sample: 3" in note for note in summary["notes"])


@pytest.mark.parametrize(("sizes", "ratio"), [((60,), 0.9), ((40, 20), 1.0), ((40, 1), 0.9)])
def test_without_a_tail_class_to_complete_a_run_ends_well(tmp_path, sizes, ratio):
    name = _npz(tmp_path / "d.npz", sizes)
    config = train.Config(data=name, epochs=1, retrain_epochs=1, random_repeats=3, head_ratio=ratio, threads=1)
    summary = train.run(config, out=tmp_path / "run")
    assert summary["tail"]["classes"] == []
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_was_trained_stays_when_a_later_phase_fails(tmp_path, capsys):
    name = _npz(tmp_path / "d.npz")
    out = tmp_path / "run"
    line = _one_line(
        capsys,
        "run",
        "--data",
        name,
        "--epochs",
        2,
        "--quiet",
        "--retrain-lr",
        1e30,
        "--head-ratio",
        0.5,
        "--random-repeats",
        1,
        "--out",
        out,
    )
    assert f"what was trained is kept: {out / 'checkpoints'}, ce.pt, logit_adjusted.pt" in line
    for variant in ("ce", "logit_adjusted"):
        assert train.load(out / "checkpoints" / f"{variant}.pt").class_counts == list(SIZES)
    # A training that failed by itself leaves nothing, as before.
    _one_line(capsys, "train", "--data", name, "--epochs", 2, "--lr", 1e30, "--quiet", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Python calls on arrays of other layouts


@pytest.mark.parametrize(
    "turn", [lambda a: a.astype(">f4"), lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.astype(">f8")]
)
def test_diversity_and_selection_read_arrays_for_their_values(turn):
    from ltkernels import diversity, selection

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
    x, y = _vectors((30, 12, 6), features=6)
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
    x, y = _vectors((30, 30))
    for name, names in (("f", np.array([b"ant", b"bee"])), ("g", np.array(["ant", "bee"]))):
        np.savez(tmp_path / f"{name}.npz", features=x, labels=y, class_names=names)
        assert main(["statistics", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / f"{name}s.npz")]) == 0
    capsys.readouterr()
    assert main(["statistics", "--merge", str(tmp_path / "fs.npz"), str(tmp_path / "gs.npz")]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["ant", "60"], ["bee", "60"]]


def test_select_leaves_classes_of_one_sample_out_and_names_the_file(tmp_path, capsys):
    x, y = _vectors((40, 8, 1), features=6)
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
        assert word in _one_line(capsys, "select", path, *flags, *more)
    np.savez(path, features=x, labels=y, class_names=["a", "b", "a"])
    for command in ("audit", "statistics"):
        assert "f.npz: class_names holds 'a' twice" in _one_line(
            capsys, command, path, *(flags[-2:] if command != "statistics" else [])
        )


def test_labels_of_a_file_that_mean_nothing_are_named(tmp_path, capsys):
    x, y = _vectors((30, 30))
    np.savez(tmp_path / "half.npz", features=x, labels=y + 0.5)
    assert "half.npz: labels must hold integers" in _one_line(capsys, "statistics", tmp_path / "half.npz")
