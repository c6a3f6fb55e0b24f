"""`folder:PATH`: a tree of image files.

PATH/train/CLASS/* and PATH/test/CLASS/*, with `val` (or `valid`, `validation`) beside them or in place of `test`, in any
capitalisation; or PATH/CLASS/* without a split, of which a share of every class is then held out. Such a tree may lie below
further folders. PATH is a folder, or a .tar, .tar.gz, .tar.xz or .zip that holds it; archives are read in memory, nothing is
unpacked. Classes are numbered in the natural order of their names (`2_cat` before `10_dog`). The training set is used as it is
unless an imbalance factor is given, which thins it before anything is decoded.
"""

import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ltkernels._arrays import natural_key
from ltkernels.train.data._archive import BROKEN, clipped, is_plain, members, open_tar
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import MAX_FILE_BYTES, SUFFIXES, Source, of_file
from ltkernels.train.data._pictures import Part, build
from ltkernels.train.data._split import listed

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
# What lies beside pictures: a folder of nothing else is no class.
_BESIDE = (
    ".txt", ".csv", ".tsv", ".json", ".md", ".xml", ".yml", ".yaml", ".py", ".html", ".pdf", ".db", ".ini", ".log", ".toml", ".pt",
)  # fmt: skip

Parts = tuple[str, ...]


class _File(NamedTuple):
    """One image file of a tree: its path (..., split, class, ..., name) and where its reader finds it."""

    parts: Parts
    source: Source


@dataclass
class Tree:
    """The image files found, and of the others how many there are by (folder, suffix); an empty folder counts as one of
    suffix ""."""

    files: list[_File] = field(default_factory=list)
    skipped: Counter[tuple[Parts, str]] = field(default_factory=Counter)

    def skip(self, parts: Parts) -> None:
        if not _hidden(parts):
            self.skipped[parts[:-1], PurePosixPath(parts[-1]).suffix.lower() or "without a suffix"] += 1


def load(request: DataRequest) -> Dataset:
    """Load folder:PATH. Raises FileNotFoundError or ValueError naming the folder or file, ImportError without Pillow."""
    path = Path(request.argument).expanduser()
    with _opened(path) as tree:
        parts, names, notes = _labelled(tree, path)
        return build(request, f"folder:{path.name}", parts, names, notes)


def _labelled(tree: Tree, path: Path) -> tuple[dict[str, Part], list[str], list[str]]:
    """Per split its files with labels, in the order of their names; the class names; and what to say."""
    place = _layout([file.parts for file in tree.files])
    placed: dict[tuple[str, str], list[_File]] = {}
    for file in tree.files:
        if (where := place(file.parts)) is not None:
            placed.setdefault(where, []).append(file)
    kinds = Counter({suffix: 0 for _, suffix in tree.skipped if suffix})
    for (_, suffix), count in tree.skipped.items():
        if suffix:
            kinds[suffix] += count
    found = listed([f"{count} {suffix}" for suffix, count in kinds.most_common()])
    classes = {split: {name for s, name in placed if s == split} for split in ("train", "test", "val")}
    if not classes["train"]:
        raise FileNotFoundError(
            f"{path}: no image train/CLASS/*.png|jpg|..., and no CLASS/* of two classes; "
            f"it holds {len(tree.files)} images{', ' if found else ''}{found}"
        )
    _check_lost(tree, place, classes["train"], path)
    notes = [f"{sum(kinds.values())} files of other kinds are not read: {found}"] if kinds else []
    if not classes["test"] and classes["val"]:
        notes.append("the val folder is the test set, as there is no other")
        placed = {("test" if split == "val" else split, name): files for (split, name), files in placed.items()}
        classes["test"], classes["val"] = classes["val"], set()
    for one, other in (("train", "test"), ("test", "train"), ("val", "train")):
        extra = sorted(classes[one] - classes[other])
        if extra and classes[other]:
            raise ValueError(f"{path}: class {clipped(extra[0])} has images in {one}, none in {other}")
    names = sorted(classes["train"], key=natural_key)
    result = {}
    for split in (split for split in classes if classes[split]):
        rows = [sorted(placed.get((split, name), []), key=lambda file: natural_key(file.source.name)) for name in names]
        labels = np.repeat(np.arange(len(names)), [len(row) for row in rows])
        files = [file for row in rows for file in row]
        result[split] = Part([file.source for file in files], labels, ["/".join(file.parts) for file in files])
    return result, names, notes


def _layout(paths: list[Parts]) -> Callable[[Parts], tuple[str, str] | None]:
    """A function from a file's path to (split, class): by the first folder named as a split that has a class below it; where
    none is called train, all are train, and the class is the first folder that not all share."""

    def split_of(parts: Parts) -> tuple[str, str] | None:
        for i, part in enumerate(parts[:-2]):
            if part.lower() in _SPLITS:
                return _SPLITS[part.lower()], parts[i + 1]
        return None

    if any(where is not None and where[0] == "train" for where in map(split_of, paths)):
        return split_of
    folders = [parts[:-1] for parts in paths if len(parts) > 1]
    # What the first and the last in order share, all share.
    low, high = min(folders, default=()), max(folders, default=())
    shared = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return lambda parts: ("train", parts[shared]) if len(parts) > shared + 1 else None


