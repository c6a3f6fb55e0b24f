"""Where data comes from and how it is read: list files, tables, arrays as people have them, other libraries' data sets."""

import sys
import types

import numpy as np
import pytest
import torch
from small_data import SIZES, vectors

from ltkernels import train
from ltkernels._arrays import class_indices
from ltkernels.train import data
from ltkernels.train.data import DataRequest, Dataset, make_long_tailed
from ltkernels.train.data._objects import _stored
from ltkernels.train.jobs import vector_defaults

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
    x, y = vectors(SIZES)
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
    x, y = vectors((30, 30), features=8)
    x += offset
    loaded = Dataset.from_arrays(x, y, x, y)
    assert np.abs(loaded.x_train.numpy() - (x - x.mean(0)) / x.std(0, ddof=1)).max() < 1e-6
    assert torch.equal(loaded.preprocessing(x), loaded.x_train)


def test_columns_that_are_strange_are_named():
    x, y = vectors(SIZES, features=4)
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
    x, y = vectors((20, 10, 5), features=3)
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
    x, y = vectors(SIZES)
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
    x, y = vectors(SIZES)
    columns = {f"c{j}": (1000.0 if j else 1.0) * x[:, j] for j in range(4)}
    table = datasets.Dataset.from_dict({**columns, "label": [("a", "b", "c")[c] for c in y]})
    loaded = data.from_huggingface(table)
    assert (loaded.class_names, loaded.class_counts, loaded.input_shape) == (("a", "b", "c"), [24, 11, 5], (4,))
    assert any("column c" in note and "times as far as column c0" in note for note in loaded.notes)
    listed = datasets.Dataset.from_dict({"features": x.tolist(), "label": y.tolist()})
    assert torch.equal(data.from_huggingface(listed).x_train, data.Dataset.from_arrays(x, y).x_train)
    with pytest.raises(ValueError, match="column c0 holds no numbers"):
        data.from_huggingface(datasets.Dataset.from_dict({"c0": ["x", "y"], "label": [0, 1]}))
