"""Data sets made of files that nobody vouches for: CIFAR's archives, image trees, Debian's drawings. Pillow is optional."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ltkernels.train import data
from ltkernels.train.data import DataRequest, _archive, _images, openclipart
from ltkernels.train.data._pickle import load_plain
from ltkernels.train.data.folder import natural_key

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


def _forged(tmp_path: Path) -> dict[str, bytes]:
    mark = str(tmp_path / "owned")
    array = _python2_pickle({b"data": np.zeros((1, 4), np.uint8)})
    return {
        "a shell command": pickle.dumps({b"data": _Calls(os.system, f"touch {mark}")}),
        "a builtin": pickle.dumps(_Calls(eval, f"open({mark!r}, 'w')")),
        "a builtin by attribute": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nU\x05dtypetR.",
        "a function of numpy": b"cnumpy\nload\n(U\x01xtR.",
        "codecs": b"c_codecs\nencode\n(X\x01\0\0\0aX\x06\0\0\0latin1tR.",
        "an object array": array.replace(b"U\x02u1", b"U\x01O"),
        "an integer array": array.replace(b"U\x02u1", b"U\x02i8"),
        "a wrong shape": array.replace(b"J\x04\0\0\0", b"J\x05\0\0\0"),
        "an array without content": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01btR.",
        "a change of the stand-in": b"cnumpy\ndtype\n}U\x08__init__J\0\0\0\0sb.",
        "a memo of gigabytes": b"]r\xff\xff\xff\x7f.",
        "a string longer than the file": b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "a set": pickle.dumps({1, 2}),
        "a float": pickle.dumps([1.5]),
        "a tuple": pickle.dumps((1, 2)),
        "a list in itself": b"]q\0h\0a.",
        "half a file": array[:-30],
        "no pickle": b"junk",
        "nothing": b"",
    }


def test_malicious_pickles_are_refused_and_run_nothing(tmp_path):
    for what, content in _forged(tmp_path).items():
        with pytest.raises(ValueError, match="the file: "):
            pytest.fail(f"{what} was read: {load_plain(content, 'the file')!r}")
    assert list(tmp_path.iterdir()) == []
    # Refusals leave nothing behind: an honest file is read as before.
    honest = load_plain(_python2_pickle({b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"n": [1, 2]}), "x")
    assert honest[b"data"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert honest[b"n"] == [1, 2]


def test_a_malicious_cifar_is_refused(tmp_path):
    where, mark = tmp_path / "data", tmp_path / "owned"
    where.mkdir()
    files = _files("cifar10-lt", "python")
    files["data_batch_3"] = pickle.dumps({b"data": _Calls(os.system, f"touch {mark}")})
    _write(where, files, *FOLDERS["cifar10-lt", "python"], "archive")
    with pytest.raises(ValueError, match=r"data_batch_3: not a pickle of plain data: it asks for \w+\.system"):
        data.load("cifar10-lt", DataRequest(data_dir=where))
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_todays_numpy_are_read(protocol, order):
    value = {"data": np.asarray(np.arange(12, dtype=np.uint8).reshape(3, 4), order=order), "labels": [2, 0, 1]}
    read = load_plain(pickle.dumps(value, protocol), "x")
    assert np.array_equal(read["data"], value["data"])
    assert read["labels"] == [2, 0, 1]


# Image trees -----------------------------------------------------------------------------------------------------------------


def _png(width: int, height: int, value: int = 0) -> bytes:
    """A grey PNG by hand, so that forged headers need no encoder."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = (b"\0" + bytes([value]) * width) * min(height, 4096)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _tree(counts: dict[str, int], size: int = 4) -> dict[str, bytes]:
    files = {}
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            files[f"train/{name}/{i}.png"] = _png(size, size, 20 * label + i)
        files[f"test/{name}/t.png"] = _png(size, size, 20 * label + 19)
    return files


