"""`folder:PATH`: a tree of image files, PATH/train/CLASS/*.png|jpg and PATH/test/CLASS/*.png|jpg.

PATH is a folder, or a .tar, .tar.gz, .tar.xz or .zip that holds such a tree, perhaps below one folder of its own; archives
are read in memory, nothing is unpacked. Classes are numbered in the natural order of their names (`2_cat` before `10_dog`).
The training set is used as it is unless an imbalance factor is given, which thins it before anything is decoded.
"""

import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ltkernels.train.data._archive import BROKEN, clipped, is_plain, members, open_tar
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import MAX_FILE_BYTES, SUFFIXES, Source, decode
from ltkernels.train.data._longtail import make_long_tailed

SPLITS = ("train", "test")


class _File(NamedTuple):
    """One image file of a tree: its path (split, class, ..., name) and where its reader finds it."""

    parts: tuple[str, ...]
    source: Source


def load(request: DataRequest) -> Dataset:
    """Load folder:PATH. Raises FileNotFoundError or ValueError naming the folder or file, ImportError without Pillow."""
    path = Path(request.argument).expanduser()
    with _opened(path) as files:
        labelled, names = _labelled(files, path)
        train, y_train = labelled["train"]
        if request.imbalance is not None:
            kept = make_long_tailed(y_train, request.imbalance, request.profile, request.seed)
            train, y_train = [train[i] for i in kept], y_train[kept]
        test, y_test = labelled["test"]
        images = decode([file.source for file in (*train, *test)], request.image_size)
    return Dataset.from_arrays(
        images[: len(train)],
        y_train,
        images[len(train) :],
        y_test,
        class_names=names,
        name=f"folder:{path.name}",
        defaults={"epochs": 30, "batch_size": 128, "lr": 0.1},
    )


def natural_key(name: str) -> list[tuple[int, int, str, str]]:
    """Sorts `class2` before `class10`."""
    parts = re.split(r"([0-9]+)", name)
    # Digits compare as the number does, by length and then by value, however many there are: int() refuses thousands.
    digits = [part.lstrip("0") for part in parts]
    return [(1, len(d), d, part) if i % 2 else (0, 0, "", part) for i, (part, d) in enumerate(zip(parts, digits))]


def _labelled(files: list[_File], path: Path) -> tuple[dict[str, tuple[list[_File], np.ndarray]], list[str]]:
    """Per split its files with labels, in the order of their names, and the class names."""
    members: dict[tuple[str, str], list[_File]] = {}
    for file in files:
        members.setdefault((file.parts[0], file.parts[1]), []).append(file)
    classes = {split: {name for s, name in members if s == split} for split in SPLITS}
    for split in SPLITS:
        if not classes[split]:
            raise FileNotFoundError(f"{path}: no image {split}/CLASS/*.png|jpg")
    for one, other in (SPLITS, SPLITS[::-1]):
        extra = sorted(classes[one] - classes[other])
        if extra:
            raise ValueError(f"{path}: class {clipped(extra[0])} has images in {one}, none in {other}")
    names = sorted(classes["train"], key=natural_key)
    result = {}
    for split in SPLITS:
        rows = [sorted(members[split, name], key=lambda file: natural_key(file.source.name)) for name in names]
        labels = np.repeat(np.arange(len(names)), [len(row) for row in rows])
        result[split] = ([file for row in rows for file in row], labels)
    return result, names


@contextmanager
def _opened(path: Path) -> Iterator[list[_File]]:
    """The image files of a folder or archive, readable inside the block."""
    if path.is_dir():
        yield _of_folder(path)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder")
    elif zipfile.is_zipfile(path):
        with _archive(path, zipfile.ZipFile) as archive:
            yield _of_zip(archive, path)
    else:
        with _archive(path, open_tar) as archive:
            yield _of_tar(archive, path)


@contextmanager
def _archive(path: Path, opener: Callable[[Path], Any]) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(opener(path))
        except Exception as error:  # forged headers make zipfile and tarfile raise whatever they like
            raise ValueError(
                f"{path}: neither a folder nor a .tar, .tar.gz, .tar.xz or .zip archive ({clipped(error)})"
            ) from error
        yield archive


def _is_image(parts: tuple[str, ...]) -> bool:
    visible = not any(part.startswith((".", "__MACOSX")) for part in parts)
    return visible and parts[-1].lower().endswith(SUFFIXES)


def _of_folder(root: Path) -> list[_File]:
    return [file for split in SPLITS for file in walk(root, (split,)) if len(file.parts) >= 3]


def walk(root: Path, below: tuple[str, ...] = ()) -> Iterator[_File]:
    """The image files below a folder, at any depth. Raises ValueError for a link that leads out of `root`: what it leads
    to would be read into a model without a word."""
    yield from _walk(root, below, set())


def _walk(root: Path, below: tuple[str, ...], seen: set[tuple[int, int]]) -> Iterator[_File]:
    place = os.path.join(root, *below)
    if not os.path.isdir(place):
        return
    status = os.stat(place)
    if (status.st_dev, status.st_ino) in seen:
        # Links in a ring, or from many folders into the same, make paths without end.
        raise ValueError(f"{place}: a link to a folder that is read already")
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(place) as entries:
        for entry in entries:
            parts = (*below, entry.name)
            is_folder = entry.is_dir()
            if entry.name.startswith(".") or not (is_folder or (_is_image(parts) and entry.is_file())):
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve()):
                raise ValueError(f"{entry.path}: leads out of {root}")
            if is_folder:
                yield from _walk(root, parts, seen)
            else:
                yield _File(parts, Source(entry.path, partial(open, entry.path, "rb")))


def _below_split(name: str) -> tuple[str, ...] | None:
    """The parts of an archive's path from `train` or `test` on, which may lie below one folder; None for other paths."""
    parts = PurePosixPath(name).parts
    if ".." in parts or parts[:1] == ("/",):
        return None
    parts = tuple(part for part in parts if part != ".")
    for start in (0, 1):
        if len(parts) >= start + 3 and parts[start] in SPLITS:
            return parts[start:] if _is_image(parts[start:]) else None
    return None


def _of_zip(archive: zipfile.ZipFile, path: Path) -> list[_File]:
    files = []
    for info in archive.infolist():
        parts = None if info.filename.endswith("/") else _below_split(info.filename)  # is_dir() fails on an empty name
        if parts is None:
            continue
        if info.file_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {clipped(info.filename)} is larger than {MAX_FILE_BYTES} bytes")
        # `decode` reads no more than its bound, whatever size the archive's own listing claims.
        files.append(_File(parts, Source(f"{path}: {info.filename}", lambda info=info: archive.open(info))))
    return files


def _of_tar(archive: tarfile.TarFile, path: Path) -> list[_File]:
    found = []
    try:
        for member in members(archive, path):
            parts = _below_split(member.name)
            if parts is not None and is_plain(member):
                found.append((parts, member))
    except BROKEN as error:
        raise ValueError(f"{path}: not a complete archive ({clipped(error)})") from error
    return [
        _File(parts, Source(f"{path}: {member.name}", lambda member=member: _of_member(archive, member), member.offset))
        for parts, member in found
    ]


def _of_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file  # type: ignore[return-value]
