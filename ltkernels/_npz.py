"""Files of arrays (.npz) of any origin: mapped instead of read, written whole or not at all. Nothing is ever unpickled."""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# What zipfile and numpy's header parser raise on bytes that are no .npz file.
DAMAGED = (
    ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError, EOFError, SyntaxError, OverflowError, MemoryError,
    zipfile.BadZipFile, struct.error, tokenize.TokenError,
)  # fmt: skip


def map_arrays(path: Path, names: Sequence[str]) -> dict[str, np.memmap]:
    """Those of the named arrays that can be memory-mapped: stored without compression, in C order, neither empty nor of objects.

    Copy on write: the file never changes. An array can be no larger than the file, whatever its header says. Raises
    FileNotFoundError, or ValueError naming the file where it is no .npz file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            for name in names:
                entry = entries.get(f"{name}.npy")
                if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                    continue
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    first = version == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                    shape, fortran, dtype = read(file)
                    header = file.tell()
                if dtype.hasobject or dtype.itemsize == 0 or fortran or not all(n > 0 for n in shape):
                    continue
                with path.open("rb") as file:
                    file.seek(entry.header_offset + 26)
                    sizes = np.frombuffer(file.read(4), "<u2")
                offset = entry.header_offset + 30 + int(sizes.sum()) + header
                arrays[name] = np.memmap(path, dtype, "c", offset, shape)
    except DAMAGED as error:
        raise ValueError(f"{path}: not a usable .npz file: {error}") from error
    return arrays


def write_npz(path: Path, **arrays: Any) -> None:
    """Through a temporary sibling: a reader, or the next call, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
