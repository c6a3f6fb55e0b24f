"""`cifar10-lt` and `cifar100-lt`: CIFAR (Krizhevsky 2009) thinned to a long-tailed profile.

Read from --data-dir, in the original binary or Python version, as the .tar.gz of the home page or unpacked. Nothing is
downloaded and nothing is unpacked to disk; the Python version's pickles are read without trusting them (`_pickle.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ltkernels.train.data._archive import read_files
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._longtail import make_long_tailed
from ltkernels.train.data._pickle import load_plain

DEFAULT_IMBALANCE = 100.0
_PIXELS = 3 * 32 * 32


class _Version(NamedTuple):
    """Where one version of a data set lies: `train`, `test` and `names` are file names in `folder` or in `archive`."""

    folder: str
    archive: str
    train: Sequence[str]
    test: str
    names: str

    @property
    def files(self) -> list[str]:
        return [*self.train, self.test, self.names]


class _Cifar(NamedTuple):
    """One of the two data sets: its versions, and how labels are stored in them."""

    name: str
    classes: int
    binary: _Version
    python: _Version
    label_bytes: int  # before each image of the binary version; the last is the (fine) label
    label_key: bytes
    names_key: bytes


_CIFAR10 = _Cifar(
    "cifar10-lt",
    10,
    _Version(
        *("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
        *([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
    ),
    _Version(
        *("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        *([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
    ),
    1,
    b"labels",
    b"label_names",
)
_CIFAR100 = _Cifar(
    "cifar100-lt",
    100,
    _Version("cifar-100-binary", "cifar-100-binary.tar.gz", ["train.bin"], "test.bin", "fine_label_names.txt"),
    _Version("cifar-100-python", "cifar-100-python.tar.gz", ["train"], "test", "meta"),
    2,
    b"fine_labels",
    b"fine_label_names",
)


def load10(request: DataRequest) -> Dataset:
    """Load cifar10-lt. Raises FileNotFoundError saying where to put the files, ValueError for a broken one."""
    return _load(_CIFAR10, request)


def load100(request: DataRequest) -> Dataset:
    """Load cifar100-lt (fine labels). Errors as `load10`."""
    return _load(_CIFAR100, request)


def _load(cifar: _Cifar, request: DataRequest) -> Dataset:
    version, files = _files(cifar, request.data_dir)
    parse, names = (_parse_binary, _names_of_text) if version is cifar.binary else (_parse_python, _names_of_pickle)
    class_names = names(cifar, files[version.names], f"{version.folder}/{version.names}")
    parts = [parse(cifar, files[file], f"{version.folder}/{file}") for file in version.train]
    x_train, y_train = (np.concatenate([part[i] for part in parts]) for i in range(2))
    x_test, y_test = parse(cifar, files[version.test], f"{version.folder}/{version.test}")
    imbalance = DEFAULT_IMBALANCE if request.imbalance is None else request.imbalance
    # minlength: a class without a sample must be seen as one.
    empty = np.flatnonzero(np.bincount(y_train, minlength=cifar.classes) == 0)
    if len(empty):
        raise ValueError(f"{request.data_dir}: {cifar.name} has no training image of class {empty[0]}")
    kept = make_long_tailed(y_train, imbalance, request.profile, request.seed)
    return Dataset.from_arrays(
        x_train[kept],
        y_train[kept],
        x_test.copy(),  # an array over immutable bytes makes torch warn
        y_test,
        class_names=class_names,
        name=cifar.name,
        defaults={"epochs": 30, "batch_size": 128, "lr": 0.1, "crop": 4, "flip": True},
    )


def _files(cifar: _Cifar, data_dir: Path | None) -> tuple[_Version, dict[str, bytes]]:
    """The version that is there, and the content of its files."""
    if data_dir is None:
        raise FileNotFoundError(_where(cifar, "no --data-dir is given"))
    for version in (cifar.binary, cifar.python):
        files = read_files(data_dir, version.folder, version.archive, version.files)
        if files is not None:
            return version, files
    raise FileNotFoundError(_where(cifar, f"none of its files is in {data_dir}"))


def _where(cifar: _Cifar, problem: str) -> str:
    return (
        f"{cifar.name}: {problem}; put {cifar.binary.archive} or {cifar.python.archive} (from CIFAR's home page), or what "
        f"is in it, into a folder and name the folder with --data-dir"
    )


def _parse_binary(cifar: _Cifar, content: bytes, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64: a file is a row of label bytes and planes R, G, B."""
    width = cifar.label_bytes + _PIXELS
    if not content or len(content) % width:
        raise ValueError(f"{source}: {len(content)} bytes are not a number of images of {width} bytes")
    rows = np.frombuffer(content, np.uint8).reshape(-1, width)
    labels = rows[:, cifar.label_bytes - 1].astype(np.int64)
    return _checked(cifar, rows[:, cifar.label_bytes :], labels, source)


def _parse_python(cifar: _Cifar, content: bytes, source: str) -> tuple[np.ndarray, np.ndarray]:
    """The same from a pickle of a dict with `data` (n, 3072) and a list of labels."""
    batch = load_plain(content, source)
    if not isinstance(batch, dict):
        raise ValueError(f"{source}: holds a {type(batch).__name__}, not a batch of images")
    data, labels = (batch.get(key, batch.get(key.decode())) for key in (b"data", cifar.label_key))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS or not len(data):
        raise ValueError(f"{source}: data is not an array of images of {_PIXELS} bytes")
    # Bounded before it becomes an array: Python's integers have no size.
    valid = isinstance(labels, list) and all(isinstance(label, int) and 0 <= label < 256 for label in labels)
    if not valid or len(labels) != len(data):
        raise ValueError(f"{source}: {cifar.label_key.decode()} is not a list of {len(data)} labels")
    return _checked(cifar, data, np.array(labels, np.int64), source)


def _checked(cifar: _Cifar, pixels: np.ndarray, labels: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    if labels.max() >= cifar.classes:
        raise ValueError(f"{source}: holds label {labels.max()}, {cifar.name} has {cifar.classes} classes")
    return pixels.reshape(-1, 3, 32, 32), labels


def _names_of_text(cifar: _Cifar, content: bytes, source: str) -> list[str]:
    return _checked_names(cifar, content.decode("utf-8", "replace").split(), source)


def _names_of_pickle(cifar: _Cifar, content: bytes, source: str) -> list[str]:
    meta = load_plain(content, source)
    names = meta.get(cifar.names_key, meta.get(cifar.names_key.decode())) if isinstance(meta, dict) else None
    names = names if isinstance(names, list) else []
    return _checked_names(
        cifar, [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names], source
    )


def _checked_names(cifar: _Cifar, names: list[str], source: str) -> list[str]:
    if len(names) != cifar.classes:
        raise ValueError(f"{source}: holds {len(names)} class names, not {cifar.classes}")
    return names
