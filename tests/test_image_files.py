"""Image trees and archives of them: files that nobody vouches for. Pillow is optional."""

import io
import struct
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ltkernels import train
from ltkernels.train import data
from ltkernels.train.data import DataRequest, _archive, _images, _lazy
from ltkernels.train.data.folder import natural_key


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
    with pytest.raises(ValueError, match="not a usable image"):
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


def test_a_folder_trains(tmp_path, pil):
    path = _put(tmp_path / "set", _tree(COUNTS))
    summary = train.train(
        train.Config(data=f"folder:{path}", loss="ce", model="mlp", epochs=1, threads=1, image_size=3)
    )
    assert summary["class_names"] == sorted(COUNTS, key=natural_key)
    assert len(summary["features"]["class_diversity"]) == 3


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
    pixels = _images.pictures(sources, None)
    assert bool((pixels[:2] == 255).all())
    assert pixels[2, :, :2].max() < 30
    assert pixels[2, :, 2:].min() > 225


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_png(60_000, 60_000), "60000|exceeds"),  # 3.6 gigapixels in a few kilobytes
        (_png(9000, 9000), "9000 x 9000 pixels are more than"),
        (_png(4, 4)[:40], "not a usable image"),
        (b"GIF89a" + bytes(50), "not a usable image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
            "not a usable image: by its content it is none of PNG, JPEG",
        ),
        (b"", "not a usable image: the file is empty"),
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
        with monkeypatch.context() as patch:
            patch.setattr(_images, "MAX_FILE_BYTES", 50)
            with pytest.raises(ValueError, match="larger than 50 bytes"):
                data.load(f"folder:{target}")
    monkeypatch.setattr(_lazy, "MAX_IN_MEMORY", 50)
    with pytest.raises(ValueError, match="smaller image_size"):
        data.load(f"folder:{packed}")
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


@pytest.mark.parametrize("kind", ["gif", "webp", "bmp", "tiff", "ppm"])
def test_other_formats_are_read_by_their_content(tmp_path, pil, kind):
    buffer = io.BytesIO()
    pil.new("RGB", (4, 4), (200, 200, 200)).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    files = {
        **_tree({"a": 2, "b": 2}),
        "train/b/1.png": buffer.getvalue(),
        f"train/b/2.{kind.upper()}": buffer.getvalue(),
    }
    loaded = data.load(f"folder:{_put(tmp_path, files)}")
    assert loaded.class_counts == [2, 3]
    assert _grey(loaded).tolist() == [0, 1, 20, 200, 200]
    assert loaded.notes == ()


def test_what_is_not_read_is_counted_and_a_lost_class_is_refused(tmp_path, pil):
    files = {**_tree({"a": 3, "b": 2}), "train/a/x.heic": b"1", "train/a/y.heic": b"1", "test/b/notes.txt": b"1"}
    assert data.load(f"folder:{_put(tmp_path / 'one', files)}").notes == (
        "3 files of other kinds are not read: 2 .heic, 1 .txt",
    )
    for extra, what in (
        ({"train/c/0.heic": b"1"}, "1 .heic"),
        ({"train/c/0.svg": b"", "train/c/1": b""}, "1 .svg, 1 without"),
    ):
        root = _put(tmp_path / what.replace(" ", ""), {**files, **extra})
        with pytest.raises(ValueError, match=rf"class c has no image that is read \({what}"):
            data.load(f"folder:{root}")
    (tmp_path / "one" / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class empty has no image that is read \(its folder is empty\)"):
        data.load(f"folder:{tmp_path / 'one'}")


def test_every_layout_gives_the_same_classes(tmp_path, pil):
    files = _tree(COUNTS)
    expected = data.load(f"folder:{_put(tmp_path / 'plain', files)}")
    for name, turn in {
        "capitals": lambda k: k.replace("train/", "Train/").replace("test/", "TEST/"),
        "val": lambda k: k.replace("test/", "val/"),
        "deeper": lambda k: f"a/b/c/{k}",
        "subfolders": lambda k: k.replace("/2_cat/", "/2_cat/more/"),
    }.items():
        renamed = {turn(key): content for key, content in files.items()}
        loaded = data.load(f"folder:{_put(tmp_path / name, renamed)}")
        assert torch.equal(loaded.x_train, expected.x_train), name
        assert torch.equal(loaded.y_test, expected.y_test), name
        assert loaded.class_names == expected.class_names, name
        assert (loaded.notes == ()) == (name != "val")
    zipped = _archived(
        tmp_path / "back.zip", {key.replace("/", "\\"): content for key, content in files.items()}, "top\\"
    )
    assert torch.equal(data.load(f"folder:{zipped}").x_train, expected.x_train)
    three = {**files, **{k.replace("test/", "Valid/"): v for k, v in files.items() if k.startswith("test/2")}}
    loaded = data.load(f"folder:{_put(tmp_path / 'three', three)}")
    assert loaded.y_val.tolist() == [0]
    assert torch.equal(loaded.x_train, expected.x_train)


def test_a_folder_without_a_split_is_split(tmp_path, pil):
    files = {f"set/{key.removeprefix('train/')}": v for key, v in _tree({"a": 20, "b": 10, "c": 2, "train": 1}).items()}
    files = {key: v for key, v in files.items() if "test/" not in key}
    loaded = data.load(f"folder:{_put(tmp_path, files)}")
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.class_counts == [16, 8, 1]
    assert torch.bincount(loaded.y_test).tolist() == [4, 2, 1]
    assert loaded.notes[-1] == "left out, with one sample: train"
    assert "7 of 33 samples are held out" in loaded.notes[0]
    assert sorted((*loaded.train_files, *loaded.test_files)) == sorted(k for k in files if "/train/" not in k)
    # The files are those of the samples.
    value = _grey(loaded)
    assert [_grey_of(files[name]) for name in loaded.train_files] == value.tolist()


def test_archives_are_read_in_their_own_order(pil):
    opened = []

    def source(place: int) -> _images.Source:
        def opener() -> io.BytesIO:
            opened.append(place)
            return io.BytesIO(_png(2, 2, place))

        return _images.Source("x", opener, place)

    places = [7, 3, 9, 1]
    pixels = _images.decode([source(place) for place in places], None, np.empty((4, 3, 2, 2), np.uint8))
    assert opened == sorted(places)
    assert pixels[:, 0, 0, 0].tolist() == places
