"""What the fuzzed readers read: for each a small valid file, the ways to forge it, and what a right answer looks like."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _mutate import NAMES, damage, hostile_png, hostile_tar, hostile_zip, png, repack

from ltkernels import selection, train  # noqa: F401
from ltkernels.diversity import FeatureStatistics
from ltkernels.selection._checkpoint import read_checkpoint
from ltkernels.train import rundir
from ltkernels.train.checkpoint import FORMAT, PhaseStore, capture_random
from ltkernels.train.config import Config, from_mapping, read_toml
from ltkernels.train.data import DataRequest, Dataset
from ltkernels.train.data._dataset import naming
from ltkernels.train.data.cifar import pickled_list
from ltkernels.train.report import page
from ltkernels.train.select import load_features

Files = dict[str, bytes]
CLASSES = 10


@dataclass(frozen=True)
class Reader:
    """`read(folder)` reads what `make()` wrote there, and `right(value)` says what is wrong with the answer, or "".

    `forge(files, secret, rng)` gives files that are hostile in ways of their own; None: damaged bytes alone.
    """

    make: Callable[[], Files]
    read: Callable[[Path], Any]
    right: Callable[[Any], str]
    forge: Callable[[Files, str, random.Random], Files] | None = None


class Trap:
    """Unpickled by a reader that trusts pickles, it leaves a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def dataset(value: Any) -> str:
    """What is wrong with a loaded data set: the invariants that the trainer builds on."""
    if not isinstance(value, Dataset):
        return f"gave a {type(value).__name__}"
    for x, y in ((value.x_train, value.y_train), (value.x_test, value.y_test)):
        if len(x) != len(y) or not bool(torch.isfinite(x).all()):
            return "lengths or values"
        if y.dtype != torch.int64 or int(y.min()) < 0 or int(y.max()) >= value.num_classes:
            return "labels"
    return "" if min(value.class_counts) >= 1 else "an empty class"