def _check_lost(tree: Tree, place: Callable[[Parts], tuple[str, str] | None], classes: set[str], path: Path) -> None:
    """ValueError for a class folder that is left without any image."""
    lost: dict[str, Counter[str]] = {}
    for (folder, suffix), count in tree.skipped.items():
        where = place((*folder, "any"))
        if where is not None and where[0] == "train" and where[1] not in classes and suffix not in _BESIDE:
            lost.setdefault(where[1], Counter())[suffix] += count
    for name, kinds in sorted(lost.items()):
        what = listed([f"{count} {suffix}" for suffix, count in kinds.items() if suffix])
        raise ValueError(f"{path}: class {clipped(name)} has no image that is read ({what or 'its folder is empty'})")


@contextmanager
def _opened(path: Path) -> Iterator[Tree]:
    """The files of a folder or archive, readable inside the block."""
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


def _hidden(parts: Parts) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _is_image(parts: Parts) -> bool:
    return not _hidden(parts) and parts[-1].lower().endswith(SUFFIXES)


def _of_folder(root: Path) -> Tree:
    tree = Tree()
    # With a train folder, what else lies beside it is none of ours, and may be large.
    splits = sorted(entry.name for entry in root.iterdir() if entry.name.lower() in _SPLITS and entry.is_dir())
    whole = not any(_SPLITS[name.lower()] == "train" and _has_folder(root / name) for name in splits)
    for below in [()] if whole else [(name,) for name in splits]:
        tree.files += walk(root, below, tree)
    return tree


def _has_folder(path: Path) -> bool:
    return any(entry.is_dir() for entry in path.iterdir())


def walk(root: Path, below: Parts = (), tree: Tree | None = None) -> Iterator[_File]:
    """The image files below a folder, at any depth; other files are counted in `tree`. Raises ValueError for a link that leads
    out of `root`: what it leads to would be read into a model without a word."""
    yield from _walk(root, below, set(), tree or Tree())


def _walk(root: Path, below: Parts, seen: set[tuple[int, int]], tree: Tree) -> Iterator[_File]:
    place = os.path.join(root, *below)
    if not os.path.isdir(place):
        return
    status = os.stat(place)
    if (status.st_dev, status.st_ino) in seen:
        # Links in a ring, or from many folders into the same, make paths without end.
        raise ValueError(f"{place}: a link to a folder that is read already")
    seen.add((status.st_dev, status.st_ino))
    empty = True
    with os.scandir(place) as entries:
        for entry in entries:
            empty = False
            parts = (*below, entry.name)
            is_folder = entry.is_dir()
            if entry.name.startswith(".") or not (is_folder or entry.is_file()):
                continue
            if not (is_folder or _is_image(parts)):
                tree.skip(parts)
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve()):
                raise ValueError(f"{entry.path}: leads out of {root}")
            if is_folder:
                yield from _walk(root, parts, seen, tree)
            else:
                yield _File(parts, of_file(entry.path))
    if empty and below:
        tree.skipped[below, ""] += 1


def _parts(name: str) -> Parts:
    """The parts of an archive's path; () for one that leads out of it."""
    # Some packers of Windows write what the format forbids.
    parts = PurePosixPath(name if "/" in name else name.replace("\\", "/")).parts
    if ".." in parts or parts[:1] == ("/",):
        return ()
    return tuple(part for part in parts if part != ".")


def _of_zip(archive: zipfile.ZipFile, path: Path) -> Tree:
    tree = Tree()
    for info in archive.infolist():
        parts = () if info.filename.endswith("/") else _parts(info.filename)  # is_dir() fails on an empty name
        if not parts:
            continue
        if not _is_image(parts):
            tree.skip(parts)
            continue
        if info.file_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {clipped(info.filename)} is larger than {MAX_FILE_BYTES} bytes")
        # `decode` reads no more than its bound, whatever size the archive's own listing claims.
        source = Source(f"{path}: {info.filename}", partial(archive.open, info), in_order=True, path=str(path))
        tree.files.append(_File(parts, source))
    return tree


def _of_tar(archive: tarfile.TarFile, path: Path) -> Tree:
    tree = Tree()
    try:
        for member in members(archive, path):
            parts = _parts(member.name)
            if not parts or not is_plain(member):
                continue
            if not _is_image(parts):
                tree.skip(parts)
                continue
            name = f"{path}: {member.name}"
            source = Source(name, partial(_of_member, archive, member), member.offset, True, str(path))
            tree.files.append(_File(parts, source))
    except BROKEN as error:
        raise ValueError(f"{path}: not a complete archive ({clipped(error)})") from error
    return tree


def _of_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file  # type: ignore[return-value]
