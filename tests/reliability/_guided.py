"""A process of atheris (libFuzzer for Python): `python _guided.py RUNS SEED FOLDER` reads mutated files, guided by coverage.

The first byte of an input chooses the reader, the rest is the file. Exit code 0: nothing found; else the input that failed lies in
FOLDER, and stderr ends in why.
"""

import gzip
import io
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import _readers
import atheris

from ltkernels import _npz
from ltkernels.train import config
from ltkernels.train.data import _archive, cifar, fashion_mnist
from ltkernels.train.data._dataset import naming

FOLDER = Path(sys.argv[3]).resolve()


def _tar(path: Path) -> None:
    try:
        with _archive.open_tar(path) as tar:
            for member in _archive.members(tar, path):
                if _archive.is_plain(member) and member.size < 1 << 16:
                    tar.extractfile(member).read()
    except _archive.BROKEN as error:
        raise ValueError(f"{path}: {error}") from error


def _pickled(path: Path) -> None:
    with naming(path):
        cifar.pickled_list(path.read_bytes(), "label_names")


READERS = (
    _pickled,
    lambda path: _npz.read_arrays(path, ("features",), ("labels",)),
    lambda path: _npz.map_npy(path),
    lambda path: fashion_mnist.read_idx(path, 3),
    _tar,
    lambda path: config.from_mapping(config.read_toml(path), str(path)),
)


def seeds() -> list[bytes]:
    """A valid file for each reader."""
    npy = io.BytesIO()
    with tarfile.open(fileobj=npy, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("train/a/0.png"))
    images = _readers.idx_files(False)["train-images-idx3-ubyte"]
    batch = _readers.cifar_files("python")["batches.meta"]
    settings = _readers.config_file()["config.toml"]
    files = (
        batch,
        _readers.npz_features()["data.npz"],
        _readers.npy_features()["y.npy"],
        images,
        npy.getvalue(),
        settings,
    )
    return [bytes([i]) + content for i, content in enumerate((*files, gzip.compress(files[4])))]


def one(data: bytes) -> None:
    path = FOLDER / "input"
    path.write_bytes(data[1:])
    try:
        READERS[(data[0] if data else 0) % len(READERS)](path)
    except (ValueError, TypeError, OSError) as error:
        if str(path) not in str(error) or len(str(error)) > 6000:
            raise AssertionError(f"names no file, or is too long: {str(error)[:300]}") from error


def instrument() -> None:
    """Every function of the modules that read: hooks on imports do not see a package that is installed editable."""
    for module in (_npz, config, _archive, cifar, fashion_mnist, tarfile, zipfile):
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        for value in [value for owner in (module, *classes) for value in vars(owner).values()]:
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                # A context manager keeps the function that it was made of.
                atheris.instrument_func(getattr(value, "__wrapped__", value))


if __name__ == "__main__":
    instrument()
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for i, content in enumerate(seeds()):
        (corpus / str(i)).write_bytes(content)
    options = [
        f"-atheris_runs={sys.argv[1]}",
        f"-seed={int(sys.argv[2]) % 2**31 or 1}",
        "-timeout=30",
        "-rss_limit_mb=4096",
    ]
    atheris.Setup([sys.argv[0], *options, "-max_len=4096", f"-artifact_prefix={FOLDER}/", str(corpus)], one)
    atheris.Fuzz()
