"""Files that the reliability campaign found readers to stumble over: each gets the right answer or one error that names it."""

import gzip
import io
import logging
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch

from ltkernels import _npz, cli, selection, train
from ltkernels.diversity import FeatureStatistics
from ltkernels.train import data, rundir
from ltkernels.train.checkpoint import PhaseStore
from ltkernels.train.config import Config, from_mapping, read_toml
from ltkernels.train.data import DataRequest, _archive, _images
from ltkernels.train.data.cifar import pickled_list
from ltkernels.train.data.folder import natural_key
from ltkernels.train.report import audit_file
from ltkernels.train.select import load_features


def _npy(header, body=b""):
    head = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + body


def _zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


X = np.arange(240.0).reshape(24, 10) % 7
Y = np.tile(np.arange(3), 8)
HEADERS = {
    "no end": "{'descr': '<f8', 'fortran_order': False, 'shape': (24, 10), ",
    "too large": "{'descr': '<f8', 'fortran_order': False, 'shape': (9999999, 9999999), }",
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-24, -10), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (24, 10), }",
    "no width": "{'descr': 'V0', 'fortran_order': False, 'shape': (24, 10), }",
    "deep": "(" * 5000,
    "none": "None",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_array_headers(tmp_path, kind):
    array = _npy(HEADERS[kind], X.tobytes())
    (tmp_path / "x.npy").write_bytes(array)
    np.save(tmp_path / "y.npy", Y)
    path = _zip(tmp_path / "x.npz", {"features.npy": array, "labels.npy": (tmp_path / "y.npy").read_bytes()})
    for read in (
        lambda: load_features(tmp_path / "x.npy", tmp_path / "y.npy"),
        lambda: load_features(path),
        lambda: audit_file(path, out=tmp_path / "out.html"),
        lambda: _npz.read_arrays(path, ("features",)),
    ):
        with pytest.raises(ValueError, match=r"x\.np[yz]: not a usable"):
            read()
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("place", [8, 10], ids=["encrypted", "method"])
def test_zip_flags(tmp_path, place):
    np.savez(tmp_path / "x.npz", count=3, mean=X[0], scatter=np.eye(10), key="k")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for at in range(len(content) - 4):
        if content[at : at + 4] == b"PK\x01\x02":
            content[at + place] |= 1 | (32 if place == 8 else 96)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz"):
        FeatureStatistics.load(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"checkpoint .*x\.npz"):
        selection._checkpoint.read_checkpoint(tmp_path / "x.npz", "k", ("mean",))


def test_a_damaged_stream_inside_a_zip(tmp_path):
    np.savez_compressed(
        tmp_path / "x.npz", features=np.random.default_rng(0).normal(size=(60, 20)), labels=np.arange(60) % 3
    )
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz: not a usable"):
        load_features(tmp_path / "x.npz")


def test_compressed_arrays_are_bounded_by_what_they_take_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(_npz, "FREE_BYTES", 1000)
    np.savez_compressed(tmp_path / "x.npz", features=np.zeros((1000, 10)))
    with pytest.raises(ValueError, match=r"features\.npy is compressed more than 100 times; write it without"):
        _npz.read_arrays(tmp_path / "x.npz", ("features",))
    np.savez(tmp_path / "x.npz", features=np.zeros((1000, 10)))
    assert _npz.read_arrays(tmp_path / "x.npz", ("features",))["features"].shape == (1000, 10)