def _put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _archived(path: Path, files: dict[str, bytes], prefix: str = "top/") -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(prefix + name, content)
        return path
    with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
        # Not in the order of the labels, as archives are.
        for name, content in sorted(files.items(), key=lambda item: item[0][::-1]):
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


COUNTS = {"2_cat": 8, "10_dog": 5, "<script>": 3}


@pytest.fixture
def pil():
    return pytest.importorskip("PIL.Image")


def _grey(loaded: data.Dataset) -> torch.Tensor:
    return (loaded.x_train * loaded.std.view(1, 3, 1, 1) + loaded.mean.view(1, 3, 1, 1)).round().long()[:, 0, 0, 0]


@pytest.mark.parametrize("form", ["", ".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_folder_and_archives_give_the_same(tmp_path, pil, form):
    files = {**_tree(COUNTS), "train/2_cat/notes.txt": b"x", "train/2_cat/.hidden.png": b"x", "other/a/b.png": b"x"}
    if form:
        path = _archived(tmp_path / f"set{form}", files, prefix="" if form == ".tar" else "top/")
    else:
        path = _put(tmp_path / "set", files)
    loaded = data.load(f"folder:{path}")
    names = sorted(COUNTS, key=natural_key)
    assert loaded.class_names == tuple(names)
    assert loaded.class_counts == [COUNTS[name] for name in names]
    original = list(COUNTS)
    expected = [20 * original.index(name) + i for name in names for i in range(COUNTS[name])]
    assert _grey(loaded).tolist() == expected
    assert loaded.input_shape == (3, 4, 4)


def test_folder_is_thinned_before_it_is_decoded(tmp_path, pil):
    files = _tree(COUNTS)
    path = _put(tmp_path, files)
    kept = data.load(f"folder:{path}", DataRequest(imbalance=1.5))
    assert kept.class_counts == [3, 2, 2]
    everything = data.load(f"folder:{path}")
    broken = set(_grey(everything).tolist()) - set(_grey(kept).tolist())
    for name in files:
        if name.startswith("train/") and _grey_of(files[name]) in broken:
            (path / name).write_bytes(b"junk")
    assert torch.equal(data.load(f"folder:{path}", DataRequest(imbalance=1.5)).x_train, kept.x_train)
    with pytest.raises(ValueError, match="not a usable PNG or JPEG"):
        data.load(f"folder:{path}")


def _grey_of(content: bytes) -> int:
    start = content.index(b"IDAT") + 4
    return zlib.decompress(content[start:])[1]


def test_headers_of_archives_are_bounded_too(tmp_path, pil, monkeypatch):
    path = tmp_path / "set.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("train/a/0.png")
        info.pax_headers = {"comment": "x" * 200_000}  # tarfile reads such a header whole
        archive.addfile(info)
    monkeypatch.setattr(_archive, "MAX_MEMBER_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"set\.tar\.gz.*a part of more than 100000 bytes"):
        data.load(f"folder:{path}")


def test_natural_order():
    assert sorted(["b10", "b9", "a", "10", "9", "b9c"], key=natural_key) == ["9", "10", "a", "b9", "b9c", "b10"]


def test_image_size_scales_and_cuts(tmp_path, pil):
    files = _tree({"a": 2, "b": 2}, size=6)
    wide = pil.new("RGB", (20, 10), "white")
    wide.paste((0, 0, 0), (3, 0, 17, 10))
    buffer = io.BytesIO()
    wide.save(buffer, "png")
    path = _put(tmp_path, {**files, "train/a/wide.png": buffer.getvalue()})
    with pytest.raises(ValueError, match=r"20 x 10 pixels, another image has 6 x 6; set image_size"):
        data.load(f"folder:{path}")
    loaded = data.load(f"folder:{path}", DataRequest(image_size=5))
    assert loaded.input_shape == (3, 5, 5)
    # The central square of the wide image is black.
    row = (loaded.x_train * loaded.std.view(1, 3, 1, 1) + loaded.mean.view(1, 3, 1, 1))[2]
    assert row.abs().max() < 1e-3


def test_transparency_is_white_and_orientation_is_followed(tmp_path, pil):
    clear = pil.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = pil.new("P", (4, 4), 3)
    palette.putpalette(bytes(12))
    turned = pil.new("RGB", (4, 4), "black")
    turned.paste((255, 255, 255), (0, 0, 4, 2))
    exif = pil.Exif()
    exif[0x0112] = 3  # upside down
    sources = []
    for image, kind, extra in (
        (clear, "png", {}), (palette, "png", {"transparency": 3}), (turned, "jpeg", {"exif": exif, "quality": 100}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, kind, **extra)
        sources.append(_images.Source("x", partial(io.BytesIO, buffer.getvalue())))
    pixels = _images.decode(sources, None)
    assert bool((pixels[:2] == 255).all())
    assert pixels[2, :, :2].max() < 30
    assert pixels[2, :, 2:].min() > 225


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_png(60_000, 60_000), "60000|exceeds"),  # 3.6 gigapixels in a few kilobytes
        (_png(9000, 9000), "9000 x 9000 pixels are more than"),
        (_png(4, 4)[:40], "not a usable PNG"),
        (b"GIF89a" + bytes(50), "cannot identify"),
        (b"", "cannot identify"),
    ],
)
def test_bombs_and_broken_images_are_refused(tmp_path, pil, content, message):
    path = _put(tmp_path, {**_tree({"a": 2, "b": 2}), "train/b/1.png": content})
    with pytest.raises(ValueError, match=rf"train/b/1\.png.*({message})"):
        data.load(f"folder:{path}")


def test_totals_and_file_sizes_are_bounded(tmp_path, pil, monkeypatch):
    path = _put(tmp_path / "set", _tree({"a": 2, "b": 2}))
    packed = _archived(tmp_path / "set.zip", _tree({"a": 2, "b": 2}))
    for target in (path, packed):
        for bound, message in (("MAX_FILE_BYTES", "larger than 50 bytes"), ("MAX_TOTAL_BYTES", "smaller image_size")):
            with monkeypatch.context() as patch:
                patch.setattr(_images, bound, 50)
                with pytest.raises(ValueError, match=message):
                    data.load(f"folder:{target}")
    with pytest.raises(ValueError, match="image_size must be between"):
        data.load(f"folder:{path}", DataRequest(image_size=10**6))


def test_no_path_outside_the_folder(tmp_path, pil):
    root = _put(tmp_path / "set", _tree({"a": 2, "b": 2}))
    secret = _put(tmp_path / "elsewhere", {"secret.png": _png(4, 4)})
    (root / "train/a/link.png").symlink_to(root / "train/b/0.png")
    assert data.load(f"folder:{root}").class_counts == [3, 2]
    for link, target in ((root / "train/b/link.png", secret / "secret.png"), (root / "train/c", secret)):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=f"{link}: leads out of {root}"):
            data.load(f"folder:{root}")
        link.unlink()
    # In an archive, such members are not part of the tree.
    files = _tree({"a": 2, "b": 2})
    path = _archived(tmp_path / "up.zip", {**{f"top/{k}": v for k, v in files.items()}, "../train/a/x.png": b""}, "")
    assert data.load(f"folder:{path}").class_counts == [2, 2]
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret / "secret.png")
        tar.addfile(link)
    assert data.load(f"folder:{tmp_path / 'link.tar'}").class_counts == [2, 2]