def _npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def _npz(compressed: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


# IDX


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(packed: bool) -> Files:
    y = np.tile(np.arange(CLASSES, dtype=np.uint8), 3)
    x = np.full((len(y), 4, 4), y[:, None, None] * 20, np.uint8)
    x[:, 0, 0] = 255
    files = {}
    for name, images, labels in (("train", x, y), ("t10k", x, y)):
        files[f"{name}-images-idx3-ubyte"], files[f"{name}-labels-idx1-ubyte"] = _idx(images), _idx(labels)
    return {f"{k}.gz": gzip.compress(v, 1) for k, v in files.items()} if packed else files


def _load_idx(folder: Path) -> Dataset:
    return train.data.load("fashion-mnist-lt", DataRequest(data_dir=folder, imbalance=1.0))


def _forge_idx(files: Files, secret: str, rng: random.Random) -> Files:
    name = rng.choice(list(files))
    sizes = [rng.choice((0, 1, 30, 1 << 16, 1 << 31, (1 << 32) - 1)) for _ in range(rng.choice((1, 2, 3, 255)))]
    head = struct.pack(f">BBBB{len(sizes)}I", 0, 0, rng.choice((8, 9, 13)), len(sizes), *sizes)
    body = bytes(rng.choice((0, 30, 480)))
    if name.endswith(".gz"):
        # gzip files may follow each other: a bomb behind the header.
        return {**files, name: gzip.compress(head + body, 1) + (_gzip_bomb() if rng.random() < 0.2 else b"")}
    return {**files, name: head + body}


@functools.lru_cache(1)
def _gzip_bomb() -> bytes:
    return gzip.compress(bytes(1 << 28), 1)


# CIFAR


def _python2(value: Any) -> bytes:
    """Protocol 2 as Python 2 wrote it, for dicts of bytes, lists, integers and byte arrays."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<I", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    make = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _python2(0) + b"\x85" + _python2(b"b") + b"\x87R"
    )
    kind = b"cnumpy\ndtype\n" + _python2(b"u1") + _python2(0) + _python2(1) + b"\x87R("
    kind += _python2(3) + _python2(b"|") + b"NNN" + 2 * _python2(-1) + _python2(0) + b"tb"
    shape = b"".join(_python2(int(size)) for size in value.shape) + b"\x86"
    return make + b"(" + _python2(1) + shape + kind + b"\x89" + _python2(value.tobytes()) + b"tb"


def _batch(pairs: dict[bytes, Any]) -> bytes:
    return b"\x80\x02}(" + b"".join(_python2(k) + _python2(v) for k, v in pairs.items()) + b"u."


def cifar_files(version: str) -> Files:
    y = np.repeat(np.arange(CLASSES, dtype=np.uint8), 2)
    x = np.zeros((len(y), 3072), np.uint8)
    x[:, :40] = y[:, None] * 20
    names = [b"class%d" % i for i in range(CLASSES)]
    if version == "binary":
        rows = np.concatenate([y[:, None], x], 1)
        files = {f"data_batch_{i}.bin": rows[4 * i - 4 : 4 * i].tobytes() for i in range(1, 6)}
        return {**files, "test_batch.bin": rows.tobytes(), "batches.meta.txt": b"\n".join(names)}

    def batch(part: slice) -> bytes:
        return _batch({b"data": x[part], b"labels": y[part].tolist()})

    files = {f"data_batch_{i}": batch(slice(4 * i - 4, 4 * i)) for i in range(1, 6)}
    return {**files, "test_batch": batch(slice(None)), "batches.meta": _batch({b"label_names": names})}


_CIFAR = {
    "binary": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    "python": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
}


def _tar(files: Files) -> bytes:
    """A plain tar.gz, by the same writer as the hostile ones."""
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_archive(version: str) -> Files:
    folder, archive = _CIFAR[version]
    return {archive: _tar({f"{folder}/{name}": content for name, content in cifar_files(version).items()})}


def _load_cifar(folder: Path) -> Dataset:
    return train.data.load("cifar10-lt", DataRequest(data_dir=folder, imbalance=1.0))


def _forge_cifar(version: str) -> Callable[[Files, str, random.Random], Files]:
    def forge(files: Files, secret: str, rng: random.Random) -> Files:
        folder, archive = _CIFAR[version]
        inner = {f"{folder}/{name}": content for name, content in cifar_files(version).items()}
        victim = rng.choice(list(inner))
        inner[victim] = (
            hostile_pickle(secret, rng) if version == "python" and rng.random() < 0.5 else damage(inner[victim], rng)
        )
        return {archive: hostile_tar(inner, secret, rng, "w:gz")}

    return forge


def hostile_pickle(secret: str, rng: random.Random) -> bytes:
    """Programs that call what they may not, nest or multiply without end, or promise lengths that are not there."""
    laughs = b"\x80\x02](" + b"K\x01" * 10 + b"e"
    for level in range(40):
        laughs += b"q" + bytes([level]) + b"0](" + 4 * (b"h" + bytes([level])) + b"e"
    return rng.choice(
        (
            lambda: pickle.dumps(Trap(secret + ".trap"), rng.choice((0, 1, 2, 4))),
            lambda: _batch({b"data": 1})[:-2] + b"s" + pickle.dumps(Trap(secret + ".trap"), 2)[2:],
            lambda: laughs + b".",
            lambda: b"\x80\x02" + b"](" * 5000 + b"e" * 5000 + b".",
            lambda: b"\x80\x02]q\x00h\x00a.",
            lambda: b"\x80\x02r\xff\xff\xff\x7f" + b"N.",
            lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << rng.choice((20, 31, 40, 63))) + b"x.",
            lambda: b"\x80\x02\x8b" + struct.pack("<i", rng.choice((-1, 1 << 30))) + b"x.",
            lambda: b"I" + b"9" * 5000 + b"\n.",
            lambda: b"c" + b"o" * 5000 + b"\nsystem\n.",
            lambda: b"\x80\x02cnumpy\ndtype\n" + _python2(b"O" * 9000) + b"\x85R.",
            lambda: b"\x80\x02\x82\x01.",
            lambda: b"P1\n.",
            lambda: _batch({b"data": np.zeros((4, 3072), np.uint8)}).replace(b"\x89T", b"\x89]"),
        )
    )()


def _load_pickle(folder: Path) -> Any:
    with naming(folder / "batch"):
        return pickled_list((folder / "batch").read_bytes(), "labels")


# Arrays


def npz_data() -> Files:
    x = np.arange(240, dtype=np.float32).reshape(24, 10) % 7
    y = np.tile(np.arange(3), 8)
    names = np.array(["a", "<script>", "c"])
    return {"data.npz": _npz(x_train=x, y_train=y, x_test=x, y_test=y, class_names=names)}


def npz_features(compressed: bool = False) -> Files:
    x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    y = np.repeat(np.arange(3), (18, 8, 4))
    return {"data.npz": _npz(compressed, features=x, labels=y)}


def npy_features() -> Files:
    return {"x.npy": _npy(np.random.default_rng(0).normal(size=(30, 6))), "y.npy": _npy(np.repeat(np.arange(3), 10))}


def _hostile_array(rng: random.Random, secret: str) -> bytes:
    """An .npy file with a false header, objects in it, values at the ends of the range, or odd types and shapes."""
    kind = rng.randrange(8)
    if kind < 2:
        shape = rng.choice(
            ("(1152921504606846976,)", "(-1, 2)", "(2,) * 9", "(1e3,)", "()", "(0,)", "(9999999, 9999999)", "('a',)")
        )
        descr = rng.choice(
            ("'<f8'", "'|O'", "'<f4'", "'<U1000000000'", "[('a', '<f8')]", "'V0'", "'<M8[ns]'", "[[", "None")
        )
        text = f"{{'descr': {descr}, 'fortran_order': {rng.choice(('False', 'True', '1'))}, 'shape': {shape}, }}"
        if rng.random() < 0.2:
            text = "(" * rng.choice((100, 5000)) + text
        head = text.encode().ljust(118) + b"\n"
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head) % 65536) + head + rng.randbytes(rng.choice((0, 8, 480)))
    if kind == 2:
        return b"\x93NUMPY\x02\0" + struct.pack("<I", rng.choice((0, 1 << 31, (1 << 32) - 1))) + b"{}"
    if kind == 3:
        # numpy's own writer of object arrays is a pickle.
        return _npy(np.array([Trap(secret + ".trap")], dtype=object), allow_pickle=True)
    if kind == 4:
        return _npy(np.array(rng.choice(([1 << 62] * 30, [10**12] * 30, [-1] * 30, [0.5] * 30, [2**32] * 24))))
    if kind == 5:
        return _npy(np.array(rng.choice((3, np.nan, "x", b"x", 1j, True))))
    if kind == 6:
        return _npy(
            np.zeros(
                rng.choice(((0,), (0, 6), (30, 0), (2, 3, 4, 5, 6), (24, 10))),
                rng.choice(("<f2", "<f8", "<u8", "?", "<c8")),
            )
        )
    return _npy(np.full((24, 10), rng.choice((np.nan, np.inf, 1e38, 1e308))))


def _forge_npz(files: Files, secret: str, rng: random.Random) -> Files:
    import zipfile

    if "x.npy" in files:
        return {**files, rng.choice(list(files)): _hostile_array(rng, secret)}
    (name,) = files
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        members = {info: archive.read(info) for info in archive.namelist()}
    members[rng.choice(list(members))] = _hostile_array(rng, secret)
    if rng.random() < 0.1:
        return {name: _npz_bomb(rng.choice(list(members)))}
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return {name: buffer.getvalue()}


@functools.lru_cache(8)
def _npz_bomb(name: str) -> bytes:
    """Right headers, and zeros that take a thousandth of what they stand for: 1 GiB an array."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (1 << 27,)})
    packer = zlib.compressobj(1, wbits=-15)
    body = packer.compress(head.getvalue()) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    body += zeros * 1024 + packer.flush()
    size, entries, listing = len(head.getvalue()) + (1 << 30), b"", b""
    for member in dict.fromkeys((name, "x_train.npy", "features.npy", "mean.npy", "picked.npy")):
        # The checksum is wrong; a reader that trusts the sizes finds that out a gigabyte later.
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(body), size, len(member), 0)
        offset = len(entries)
        entries += b"PK\x03\x04" + fields + member.encode() + body
        listing += (
            b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, offset) + member.encode()
        )
    count = listing.count(b"PK\x01\x02")
    return (
        entries + listing + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(listing), len(entries), 0)
    )


