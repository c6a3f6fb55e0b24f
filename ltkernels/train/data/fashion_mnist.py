"""`fashion-mnist-lt`: Fashion-MNIST (Xiao et al. 2017) from its four IDX files, thinned to a long-tailed profile.

The files, plain or .gz, are read from --data-dir; Debian's package `dataset-fashion-mnist` puts them where the default
looks. An IDX file is a big-endian header (magic 0x0000TTDD: type TT, DD dimensions; then DD sizes) and raw bytes.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._longtail import make_long_tailed

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
DEFAULT_IMBALANCE = 100.0
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_UINT8 = 0x08
# Fashion-MNIST's largest file holds 47 MB; the bound keeps a forged .gz from filling the memory.
_MAX_BYTES = 1 << 27


def load(request: DataRequest) -> Dataset:
    """Load fashion-mnist-lt. Raises FileNotFoundError saying where to put the files, ValueError for a broken one."""
    folder = request.data_dir or DEBIAN_DIR
    x_train = read_idx(_find(folder, "train-images-idx3-ubyte"), dims=3)
    y_train = read_idx(_find(folder, "train-labels-idx1-ubyte"), dims=1)
    x_test = read_idx(_find(folder, "t10k-images-idx3-ubyte"), dims=3)
    y_test = read_idx(_find(folder, "t10k-labels-idx1-ubyte"), dims=1)
    for what, images, labels in (("train", x_train, y_train), ("t10k", x_test, y_test)):
        if len(images) != len(labels) or len(labels) == 0 or labels.max() >= len(CLASS_NAMES):
            raise ValueError(
                f"{folder}: the {what} files disagree: {len(images)} images, {len(labels)} labels, "
                f"largest label {labels.max(initial=0)} (of {len(CLASS_NAMES)} classes)"
            )
    imbalance = DEFAULT_IMBALANCE if request.imbalance is None else request.imbalance
    try:
        kept = make_long_tailed(y_train, imbalance, request.profile, request.seed)
        return Dataset.from_arrays(
            x_train[kept],
            y_train[kept].astype(np.int64),
            x_test,
            y_test.astype(np.int64),
            class_names=CLASS_NAMES,
            name="fashion-mnist-lt",
            defaults={"epochs": 12, "batch_size": 128, "lr": 0.1},
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"fashion-mnist-lt: no {name} or {name}.gz in {folder}; put the four IDX files there, name their folder with "
        f"--data-dir, or install Debian's package: apt-get install dataset-fashion-mnist"
    )


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes (plain or .gz) as a uint8 array of `dims` dimensions.

    Raises ValueError naming the file where the magic number, the sizes or the length is wrong.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes")
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes((0, 0, _UINT8, dims)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes with {dims} dimensions")
    shape = struct.unpack(f">{dims}I", content[4:header])
    # Python's integers: forged sizes cannot overflow the product.
    expected = 1
    for size in shape:
        expected *= size
    if len(content) - header != expected:
        raise ValueError(f"{path}: the header promises {shape}, but {len(content) - header} bytes follow")
    # A copy: an array over immutable bytes makes torch warn.
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()