def test_arrays_come_back_as_numpy_wrote_them(tmp_path):
    arrays = {
        "c": X, "f": np.asfortranarray(X.astype(np.float32)), "scalar": np.int64(7), "empty": np.zeros((0, 3)),
        "text": np.array(["a", "\u00e4\u00e4"]), "bytes": np.array([b"x"]), "flags": Y > 1, "big": X.astype(">f4"),
    }  # fmt: skip
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "x.npz", **arrays)
        got = _npz.read_arrays(tmp_path / "x.npz", tuple(arrays), ("more",))
        assert list(got) == list(arrays)
        for name, array in arrays.items():
            assert got[name].dtype == np.asarray(array).dtype
            np.testing.assert_array_equal(got[name], array)
            assert got[name].flags.writeable
    for name in ("c", "f", "empty"):
        np.save(tmp_path / "x.npy", arrays[name])
        np.testing.assert_array_equal(_npz.map_npy(tmp_path / "x.npy"), arrays[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": np.full(24, 10**12)}, "y_train has 24 samples for 1000000000001 classes"),
        ({"x_train": np.array(["a"] * 24)}, r"x_train must hold numbers, got <U1"),
        ({"x_test": np.zeros(5)}, "x_test must be"),
        ({"y_test": Y + 0.25}, "y_test must hold integers"),
        ({"class_names": np.array("abc")}, "y_train holds label 2, but there are 1 classes"),
    ],
)
def test_bad_arrays_name_their_file(tmp_path, change, message):
    np.savez(tmp_path / "mine.npz", **{"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, **change})
    with pytest.raises((ValueError, TypeError), match=rf"mine\.npz: {message}"):
        data.load(f"npz:{tmp_path / 'mine.npz'}")


@pytest.mark.parametrize("label", [10**12, 2**62])
def test_one_forged_label_makes_no_table(tmp_path, label):
    labels = Y.copy()
    labels[3] = label
    np.savez(tmp_path / "x.npz", features=X, labels=labels)
    for job in (
        lambda: audit_file(tmp_path / "x.npz", out=tmp_path / "a.html"),
        lambda: train.select_features(tmp_path / "x.npz", Config(), out=tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=rf"x\.npz: .*{label}, of 24 samples"):
            job()


def test_pickles_that_multiply():
    """Forty lists, each of the one before four times: nothing is made of them."""
    laughs = b"\x80\x02X\x06\0\0\0labels](" + b"K\x01" * 10 + b"e"
    for level in range(40):
        laughs += b"q" + bytes([level]) + b"0](" + 4 * (b"h" + bytes([level])) + b"e"
    assert pickled_list(laughs + b".", "labels") == [1] * 10
    with pytest.raises(ValueError, match=r"^not a pickle of plain data.{,300}$"):
        pickled_list(b"c" + b"o" * 100_000 + b"\nsystem", "labels")


def _png(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = (b"\0" + bytes(width)) * height
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _tar(path, files, pax=None, link=None):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if pax and name.endswith("x.png"):
                info.pax_headers = pax
            archive.addfile(info, io.BytesIO(content))
    return path


def _error(call):
    """The message of a ValueError or an OSError, "" where there is none."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


TREE = {f"{split}/{c}/{i}.png": _png(4, 4) for split in ("train", "test") for c in "ab" for i in range(2)}


@pytest.mark.parametrize(
    "pax", [{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.map": "0,x", "GNU.sparse.size": "9"}]
)
def test_sparse_members_of_a_tar(tmp_path, pax):
    pytest.importorskip("PIL")
    path = _tar(tmp_path / "set.tar", {**TREE, "train/a/x.png": _png(4, 4)}, pax)
    # tarfile of Python 3.11 takes the first for a file of holes, and cannot read the second.
    errors = [_error(lambda: data.load(f"folder:{path}", DataRequest(image_size=4)))]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    errors.append(_error(lambda: data.load("cifar10-lt", DataRequest(data_dir=tmp_path))))
    assert re.search(r"^$|set\.tar: not a complete archive", errors[0])
    assert re.search(r"cifar-10-binary\.tar\.gz: (lacks|not a complete archive)", errors[1])


def test_archives_are_bounded_by_their_own_size(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(_archive, "FREE_BYTES", 1 << 16)
    path = _tar(
        tmp_path / "set.tar.gz", {**TREE, "other/zeros": bytes(1 << 22), **{f"z/{k}": v for k, v in TREE.items()}}
    )
    with pytest.raises(
        ValueError, match=r"set\.tar\.gz: not a complete archive \(it holds more than \d+ bytes, or promises them"
    ):
        data.load(f"folder:{path}", DataRequest(image_size=4))
    assert data.load(f"folder:{_tar(tmp_path / 'good.tar.gz', TREE)}").class_counts == [2, 2]


def test_a_zip_with_a_broken_listing(tmp_path):
    path = _zip(tmp_path / "set.zip", TREE)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] = 0
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.zip: neither a folder nor"):
        data.load(f"folder:{path}")


def test_a_zip_with_a_file_of_no_name(tmp_path):
    pytest.importorskip("PIL")
    whole = _zip(tmp_path / "whole.zip", TREE)
    path = _zip(tmp_path / "set.zip", {**TREE, "@name": b""})
    path.write_bytes(path.read_bytes().replace(b"@name", b"\0name"))  # zipfile cuts names at a zero byte
    assert torch.equal(data.load(f"folder:{path}").x_train, data.load(f"folder:{whole}").x_train)


def test_values_beyond_float32_after_standardising(tmp_path):
    x = np.array([[1e38], [-3e38], [3e38], [3e38]])
    np.savez(tmp_path / "large.npz", x_train=x, y_train=[0, 0, 1, 1], x_test=x, y_test=[0, 0, 1, 1])
    x_train = data.load(f"npz:{tmp_path / 'large.npz'}").x_train
    assert torch.allclose(x_train.double(), torch.from_numpy((x - x.mean()) / x.std(ddof=1)), atol=1e-6)
    np.savez(tmp_path / "far.npz", x_train=x / 1e38, y_train=[0, 0, 1, 1], x_test=x * 1e38, y_test=[0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"far\.npz: x_test cannot be standardised in float32"):
        data.load(f"npz:{tmp_path / 'far.npz'}")
    x = x * 1e265
    np.savez(tmp_path / "huge.npz", x_train=x, y_train=[0, 0, 1, 1], x_test=x, y_test=[0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"huge\.npz: x_train cannot be standardised"):
        data.load(f"npz:{tmp_path / 'huge.npz'}")


def test_links_in_a_ring(tmp_path):
    pytest.importorskip("PIL")
    for name, content in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name in ("one", "two", "three"):
        (tmp_path / "train" / "a" / name).symlink_to(".")
    with pytest.raises(ValueError, match=r"train/a/\w+: a link to a folder that is read already"):
        data.load(f"folder:{tmp_path}")


def test_names_of_thousands_of_digits(tmp_path):
    pytest.importorskip("PIL")
    long = {f"{split}/{'9' * 5000}/0.png": _png(4, 4) for split in ("train", "test")}
    assert data.load(f"folder:{_zip(tmp_path / 'set.zip', {**TREE, **long})}").class_names[0] == "9" * 5000
    names = ["10", "9", "010", "a10", "a9", "a", "9" * 5000, "1" + "0" * 5000]
    assert sorted(names[:6], key=natural_key) == ["9", "010", "10", "a", "a9", "a10"]
    assert natural_key(names[6]) < natural_key(names[7])
    del long[f"test/{'9' * 5000}/0.png"]
    with pytest.raises(ValueError, match=r"^.{,600}$"):
        data.load(f"folder:{_zip(tmp_path / 'set.zip', {**TREE, **long})}")


def test_images_of_another_size_are_not_decoded(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    loads = []
    real = _images._as_rgb
    monkeypatch.setattr(_images, "_as_rgb", lambda picture: loads.append(picture.size) or real(picture))
    path = _zip(tmp_path / "set.zip", {**TREE, "train/b/large.png": _png(3000, 3000)})
    with pytest.raises(ValueError, match=r"large\.png: 3000 x 3000 pixels, another image has 4 x 4"):
        data.load(f"folder:{path}")
    assert image is not None
    assert (3000, 3000) not in loads


def test_files_are_read_ahead_within_bounds(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(_images, "_CHUNK_BYTES", 2 * len(_png(4, 4)))
    read, decoded = [], []
    real, real_pixels = _images._read, _images._pixels
    monkeypatch.setattr(_images, "_read", lambda source: read.append(len(decoded)) or real(source))
    monkeypatch.setattr(_images, "_pixels", lambda *a: decoded.append(1) or real_pixels(*a))
    assert data.load(f"folder:{_zip(tmp_path / 'set.zip', TREE)}").class_counts == [2, 2]
    assert read[-1] > 0


def test_forged_checkpoints_under_a_right_checksum(tmp_path):
    import hashlib

    store = PhaseStore(tmp_path / "state", "train/ce", "print", 0.0)
    store.save({"epoch": 1})
    (path,) = (tmp_path / "state").iterdir()
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    for content in (b"", b"PK", path.read_bytes()[:300], buffer.getvalue()):
        for old in (tmp_path / "state").iterdir():
            old.unlink()
        forged = path.name.split(".")
        forged[-2] = hashlib.sha256(content).hexdigest()[:32]
        (tmp_path / "state" / ".".join(forged)).write_bytes(content)
        with pytest.raises(ValueError, match=r"state/train-ce.*\.pt: not a checkpoint"):
            store.load()


def test_a_damaged_checkpoint_is_said(tmp_path, caplog):
    store = PhaseStore(tmp_path / "state", "train/ce", "print", 0.0)
    store.save({"epoch": 1})
    store.save({"epoch": 2})
    newest = max((tmp_path / "state").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert store.load() == {"epoch": 1}
    assert [r.getMessage() for r in caplog.records] == [
        f"{newest} is damaged (its bytes do not match its checksum): not used, the one before it is"
    ]
    next((tmp_path / "state").iterdir()).write_bytes(b"")
    caplog.clear()
    assert store.load() is None
    assert "starts anew" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, "[]", '{"variants": [1]}', '{"variants": [{}]}', '{"variants": [{"name": "ce"}]}'),
        '{"variants": [{"name": "ce"}], "chosen": "another"}',
    ],
)
def test_forged_summaries(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=str(tmp_path)):
        train.rebuild_report(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{}", "[" * 100_000, '{"phase": 3}'])
def test_forged_metrics(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        rundir.read_metrics(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "epochs = '3'", "lr = 0x" + "f" * 400, "epochs = 99999999999999999999999", "x = " + "[" * 3000, "data = '" + "x" * 5000 + "'",
        "lr = nan", "select = 'target:x'", "\x00", "epochs = 1979-05-27",
    ],
)  # fmt: skip
def test_forged_settings(tmp_path, text, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError), match=r"^(?=.{,900}$).*mine\.toml"):
        from_mapping(read_toml(path), str(path))
    assert cli.main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "mine.toml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_begun_run_with_a_damaged_config(tmp_path):
    config = Config(model="mlp", epochs=1, threads=1)
    (tmp_path / "config.toml").write_bytes(b"# ltkernels train\n\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.toml: not a TOML file"):
        train.train(config, out=tmp_path, resume="auto")


def test_gzip_members_behind_each_other_are_bounded(tmp_path):
    from ltkernels.train.data import fashion_mnist

    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01x") + gzip.compress(bytes(1 << 20)))
    with pytest.raises(ValueError, match=r"x\.gz: the header promises"):
        fashion_mnist.read_idx(path, 1)