def test_folder_errors_are_in_words(tmp_path, pil, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=r"no image train/CLASS/\*\.png"):
        data.load(f"folder:{tmp_path}")
    files = _tree({"a": 2, "b": 2})
    del files["test/b/t.png"]
    root = _put(tmp_path / "set", files)
    with pytest.raises(ValueError, match="class b has images in train, none in test"):
        data.load(f"folder:{root}")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match="neither a folder nor"):
        data.load(f"folder:{tmp_path / 'file'}")
    whole = _archived(tmp_path / "set.tar.xz", _tree({"a": 2, "b": 2})).read_bytes()
    (tmp_path / "set.tar.xz").write_bytes(whole[: len(whole) - 60])
    with pytest.raises(ValueError, match="not a complete archive"):
        data.load(f"folder:{tmp_path / 'set.tar.xz'}")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"Pillow: pip install \"ltkernels\[images\]\""):
        data.load(f"folder:{_put(tmp_path / 'whole', _tree({'a': 2, 'b': 2}))}")


def test_what_was_decoded_can_be_kept_as_npz(tmp_path, pil):
    first = data.load(f"folder:{_put(tmp_path / 'set', _tree(COUNTS))}")
    first.save_npz(tmp_path / "set.npz")
    again = data.load(f"npz:{tmp_path / 'set.npz'}")
    assert torch.equal(again.x_train, first.x_train)
    assert torch.equal(again.x_test, first.x_test)
    assert again.class_names == first.class_names
    with np.load(tmp_path / "set.npz") as stored:
        assert stored["x_train"].dtype == np.uint8
    with pytest.raises(FileExistsError):
        first.save_npz(tmp_path / "set.npz")