def _audit(folder: Path) -> dict[str, Any]:
    from ltkernels.train.report import audit_file

    return audit_file(folder / "data.npz", out=folder / "out.html")


def _select(folder: Path) -> dict[str, Any]:
    return train.select_features(
        folder / "data.npz", Config(random_repeats=1, subset_size=4, head_ratio=0.5), out=folder / "out"
    )


def statistics_file() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.npz")
        FeatureStatistics(4).update(np.random.default_rng(0).normal(size=(30, 4))).save(path)
        return {"data.npz": path.read_bytes()}


def selection_checkpoint() -> Files:
    return {"data.npz": _npz(key="k" * 64, picked=np.arange(5), values=np.arange(5.0))}


# Images


def image_tree() -> Files:
    files = {f"train/{c}/{i}.png": png(4, 4, 9 * i) for c in ("a", "b") for i in range(3)}
    return {**files, **{f"test/{c}/t.png": png(4, 4, 7) for c in ("a", "b")}}


def image_archive(form: str) -> Callable[[], Files]:
    def make() -> Files:
        import bz2
        import lzma

        if form == "zip":
            import zipfile

            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for name, content in image_tree().items():
                    archive.writestr(name, content)
            return {"set.zip": buffer.getvalue()}
        plain = gzip.decompress(_tar(image_tree()))
        packers = {
            "tar": bytes,
            "tar.gz": lambda d: gzip.compress(d, 1),
            "tar.bz2": bz2.compress,
            "tar.xz": lzma.compress,
        }
        return {f"set.{form}": packers[form](plain)}

    return make


