"""CIFAR from its archives: versions and places agree, broken files are named, malicious pickles run nothing."""

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ltkernels.train import data
from ltkernels.train.data import DataRequest, _archive
from ltkernels.train.data.cifar import pickled_bytes, pickled_list

PER_CLASS = 4


def _cifar(classes: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` images of each class; the first pixel of each plane holds the label, the second a running number."""
    labels = np.tile(np.arange(classes), rows)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 3, 32, 32)).astype(np.uint8)
    images[:, :, 0, 0] = labels[:, None]
    images[:, :, 0, 1] = (np.arange(len(labels)) % 256)[:, None]
    return images, labels


def _binary(images: np.ndarray, labels: np.ndarray, coarse: bool) -> bytes:
    heads = [labels[:, None].astype(np.uint8)]
    if coarse:
        heads.insert(0, (labels[:, None] // 5).astype(np.uint8))
    return np.concatenate([*heads, images.reshape(len(images), -1)], 1).tobytes()


def _python2_pickle(value: dict) -> bytes:
    """Protocol 2 as Python 2 wrote it: keys and array data are byte strings (opcodes U and T), not unicode."""

    def text(raw: bytes) -> bytes:
        return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<I", len(raw)) + raw

    def item(v: object) -> bytes:
        if isinstance(v, bytes):
            return text(v)
        if isinstance(v, int):
            return b"J" + struct.pack("<i", v)
        if isinstance(v, list):
            return b"](" + b"".join(item(x) for x in v) + b"e"
        assert isinstance(v, np.ndarray)
        make = (
            b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + item(0) + b"\x85" + text(b"b") + b"\x87R"
        )
        kind = b"cnumpy\ndtype\n" + text(b"u1") + item(0) + item(1) + b"\x87R"
        kind += b"(" + item(3) + text(b"|") + b"NNN" + item(-1) + item(-1) + item(0) + b"tb"
        shape = b"".join(item(int(s)) for s in v.shape) + b"\x86"
        return make + b"(" + item(1) + shape + kind + b"\x89" + text(v.tobytes()) + b"tb"

    pairs = b"".join(item(k) + item(v) for k, v in value.items())
    return b"\x80\x02}(" + pairs + b"u."


def _files(name: str, version: str) -> dict[str, bytes]:
    """The files of a small CIFAR: 20 (10 classes) or 4 images of each class for training, 2 for testing."""
    classes = 10 if name == "cifar10-lt" else 100
    x, y = _cifar(classes, 20 if classes == 10 else PER_CLASS)
    x_test, y_test = _cifar(classes, 2)
    names = [f"class{i}" for i in range(classes)]
    if version == "binary":
        parts = np.array_split(np.arange(len(y)), 5 if classes == 10 else 1)
        train = [f"data_batch_{i}.bin" for i in range(1, 6)] if classes == 10 else ["train.bin"]
        files = {f: _binary(x[p], y[p], classes == 100) for f, p in zip(train, parts)}
        files["test_batch.bin" if classes == 10 else "test.bin"] = _binary(x_test, y_test, classes == 100)
        files["batches.meta.txt" if classes == 10 else "fine_label_names.txt"] = "\n".join(names).encode()
        return files
    key = b"labels" if classes == 10 else b"fine_labels"
    parts = np.array_split(np.arange(len(y)), 5 if classes == 10 else 1)
    train = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    files = {
        f: _python2_pickle({b"data": x[p].reshape(len(p), -1), key: y[p].tolist(), b"batch_label": b"b"})
        for f, p in zip(train, parts)
    }
    files["test_batch" if classes == 10 else "test"] = _python2_pickle(
        {b"data": x_test.reshape(len(x_test), -1), key: y_test.tolist()}
    )
    meta = b"label_names" if classes == 10 else b"fine_label_names"
    files["batches.meta" if classes == 10 else "meta"] = _python2_pickle({meta: [n.encode() for n in names]})
    return files


FOLDERS = {
    ("cifar10-lt", "binary"): ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    ("cifar10-lt", "python"): ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ("cifar100-lt", "binary"): ("cifar-100-binary", "cifar-100-binary.tar.gz"),
    ("cifar100-lt", "python"): ("cifar-100-python", "cifar-100-python.tar.gz"),
}


def _write(where: Path, files: dict[str, bytes], folder: str, archive: str, form: str) -> None:
    if form == "archive":
        with tarfile.open(where / archive, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return
    place = where / folder if form == "folder" else where
    place.mkdir(exist_ok=True)
    for name, content in files.items():
        (place / name).write_bytes(content)


@pytest.mark.parametrize(("name", "version"), FOLDERS)
def test_cifar_versions_and_places_agree(tmp_path, name, version):
    loaded = []
    for form in ("archive", "folder", "flat"):
        where = tmp_path / form
        where.mkdir()
        _write(where, _files(name, version), *FOLDERS[name, version], form)
        loaded.append(data.load(name, DataRequest(data_dir=where, imbalance=2)))
    for one in loaded[1:]:
        assert torch.equal(one.x_train, loaded[0].x_train)
    one = loaded[0]
    classes = 10 if name == "cifar10-lt" else 100
    assert one.class_names == tuple(f"class{i}" for i in range(classes))
    assert one.class_counts == data.class_sizes(20 if classes == 10 else PER_CLASS, classes, 2)
    assert one.input_shape == (3, 32, 32)
    assert len(one.y_test) == 2 * classes
    # Images and labels belong together, channels are planes: the first pixel of each plane holds the label.
    raw = (one.x_train * one.std.view(1, 3, 1, 1) + one.mean.view(1, 3, 1, 1)).round()
    assert torch.equal(raw[:, :, 0, 0].long(), one.y_train[:, None].expand(-1, 3))


def test_binary_and_python_versions_are_the_same_data(tmp_path):
    sets = []
    for version in ("binary", "python"):
        (tmp_path / version).mkdir()
        _write(tmp_path / version, _files("cifar10-lt", version), *FOLDERS["cifar10-lt", version], "folder")
        sets.append(data.load("cifar10-lt", DataRequest(data_dir=tmp_path / version, imbalance=5)))
    assert torch.equal(sets[0].x_train, sets[1].x_train)
    assert torch.equal(sets[0].x_test, sets[1].x_test)


def test_missing_cifar_says_where_to_put_it(tmp_path):
    for request in (DataRequest(), DataRequest(data_dir=tmp_path)):
        with pytest.raises(
            FileNotFoundError, match=r"cifar-10-binary\.tar\.gz or cifar-10-python\.tar\.gz.*--data-dir"
        ):
            data.load("cifar10-lt", request)
    files = _files("cifar10-lt", "binary")
    del files["data_batch_3.bin"]
    _write(tmp_path, files, *FOLDERS["cifar10-lt", "binary"], "archive")
    with pytest.raises(FileNotFoundError, match=r"lacks cifar-10-batches-bin/data_batch_3\.bin"):
        data.load("cifar10-lt", DataRequest(data_dir=tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data_batch_2.bin", b"\0" * 3072, "not a number of images of 3073"),
        ("data_batch_2.bin", b"", "0 bytes are not"),
        ("data_batch_2.bin", b"\x0a" + b"\0" * 3072, "label 10, cifar10-lt has 10"),
        ("batches.meta.txt", b"one two", "2 class names, not 10"),
    ],
)
def test_broken_cifar_files_are_named(tmp_path, file, content, message):
    _write(tmp_path, {**_files("cifar10-lt", "binary"), file: content}, *FOLDERS["cifar10-lt", "binary"], "flat")
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        data.load("cifar10-lt", DataRequest(data_dir=tmp_path))


def test_damaged_and_oversized_archives(tmp_path, monkeypatch):
    _write(tmp_path, _files("cifar10-lt", "binary"), *FOLDERS["cifar10-lt", "binary"], "archive")
    path = tmp_path / "cifar-10-binary.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete archive"):
        data.load("cifar10-lt", DataRequest(data_dir=tmp_path))
    path.write_bytes(whole)
    for bound in ("MAX_MEMBER_BYTES", "MAX_ARCHIVE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(_archive, bound, 1000)
            with pytest.raises(ValueError, match="1000 bytes"):
                data.load("cifar10-lt", DataRequest(data_dir=tmp_path))


class _Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _forged(mark: Path) -> dict[str, bytes]:
    array = _python2_pickle({b"data": np.zeros((1, 4), np.uint8)})
    return {
        "a shell command": pickle.dumps({b"data": _Calls(os.system, f"touch {mark}")}),
        "a builtin": pickle.dumps(_Calls(eval, f"open({str(mark)!r}, 'w')")),
        "a builtin by attribute": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nU\x05dtypetR.",
        "a function of numpy": b"cnumpy\nload\n(U\x01xtR.",
        "codecs": b"c_codecs\nencode\n(X\x01\0\0\0aX\x06\0\0\0latin1tR.",
        "too few bytes": array,
        "bytes in Fortran's order": array.replace(b"\x89", b"\x88"),
        "an array without content": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01btR.",
        "a memo of gigabytes": b"]r\xff\xff\xff\x7f.",
        "a string longer than the file": b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "a label without a size": _python2_pickle({b"data": np.zeros((1, 3072), np.uint8)})[:-2]
        + b"U\x06labels](L"
        + b"9" * 4000
        + b"L\neu.",
        "names for labels": pickle.dumps({"labels": ["a"]}, 2) + array,
        "a list in itself": b"]q\0h\0a.",
        "half a file": array[:-30],
        "no pickle": b"junk",
        "nothing": b"",
    }


@pytest.mark.parametrize("what", _forged(Path("owned")))
def test_malicious_pickles_are_refused_and_run_nothing(tmp_path, what):
    where, mark = tmp_path / "data", tmp_path / "owned"
    where.mkdir()
    files = {**_files("cifar10-lt", "python"), "data_batch_3": _forged(mark)[what]}
    _write(where, files, *FOLDERS["cifar10-lt", "python"], "archive")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py/data_batch_3: .{,300}$"):
        data.load("cifar10-lt", DataRequest(data_dir=where))
    assert not mark.exists()


def test_what_stands_beside_the_data_is_not_run(tmp_path):
    mark = tmp_path / "owned"
    batch = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2], "more": _Calls(os.mkdir, str(mark))}
    content = pickle.dumps(batch, 4)
    assert (pickled_bytes(content, "data"), pickled_list(content, "labels")) == (bytes(range(6)), [1, 2])
    assert not mark.exists()
    pickle.loads(content)  # a reader that trusts it
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_lists_end_where_they_end(protocol):
    value = {"a": [9], "labels": list(range(40_000)), "num": 7, "names": ["x", "y"], "last": 3}
    content = pickle.dumps(value, protocol)
    assert pickled_list(content, "labels") == value["labels"]
    assert pickled_list(content, "names") == ["x", "y"]
    assert (pickled_list(content, "none"), pickled_bytes(content, "none")) == ([], b"")


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_todays_numpy_are_read(protocol, order):
    value = {"data": np.asarray(np.arange(12, dtype=np.uint8).reshape(3, 4), order=order), "labels": [2, 0, 1]}
    content = pickle.dumps(value, protocol)
    # Fortran's order is not that of images: such bytes are not taken for them.
    assert pickled_bytes(content, "data") == (bytes(range(12)) if order == "C" else b"")
    assert pickled_list(content, "labels") == [2, 0, 1]
