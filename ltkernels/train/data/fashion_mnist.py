"""`fashion-mnist-lt`: Fashion-MNIST (Xiao et al. 2017) from its four IDX files, thinned to a long-tailed profile.

The files, plain or .gz, are read from --data-dir; Debian's package `dataset-fashion-mnist` puts them where the default
looks. An IDX file is a big-endian header (magic 0x0000TTDD: type TT, DD dimensions; then DD sizes) and raw bytes.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ltkernels.train.data._dataset import DataRequest, Dataset, naming

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
    arrays = [read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dims=3) for part in ("train", "t10k")]
    labels = [read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), dims=1) for part in ("train", "t10k")]
    with naming(folder):
        return Dataset.from_arrays(
            *(arrays[0], labels[0], arrays[1], labels[1]),
            class_names=CLASS_NAMES,
            name="fashion-mnist-lt",
            defaults={"epochs": 12, "batch_size": 128, "lr": 0.1},
            **request.division(DEFAULT_IMBALANCE),
        )


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
    # Of Python's integers: forged sizes cannot overflow the product.
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path}: the header promises {shape}, but {len(content) - header} bytes follow")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
