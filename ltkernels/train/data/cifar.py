"""`cifar10-lt` and `cifar100-lt`: CIFAR (Krizhevsky 2009) thinned to a long-tailed profile.

Read from --data-dir, in the original binary or Python version, as the .tar.gz of the home page or unpacked. Nothing is
downloaded and nothing is unpacked to disk. The Python version's files are pickles, and a pickle is a program that may call anything:
its instructions are listed for the numbers and strings in them, and none is carried out.
"""

import pickletools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ltkernels.train.data._archive import clipped, read_files
from ltkernels.train.data._dataset import DataRequest, Dataset, naming

DEFAULT_IMBALANCE = 100.0
_PIXELS = 3 * 32 * 32
_BESIDE = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "FRAME")  # of a pickle's instructions those that make nothing


class _Version(NamedTuple):
    """Where one version of a data set lies: `train`, `test` and `names` are file names in `folder` or in `archive`."""

    folder: str
    archive: str
    train: Sequence[str]
    test: str
    names: str


class Cifar(NamedTuple):
    """One of the two data sets: its versions, and how labels are stored in them."""

    name: str
    classes: int
    binary: _Version
    python: _Version
    label_bytes: int  # before each image of the binary version; the last is the (fine) label
    label_key: str
    names_key: str


_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10 = Cifar(
    *("cifar10-lt", 10),
    _Version(
        *("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
        *([f"{name}.bin" for name in _BATCHES], "test_batch.bin", "batches.meta.txt"),
    ),
    _Version("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, "test_batch", "batches.meta"),
    *(1, "labels", "label_names"),
)
CIFAR100 = Cifar(
    *("cifar100-lt", 100),
    _Version("cifar-100-binary", "cifar-100-binary.tar.gz", ["train.bin"], "test.bin", "fine_label_names.txt"),
    _Version("cifar-100-python", "cifar-100-python.tar.gz", ["train"], "test", "meta"),
    *(2, "fine_labels", "fine_label_names"),
)


def load(cifar: Cifar, request: DataRequest) -> Dataset:
    """Load `CIFAR10` or `CIFAR100` (fine labels). Raises FileNotFoundError saying where to put the files, ValueError for a broken one."""
    where = request.data_dir
    for version in (cifar.binary, cifar.python):
        wanted = (*version.train, version.test, version.names)
        files = None if where is None else read_files(where, version.folder, version.archive, wanted)
        if files is not None:
            break
    else:
        raise FileNotFoundError(
            f"{cifar.name}: {'no --data-dir is given' if where is None else f'none of its files is in {where}'}; put "
            f"{cifar.binary.archive} or {cifar.python.archive} (from CIFAR's home page), or what is in it, into a folder and name the "
            "folder with --data-dir"
        )
    images, names = (_of_binary, _of_text) if version is cifar.binary else (_of_pickle, _of_meta)
    with naming(f"{version.folder}/{version.names}"):
        class_names = names(cifar, files[version.names])
        if len(class_names) != cifar.classes:
            raise ValueError(f"holds {len(class_names)} class names, not {cifar.classes}")
    parts = []
    for name in (*version.train, version.test):
        with naming(f"{version.folder}/{name}"):
            parts.append(images(cifar, files[name]))
    *train, (x_test, y_test) = parts
    with naming(where):
        return Dataset.from_arrays(
            np.concatenate([x for x, _ in train]),
            np.concatenate([y for _, y in train]),
            x_test,
            y_test,
            class_names=class_names,
            name=cifar.name,
            defaults={"epochs": 30, "batch_size": 128, "lr": 0.1, "crop": 4, "flip": True},
            **request.division(DEFAULT_IMBALANCE),
        )


def _of_binary(cifar: Cifar, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64: a file is a row of label bytes and planes R, G, B."""
    width = cifar.label_bytes + _PIXELS
    if not content or len(content) % width:
        raise ValueError(f"{len(content)} bytes are not a number of images of {width} bytes")
    rows = np.frombuffer(content, np.uint8).reshape(-1, width)
    return _checked(cifar, rows[:, cifar.label_bytes :], rows[:, cifar.label_bytes - 1].astype(np.int64))


def _of_pickle(cifar: Cifar, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The same from a pickle of a dict with an array `data` (n, 3072) and a list of labels."""
    pixels, labels = np.frombuffer(pickled_bytes(content, "data"), np.uint8), pickled_list(content, cifar.label_key)
    if not labels or len(pixels) != _PIXELS * len(labels):
        raise ValueError(f"{len(pixels)} bytes of data are not images of {_PIXELS} for {len(labels)} {cifar.label_key}")
    # Bounded before it becomes an array: Python's integers have no size.
    if not all(isinstance(label, int) and 0 <= label < 256 for label in labels):
        raise ValueError(f"{cifar.label_key} are not a list of numbers below 256")
    return _checked(cifar, pixels, np.array(labels, np.int64))


def _checked(cifar: Cifar, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if labels.max() >= cifar.classes:
        raise ValueError(f"holds label {labels.max()}, {cifar.name} has {cifar.classes} classes")
    return pixels.reshape(-1, 3, 32, 32), labels


def _of_text(cifar: Cifar, content: bytes) -> list[str]:
    return content.decode("utf-8", "replace").split()


def _of_meta(cifar: Cifar, content: bytes) -> list[str]:
    return [str(name) for name in pickled_list(content, cifar.names_key)]


def _instructions(content: bytes) -> Iterator[tuple[str, Any]]:
    """Name and argument of a pickle's instructions. Raises ValueError where it is damaged or none."""
    try:
        for instruction, argument, _ in pickletools.genops(content):
            yield instruction.name, argument
    except Exception as error:  # a forged pickle makes pickletools raise what it likes
        raise ValueError(f"not a pickle of plain data: {clipped(error)}") from error


def pickled_list(content: bytes, key: str) -> list[Any]:
    """The numbers and strings of the list that follows `key` in a pickle; empty where there is none. ValueError for a damaged one."""
    told = (op for op in _instructions(content) if op[0] not in _BESIDE)
    for _, argument in told:
        if argument in (key, key.encode()):
            break
    items, within = [], False
    for name, argument in told:
        if name in ("EMPTY_LIST", "MARK"):
            within = True
        elif name in ("APPEND", "APPENDS"):
            within = False
        elif within and isinstance(argument, int | str):
            items.append(argument)
        else:
            break
    return items


def pickled_bytes(content: bytes, key: str) -> bytes:
    """The bytes of the array in C order that follows `key` in a pickle; empty where there is none. ValueError for a damaged one."""
    found, before = False, ""
    for name, argument in _instructions(content):
        found = found or argument in (key, key.encode())
        # An array's state is (version, shape, type, whether it is in Fortran's order, bytes); Python 2's bytes are listed as text.
        if found and before == "NEWFALSE" and isinstance(argument, bytes | str):
            return argument if isinstance(argument, bytes) else argument.encode("latin-1")
        before = name
    return b""