def _load_images(folder: Path) -> Dataset:
    found = next((p for p in folder.iterdir() if p.name.startswith("set.")), folder)
    return train.data.load(f"folder:{found}", DataRequest(image_size=4))


def _forge_images(files: Files, secret: str, rng: random.Random) -> Files:
    (name,) = files
    tree = image_tree()
    if rng.random() < 0.5:
        tree[rng.choice(list(tree))] = hostile_png(rng)
    if name.endswith(".zip"):
        return {name: hostile_zip(tree, secret, rng)}
    mode = {"set.tar": "w", "set.tar.gz": "w:gz", "set.tar.bz2": "w:bz2", "set.tar.xz": "w:xz"}[name]
    return {name: hostile_tar(tree, secret, rng, mode)}


def _load_tree(folder: Path) -> Dataset:
    """A tree of files; what an archive would hold as links is put there as links."""
    for link in sorted(folder.rglob("*.link")):
        target = link.read_bytes().decode()
        link.unlink()
        link.with_suffix(rng_suffix(target)).symlink_to(target)
    return train.data.load(f"folder:{folder}", DataRequest(image_size=4))


def rng_suffix(target: str) -> str:
    return ".png" if target.endswith(".png") else ""


def _forge_tree(files: Files, secret: str, rng: random.Random) -> Files:
    kind, tree = rng.randrange(4), dict(files)
    if kind == 0:
        tree["train/a/x.link"] = rng.choice(
            (secret, "..", ".", "../..", "/dev/zero.png", "../b/0.png", "nowhere.png")
        ).encode()
    elif kind == 1:
        for i in range(rng.randrange(1, 5)):
            tree[f"train/a/l{i}.link"] = rng.choice((b".", b"..", b"../b"))
    elif kind == 2:
        tree[f"train/{rng.choice(('<script>', 'a' + chr(10) + 'b', chr(27) + '[31m', '9' * 200))}/0.png"] = png(4, 4)
    else:
        tree[rng.choice(list(tree))] = hostile_png(rng)
    return tree


