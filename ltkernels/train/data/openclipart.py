"""`openclipart-lt`: public-domain drawings with a tail of their own, from Debian's package `openclipart-png`.

A class is a sub-category, two folders deep (`animals/birds`), with at least 15 drawings: 60 classes with 1 529 to 15, an
imbalance factor of 102 that nobody made. Links to drawings of other categories do not count, nor do drawings of more than
`MAX_PIXELS` pixels. 5 drawings of each class, whose
files have no exact copy anywhere in the set, are the balanced test set; the rest is for training.
"""

import hashlib
import struct
from collections import Counter
from pathlib import Path

import numpy as np

from ltkernels._arrays import natural_key
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import Source, pictures
from ltkernels.train.data._longtail import make_long_tailed
from ltkernels.train.data.folder import walk

DEBIAN_DIR = Path("/usr/share/openclipart/png")
MIN_IMAGES = 15
MAX_PIXELS = 1 << 22  # 18 drawings have more, up to 623 million, and would take longer than all the others
TEST_PER_CLASS = 5
DEFAULT_SIZE = 32


def load(request: DataRequest) -> Dataset:
    """Load openclipart-lt; drawings are brought to `image_size` (32) pixels, on white.

    Raises FileNotFoundError saying where to put the files, ImportError without Pillow, ValueError for a broken file.
    """
    root = request.data_dir or DEBIAN_DIR
    classes: dict[str, list[Source]] = {}
    for file in walk(root):
        if len(file.parts) > 1 and not Path(file.source.name).is_symlink() and _pixels(file.source) <= MAX_PIXELS:
            classes.setdefault("/".join(file.parts[: min(2, len(file.parts) - 1)]), []).append(file.source)
    classes = {name: sources for name, sources in classes.items() if len(sources) >= MIN_IMAGES}
    if len(classes) < 2:
        raise FileNotFoundError(
            f"openclipart-lt: {root} holds no two categories of {MIN_IMAGES} drawings; name their folder with --data-dir, or "
            f"install Debian's package: apt-get install openclipart-png"
        )
    names = sorted(classes, key=natural_key)
    sources = [s for name in names for s in sorted(classes[name], key=lambda source: natural_key(source.name))]
    labels = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
    test = _held_out(sources, labels, request.seed)
    train = np.setdiff1d(np.arange(len(labels)), test)
    if request.imbalance is not None:
        train = train[make_long_tailed(labels[train], request.imbalance, request.profile, request.seed)]
    size = DEFAULT_SIZE if request.image_size is None else request.image_size
    images = pictures(
        [sources[i] for i in (*train, *test)],
        size,
        cache=request.cache,
        workers=request.workers,
        progress=request.progress,
    )
    return Dataset.from_arrays(
        images[: len(train)],
        labels[train],
        images[len(train) :],
        labels[test],
        class_names=names,
        name="openclipart-lt",
        defaults={"epochs": 30, "batch_size": 64, "lr": 0.05},
    )


def _pixels(source: Source) -> int:
    """Width times height from a PNG file's header; 0 where it is none, which decoding will say."""
    with source.open() as file:
        header = file.read(24)
    width, height = struct.unpack(">II", header[16:]) if len(header) == 24 else (0, 0)
    return width * height


def _held_out(sources: list[Source], labels: np.ndarray, seed: int) -> np.ndarray:
    """Indices of `TEST_PER_CLASS` drawings of each class without a copy: a copy in training would be a test seen before."""
    digests = []
    for source in sources:
        with source.open() as file:
            digests.append(hashlib.sha256(file.read()).digest())
    copies = Counter(digests)
    single = np.array([copies[digest] == 1 for digest in digests])
    # Its own stream, so that every imbalance and profile is tested on the same drawings.
    rng = np.random.default_rng([seed, 10_000])
    rows = []
    for label in range(int(labels.max()) + 1):
        candidates = np.flatnonzero((labels == label) & single)
        if len(candidates) < TEST_PER_CLASS:
            raise ValueError(
                f"openclipart-lt: {sources[int(np.argmax(labels == label))].name} and its class: too many copies"
            )
        rows.append(rng.permutation(candidates)[:TEST_PER_CLASS])
    return np.concatenate(rows)
