"""Files of arrays (.npz, .npy) of any origin: mapped or read in bounds, written whole or not at all. Nothing is ever
unpickled."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from ._files import replacing

# What zipfile and numpy's header parser raise on bytes that are no .npz file.
DAMAGED = (
    ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError, EOFError, SyntaxError, OverflowError, MemoryError,
    zipfile.BadZipFile, struct.error, tokenize.TokenError, zlib.error,
)  # fmt: skip
MAX_RATIO = 100
"""A compressed array may hold so many times the bytes that it takes in the file; random features hold 1.1 times as many, pictures
20 times. Deflate itself reaches 1 032, which is what a bomb needs."""
FREE_BYTES = 1 << 28
"""Up to this size any ratio is allowed."""
_KEPT = 300  # characters of a message that quotes a file


def read_arrays(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, in memory; those of `optional` that it has.

    Raises FileNotFoundError, or ValueError naming the file: damaged, arrays that are missing or hold objects (which would
    have to be unpickled), a header that promises other bytes than are there, more than `MAX_RATIO` times compressed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            missing = [name for name in required if name not in entries]
            if missing:
                raise ValueError(f"lacks the array {', '.join(missing)} (it holds {', '.join(entries) or 'none'})")
            size = path.stat().st_size
            return {name: _read(archive, entries[name], size) for name in (*required, *optional) if name in entries}
    except DAMAGED as error:
        raise ValueError(f"{path}: not a usable .npz file: {str(error)[:_KEPT]}") from error


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file. FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except DAMAGED as error:
        raise ValueError(f"{path}: not a usable .npz file: {str(error)[:_KEPT]}") from error


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file_size: int) -> np.ndarray:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename} is compressed by another method than deflate")
    if entry.file_size > max(FREE_BYTES, MAX_RATIO * min(entry.compress_size, file_size)):
        raise ValueError(f"{entry.filename} is compressed more than {MAX_RATIO} times; write it without compression")
    with archive.open(entry) as file:
        shape, fortran, dtype = _header(file)
        # Numpy makes room for what the header says before it looks whether that much is there.
        count = prod(shape)
        if count * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename} promises {dtype} {shape}, {entry.file_size - file.tell()} bytes follow")
        data = file.read()
    return np.frombuffer(bytearray(data), dtype, count).reshape(shape, order="F" if fortran else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type from an .npy header. ValueError for objects and for sizes that no array has."""
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"it holds {dtype}; arrays of plain numbers and strings are read")
    if any(n < 0 for n in shape):
        raise ValueError(f"it has the shape {shape}")
    return shape, fortran, dtype


def map_npy(path: Path) -> np.ndarray:
    """The array of an .npy file, memory-mapped, copy on write. FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            offset = file.tell()
        if prod(shape) * dtype.itemsize != path.stat().st_size - offset:
            raise ValueError(f"promises {dtype} {shape}, {path.stat().st_size - offset} bytes follow")
        if not prod(shape):
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "c", offset, shape, order="F" if fortran else "C")
    except DAMAGED as error:
        raise ValueError(f"{path}: not a usable .npy file: {str(error)[:_KEPT]}") from error


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
                    shape, fortran, dtype = _header(file)
                    header = file.tell()
                if fortran or not prod(shape):
                    continue
                with path.open("rb") as file:
                    file.seek(entry.header_offset + 26)
                    sizes = np.frombuffer(file.read(4), "<u2")
                offset = entry.header_offset + 30 + int(sizes.sum()) + header
                arrays[name] = np.memmap(path, dtype, "c", offset, shape)
    except DAMAGED as error:
        raise ValueError(f"{path}: not a usable .npz file: {str(error)[:_KEPT]}") from error
    return arrays


def write_npz(path: Path, **arrays: Any) -> None:
    """Whole or not at all: a reader, or the next call, never sees half of it. Makes the folder. Raises OSError naming the file."""
    with replacing(path, parents=True) as file:
        np.savez(file, **arrays)