# Checkpoints and run folders


def phase_checkpoint() -> Files:
    state = {
        "weight": torch.arange(6.0).view(2, 3),
        "epoch": 3,
        "random": capture_random(torch.device("cpu"))["python"][:1],
    }
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "phase": "train/ce", "fingerprint": "print", "state": state}, buffer)
    return {"content.pt": buffer.getvalue()}


def _load_phase(folder: Path) -> Any:
    """Under a name that holds the right checksum: someone forged the file on purpose. The message names `state`."""
    content = (folder / "content.pt").read_bytes()
    state = folder / "state"
    state.mkdir()
    slug = f"train-ce-{hashlib.sha256(b'train/ce').hexdigest()[:6]}"
    (state / f"{slug}.00000000.{hashlib.sha256(content).hexdigest()[:32]}.pt").write_bytes(content)
    return PhaseStore(state, "train/ce", "print", 0.0).load()


def _forge_checkpoint(files: Files, secret: str, rng: random.Random) -> Files:
    (name,) = files
    values = (
        Trap(secret + ".trap"), [1, 2], {"format": 1}, {"fingerprint": "print"},
        {"format": FORMAT, "fingerprint": "print", "state": Trap(secret + ".trap")},
        {"fingerprint": 3, "state": 4}, "text", None, torch.zeros(3),
    )  # fmt: skip
    buffer = io.BytesIO()
    torch.save(rng.choice(values), buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    return {name: rng.choice((buffer.getvalue(), pickle.dumps(rng.choice(values)), b""))}


DATA = Dataset.from_arrays(
    np.random.default_rng(0).normal(size=(34, 10)),
    np.repeat(np.arange(3), (20, 8, 6)),
    np.eye(6, 10),
    np.tile(np.arange(3), 2),
)
RUN: Files = {}
"""A result folder of a real run, made once in the part's own process."""


def make_run(folder: Path) -> None:
    train.run(Config(model="mlp", epochs=1, retrain_epochs=1, random_repeats=1, threads=1), DATA, out=folder)
    RUN.update({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})


def _read_run(folder: Path) -> str:
    """The report drawn anew and the checkpoints evaluated."""
    report = train.rebuild_report(folder).read_text(encoding="utf-8")
    train.evaluate(folder, DATA)
    train.load(folder)
    return report


def _foreign_script(report: str) -> str:
    """The page has one script, its own, which a value of the run must neither change nor join."""
    own = (Path(page.__file__).parent / "templates" / "tables.js").read_text(encoding="utf-8")
    head, script, rest = report.partition(f"<script>{own}</script>")
    return "" if script and "<script" not in (head + rest).lower() else "a script in the page"


def _forge_run(files: Files, secret: str, rng: random.Random) -> Files:
    """One value of summary.json, or of a line of metrics.jsonl, is something else."""
    name = rng.choice(("summary.json", "summary.json", "metrics.jsonl"))
    first, _, rest = files[name].decode().partition("\n") if name == "metrics.jsonl" else (files[name].decode(), "", "")
    value = json.loads(first)
    junk = rng.choice(
        (None, [], {}, "", "../../../secret", "<script>alert(1)</script>", 1e308, -1, 10**400, float("nan"), float("inf"), True,
         [[]], "\x1b[31m", "x" * 10000, ["<script>"] * 3, 0, "9" * 5000)
    )  # fmt: skip
    place, key = value, None
    for _ in range(rng.randrange(1, 6)):
        if isinstance(place, dict) and place:
            parent, key = place, rng.choice(list(place))
        elif isinstance(place, list) and place:
            parent, key = place, rng.randrange(len(place))
        else:
            break
        place = parent[key]
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = junk
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = "[" * 100_000 + text
    changed = {**files, name: f"{text}\n{rest}".encode()}
    if name == "summary.json" and rng.random() < 0.3:
        # A checkpoint of someone else's, with the checksum that the summary then promises.
        content = _forge_checkpoint({"x": b""}, secret, rng)["x"]
        summary = json.loads(files[name])
        summary["checkpoints"] = dict.fromkeys(summary["checkpoints"], hashlib.sha256(content).hexdigest())
        changed = {**files, name: json.dumps(summary).encode()}
        changed |= {path: content for path in files if path.startswith("checkpoints/")}
    return changed


def _resume_run(folder: Path) -> Any:
    """What --resume and --force make of the folder."""
    (folder / "run" / rundir.SUMMARY).unlink(missing_ok=True)
    config = Config(model="mlp", epochs=1, threads=1)
    return train.train(config, DATA, out=folder / "run", resume="auto")["variants"]


def unfinished_run() -> Files:
    from ltkernels.train.config import to_toml
    from ltkernels.train.jobs import resolve

    config = resolve(Config(model="mlp", epochs=1, threads=1).replace(data=DATA.name), DATA)
    return {"run/config.toml": f"# ltkernels train\n{to_toml(config)}".encode(), "run/metrics.jsonl": b"{}\n"}


# Settings


def config_file() -> Files:
    text = 'data = "digits-lt"\nloss = "ldam"\nepochs = 3\nlr = 0.1\nflip = true\nlr_schedule = "step:160=0.01"\nselect = "max"\n'
    return {"config.toml": text.encode()}


def _read_config(folder: Path) -> Config:
    path = folder / "config.toml"
    return from_mapping(read_toml(path), str(path))


def table_file() -> Files:
    x, y = np.random.default_rng(0).normal(size=(30, 3)), np.repeat(["ant", "bee", "cow"], (16, 9, 5))
    rows = [",".join(map(repr, row)) + f",{label}" for row, label in zip(x.tolist(), y.tolist())]
    return {"table.csv": ("\n".join(["a,b,c,label", *rows]) + "\n").encode()}


def _forge_table(files: Files, secret: str, rng: random.Random) -> Files:
    lines = files["table.csv"].decode().splitlines()
    cell = rng.choice(("nan", "1e999", "-1e400", "x" * 9000, "\0", '"', "1" * 5000, secret, "", "True", "9" * 30))
    at = rng.randrange(len(lines))
    parts = lines[at].split(",")
    parts[rng.randrange(len(parts))] = cell
    lines[at] = ",".join(parts)
    return {"table.csv": "\n".join(lines).encode()}


def list_file() -> Files:
    images = {f"{c}{i}.png": png(4, 4) for c in "ab" for i in range(3)}
    return {"all.txt": "".join(f"{name} {name[0]}\n" for name in images).encode(), **images}


def _forge_list(files: Files, secret: str, rng: random.Random) -> Files:
    lines = files["all.txt"].decode().splitlines()
    lines[rng.randrange(len(lines))] = rng.choice(
        (
            f"{secret} a",
            "../../secret.png a",
            "/etc/passwd a",
            "a0.png",
            " ",
            "a0.png " + "9" * 40,
            "\0.png a",
            "a0.png " + "x" * 70000,
        )
    )
    return {**files, "all.txt": "\n".join(lines).encode()}


def _forge_config(files: Files, secret: str, rng: random.Random) -> Files:
    from dataclasses import fields

    name = rng.choice([*(item.name for item in fields(Config)), "unknown", '"a\\u001b[31m"', "a.b"])
    value = rng.choice(
        ("1", "-1", "0", "1e999", "nan", "inf", "9" * 30, "9" * 5000, "true", '""', '"x"', "[]", "{}", "[" * 3000, "1979-05-27",
         '"step:1=2,x"', '"target:nan"', '"' + "x" * 9000 + '"', '"../../etc/passwd"', '"tau=1,tau"', '"csv,,x"', "'''\\u'''", "1_000",
         '"\\u0000"', "{a." + "b." * 3000 + "c=1}")
    )  # fmt: skip
    return {"config.toml": f"{name} = {value}\n".encode()}


READERS: dict[str, Reader] = {
    "idx": Reader(lambda: idx_files(False), _load_idx, dataset, _forge_idx),
    "idx.gz": Reader(lambda: idx_files(True), _load_idx, dataset, _forge_idx),
    "cifar-binary": Reader(lambda: cifar_files("binary"), _load_cifar, dataset),
    "cifar-binary.tar.gz": Reader(lambda: cifar_archive("binary"), _load_cifar, dataset, _forge_cifar("binary")),
    "cifar-python": Reader(
        lambda: cifar_files("python"),
        _load_cifar,
        dataset,
        lambda files, secret, rng: {**files, rng.choice(list(files)): hostile_pickle(secret, rng)},
    ),
    "cifar-python.tar.gz": Reader(lambda: cifar_archive("python"), _load_cifar, dataset, _forge_cifar("python")),
    "pickle": Reader(
        lambda: {"batch": cifar_files("python")["data_batch_1"]},
        _load_pickle,
        lambda value: "" if all(isinstance(item, int | str) for item in value) else f"gave {value!r:.80}",
        lambda files, secret, rng: {"batch": hostile_pickle(secret, rng)},
    ),
    "npz": Reader(npz_data, lambda f: train.data.load(f"npz:{f / 'data.npz'}"), dataset, _forge_npz),
    "table.csv": Reader(table_file, lambda f: train.data.load(f"csv:{f / 'table.csv'}"), dataset, _forge_table),
    "list": Reader(list_file, lambda f: train.data.load(f"list:{f / 'all.txt'}"), dataset, _forge_list),
    "features.npz": Reader(npz_features, lambda f: load_features(f / "data.npz"), lambda v: "", _forge_npz),
    "features.npz, deflated": Reader(
        lambda: npz_features(True), lambda f: load_features(f / "data.npz"), lambda v: "", _forge_npz
    ),
    "features.npy": Reader(npy_features, lambda f: load_features(f / "x.npy", f / "y.npy"), lambda v: "", _forge_npz),
    "select": Reader(npz_features, _select, lambda v: "" if v["classes"] else "no tail class", _forge_npz),
    "audit": Reader(npz_features, _audit, lambda v: "" if v["class_counts"] else "no class", _forge_npz),
    "statistics": Reader(
        statistics_file,
        lambda f: FeatureStatistics.load(f / "data.npz"),
        lambda v: "" if v.count >= 0 and v.scatter.shape == (v.width, v.width) else "shapes",
        _forge_npz,
    ),
    "selection checkpoint": Reader(
        selection_checkpoint,
        lambda f: read_checkpoint(f / "data.npz", "k" * 64, ("picked", "values")),
        lambda v: "" if v is None or len(v) == 2 else "arrays",
        _forge_npz,
    ),
    "image folder": Reader(image_tree, _load_tree, dataset, _forge_tree),
    **{
        f"images.{form}": Reader(image_archive(form), _load_images, dataset, _forge_images)
        for form in ("tar", "tar.gz", "tar.bz2", "tar.xz", "zip")
    },
    "training checkpoint": Reader(
        phase_checkpoint,
        _load_phase,
        lambda v: "" if v is None or v.get("epoch") is not None else "state",
        _forge_checkpoint,
    ),
    "run folder": Reader(lambda: dict(RUN), _read_run, _foreign_script, _forge_run),
    "unfinished run": Reader(unfinished_run, _resume_run, lambda v: "" if v else "no variant"),
    "config": Reader(config_file, _read_config, lambda v: "" if isinstance(v, Config) else "type", _forge_config),
}


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def mutated(reader: Reader, secret: str, rng: random.Random) -> tuple[str, Files]:
    """(kind, files): whole, damaged, damaged below checksums, or forged."""
    files = reader.make()
    kind = rng.choice(("whole", *("damaged",) * 5, *("repacked",) * 6, *("forged",) * (6 if reader.forge else 0)))
    if kind == "forged":
        return kind, reader.forge(files, secret, rng)
    if kind != "whole":
        name = rng.choice(list(files))
        files[name] = damage(files[name], rng) if kind == "damaged" else repack(name, files[name], rng)
        if rng.random() < 0.1:
            del files[rng.choice(list(files))]
    return kind, files


__all__ = ["NAMES", "READERS", "Reader", "make_run", "mutated", "write"]