def test_openclipart_counts_drawings_not_links_and_holds_out_singles(tmp_path, pil):
    root = tmp_path / "png"
    files = {}
    for label, (name, count) in enumerate({"animals/birds": 30, "animals": 16, "food": 20, "food/fruit": 14}.items()):
        for i in range(count):
            files[f"{name}/deep{i % 2}/{i}.png" if "/" in name else f"{name}/{i}.png"] = _png(8, 8, 50 * label + i)
    for i in range(1, 20):  # copies of one drawing: never held out
        files[f"food/copy{i}.png"] = files["food/0.png"]
    _put(root, {**files, "animals/birds/huge.png": _png(5000, 5000)})
    for i in range(40):
        (root / f"food/fruit/link{i}.png").symlink_to("../0.png")
    loaded = data.load("openclipart-lt", DataRequest(data_dir=root, image_size=8))
    assert loaded.class_names == ("animals", "animals/birds", "food")
    assert loaded.class_counts == [11, 25, 34]
    assert torch.bincount(loaded.y_test).tolist() == [5, 5, 5]
    train = {x.numpy().tobytes() for x in loaded.x_train}
    assert not train & {x.numpy().tobytes() for x in loaded.x_test}
    with pytest.raises(FileNotFoundError, match="apt-get install openclipart-png"):
        data.load("openclipart-lt", DataRequest(data_dir=tmp_path / "nowhere"))


@pytest.mark.skipif(not openclipart.DEBIAN_DIR.is_dir(), reason="Debian's openclipart-png is not installed")
def test_openclipart_golden_counts():
    loaded = data.load("openclipart-lt")
    assert loaded.num_classes == 60
    assert (max(loaded.class_counts), min(loaded.class_counts), sum(loaded.class_counts)) == (1524, 10, 6429)


def test_other_formats_are_refused_although_pillow_reads_them(tmp_path, pil):
    buffer = io.BytesIO()
    pil.new("RGB", (4, 4)).save(buffer, "gif")
    path = _put(tmp_path, {**_tree({"a": 2, "b": 2}), "train/b/1.png": buffer.getvalue()})
    with pytest.raises(ValueError, match=r"train/b/1\.png: not a usable PNG or JPEG"):
        data.load(f"folder:{path}")


def test_archives_are_read_in_their_own_order(pil):
    opened = []

    def source(place: int) -> _images.Source:
        def opener() -> io.BytesIO:
            opened.append(place)
            return io.BytesIO(_png(2, 2, place))

        return _images.Source("x", opener, place)

    places = [7, 3, 9, 1]
    pixels = _images.decode([source(place) for place in places], None)
    assert opened == sorted(places)
    assert pixels[:, 0, 0, 0].tolist() == places
