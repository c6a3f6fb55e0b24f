"""`folder:PATH`: a tree of image files.

PATH/train/CLASS/* and PATH/test/CLASS/*, with `val` (or `valid`, `validation`) beside them or in place of `test`, in any
capitalisation; or PATH/CLASS/* without a split, of which a share of every class is then held out. Such a tree may lie below
further folders. PATH is a folder, or a .tar, .tar.gz, .tar.xz or .zip that holds it; archives are read in memory, nothing is
unpacked. Classes are numbered in the natural order of their names (`2_cat` before `10_dog`). The training set is used as it is
unless an imbalance factor is given, which thins it before anything is decoded.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ltkernels._arrays import natural_key
from ltkernels.train.data._archive import clipped, is_plain, members, open_tar
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import SUFFIXES, Source, of_file
from ltkernels.train.data._pictures import build
from ltkernels.train.data._split import listed

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
# What lies beside pictures: a folder of nothing else is no class.
_BESIDE = (
    ".txt", ".csv", ".tsv", ".json", ".md", ".xml", ".yml", ".yaml", ".py", ".html", ".pdf", ".db", ".ini", ".log", ".toml", ".pt",
)  # fmt: skip

Parts = tuple[str, ...]
Place = Callable[[Parts], tuple[str, str] | None]
"""(split, class) of a path, None for one that is of neither."""


@dataclass
class Tree:
    """The image files found, each with its path in the tree as `file`; and of the others how many there are by (folder, suffix); an
    empty folder counts as one of suffix ""."""

    files: list[Source] = field(default_factory=list)
    skipped: Counter[tuple[Parts, str]] = field(default_factory=Counter)

    def wants(self, parts: Parts) -> bool:
        """Whether this is the path of an image; another file is counted, unless it is hidden."""
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            return False
        if parts[-1].lower().endswith(SUFFIXES):
            return True
        self.skipped[parts[:-1], PurePosixPath(parts[-1]).suffix.lower() or "without a suffix"] += 1
        return False


def load(request: DataRequest) -> Dataset:
    """Load folder:PATH. Raises FileNotFoundError or ValueError naming the folder or file, ImportError without Pillow."""
    path = Path(request.argument).expanduser()
    with _opened(path) as tree:
        return build(request, f"folder:{path.name}", path, *_labelled(tree, path))


def _labelled(tree: Tree, path: Path) -> tuple[dict[str, tuple[list[Source], np.ndarray]], list[str], list[str]]:
    """Per split its files with labels, in the order of their names; the class names; and what to say."""
    paths = [tuple(file.file.split("/")) for file in tree.files]
    place = _layout(paths)
    placed: dict[str, list[tuple[str, Source]]] = {}
    for parts, file in zip(paths, tree.files):
        if (where := place(parts)) is not None:
            placed.setdefault(where[0], []).append((where[1], file))
    kinds: Counter[str] = Counter()
    for (_, suffix), count in tree.skipped.items():
        kinds[suffix] += count
    del kinds[""]
    found = listed([f"{count} {suffix}" for suffix, count in kinds.most_common()])
    classes = {split: {name for name, _ in placed.get(split, ())} for split in ("train", "test", "val")}
    if not classes["train"]:
        raise FileNotFoundError(
            f"{path}: no image train/CLASS/*.png|jpg|..., and no CLASS/* of two classes; "
            f"it holds {len(tree.files)} images{', ' if found else ''}{found}"
        )
    _check_lost(tree, place, classes["train"], path)
    for one, other in (("train", "test"), ("test", "train"), ("val", "train")):
        extra = sorted(classes[one] - classes[other])
        if extra and classes[other]:
            raise ValueError(f"{path}: class {clipped(extra[0])} has images in {one}, none in {other}")
    names = sorted(classes["train"], key=natural_key)
    number = {name: i for i, name in enumerate(names)}
    result = {}
    for split in (split for split in classes if classes[split]):
        rows = sorted(placed[split], key=lambda row: (number[row[0]], natural_key(row[1].name)))
        result[split] = [file for _, file in rows], np.array([number[name] for name, _ in rows])
    return result, names, [f"{kinds.total()} files of other kinds are not read: {found}"] if kinds else []


def _layout(paths: list[Parts]) -> Place:
    """By the first folder named as a split that has a class below it; where none is called train, all are train, and the class is the
    first folder that not all share."""

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


def _check_lost(tree: Tree, place: Place, classes: set[str], path: Path) -> None:
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
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder")
    with ExitStack() as stack:
        zipped = zipfile.is_zipfile(path)
        try:
            archive: Any = stack.enter_context(zipfile.ZipFile(path) if zipped else open_tar(path))
        except Exception as error:  # forged headers make zipfile and tarfile raise whatever they like
            raise ValueError(
                f"{path}: neither a folder nor a .tar, .tar.gz, .tar.xz or .zip archive ({clipped(error)})"
            ) from error
        if zipped:
            yield _of_archive(path, ((info.filename, partial(archive.open, info), 0) for info in archive.infolist()))
            return
        files = (member for member in members(archive, path) if is_plain(member))
        yield _of_archive(path, ((m.name, partial(archive.extractfile, m), m.offset) for m in files))


def _of_archive(path: Path, entries: Iterable[tuple[str, Callable[[], Any], int]]) -> Tree:
    """Of members with their names, what opens them and where they lie."""
    tree = Tree()
    for name, opener, place in entries:
        parts = _parts(name)
        if parts and tree.wants(parts):
            tree.files.append(Source(f"{path}: {name}", opener, place, True, str(path), file="/".join(parts)))
    return tree


def _parts(name: str) -> Parts:
    """The parts of an archive's path; () for a folder, and for one that leads out of it."""
    # Some packers of Windows write what the format forbids.
    name = name if "/" in name else name.replace("\\", "/")
    parts = PurePosixPath(name).parts
    if name.endswith("/") or ".." in parts or parts[:1] == ("/",):
        return ()
    return parts


def _of_folder(root: Path) -> Tree:
    tree = Tree()
    # With a train folder, what else lies beside it is none of ours, and may be large.
    splits = sorted(entry.name for entry in root.iterdir() if entry.name.lower() in _SPLITS and entry.is_dir())
    trains = [root / name for name in splits if _SPLITS[name.lower()] == "train"]
    whole = not any(entry.is_dir() for train in trains for entry in train.iterdir())
    for below in [""] if whole else splits:
        tree.files += walk(root, below, tree)
    return tree


def walk(root: Path, below: str = "", tree: Tree | None = None) -> Iterator[Source]:
    """The image files of a folder, or of the one `below` it, at any depth; other files are counted in `tree`. Raises OSError for what
    cannot be read, ValueError for a link that leads out of `root`: what it leads to would be read into a model without a word."""
    tree, inside = tree or Tree(), root.resolve()
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(root / below, onerror=_raise, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            # Links in a ring, or from many folders into the same, make paths without end.
            raise ValueError(f"{place}: a link to a folder that is read already")
        seen.add((status.st_dev, status.st_ino))
        parts = Path(place).relative_to(root).parts
        if parts and not folders and not files:
            tree.skipped[parts, ""] += 1
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in files if os.path.isfile(os.path.join(place, name)) and tree.wants((*parts, name))]
        for path in (os.path.join(place, name) for name in (*folders, *images)):
            if os.path.islink(path) and not Path(path).resolve().is_relative_to(inside):
                raise ValueError(f"{path}: leads out of {root}")
        for name in images:
            yield of_file(os.path.join(place, name), "/".join((*parts, name)))


def _raise(error: OSError) -> None:
    raise error
