"""Named files out of a folder or a .tar.gz beside it, whole, in memory, and bounded in size; nothing is unpacked to disk."""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

MAX_MEMBER_BYTES = 1 << 28
"""The largest file of the data sets read this way (CIFAR-100's training set) holds 155 MB."""

MAX_ARCHIVE_BYTES = 1 << 35
MAX_MEMBERS = 20_000_000
"""Of an archive's content: listing a compressed archive decompresses it."""

MAX_RATIO = 100
FREE_BYTES = 1 << 28
"""A compressed archive may hold `MAX_RATIO` times its own size, or `FREE_BYTES` where that is more. Pictures compress 1.0 times, the
zeros around tiny ones 10 times; a bomb, 1 000 times and more."""

BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, MemoryError)
"""What reading a damaged archive raises; MemoryError, where .xz asks for a dictionary of gigabytes."""


def read_files(data_dir: Path, folder: str, archive: str, names: Sequence[str]) -> dict[str, bytes] | None:
    """The content of `names`, from data_dir/folder, data_dir itself or data_dir/archive (in this order); None where none of
    the three is there.

    Raises FileNotFoundError naming what is missing where only a part is there, ValueError for a damaged archive or a file
    above `MAX_MEMBER_BYTES`.
    """
    for place in (data_dir / folder, data_dir):
        if (place / names[0]).is_file():
            too_large = next((name for name in names if (place / name).stat().st_size > MAX_MEMBER_BYTES), None)
            if too_large is not None:
                raise ValueError(f"{place / too_large}: larger than {MAX_MEMBER_BYTES} bytes")
            return {name: (place / name).read_bytes() for name in names}
    path = data_dir / archive
    if not path.is_file():
        return None
    found: dict[str, bytes] = {}
    try:
        with open_tar(path) as tar:
            for member in members(tar, path):
                lies, _, name = member.name.removeprefix("./").partition("/")
                if lies != folder or name not in names or name in found:
                    continue
                if not is_plain(member) or member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{path}: {member.name} is no file of at most {MAX_MEMBER_BYTES} bytes")
                file = tar.extractfile(member)
                found[name] = b"" if file is None else file.read()
                if len(found) == len(names):
                    break
    except BROKEN as error:
        raise ValueError(f"{path}: not a complete archive ({clipped(error)})") from error
    missing = [f"{folder}/{name}" for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f"{path}: lacks {', '.join(missing)}")
    return found


class _Bounded:
    """A file that refuses to read more at once than a member may hold (tarfile reads some headers whole, however long they
    say they are), and beyond `end`."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._end = file, end
        self.tell = file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        # A compressed file is decompressed up to where it is moved.
        if whence == 0 and offset > self._end:
            raise tarfile.ReadError(f"it holds more than {self._end} bytes, or promises them")
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"a part of more than {MAX_MEMBER_BYTES} bytes")
        if self._file.tell() + size > self._end:
            # The last block of a whole archive may well end there.
            size = max(0, self._end - self._file.tell())
        return self._file.read(size)


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A .tar, .tar.gz, .tar.bz2 or .tar.xz for reading. Raises what `BROKEN` lists where it is none."""
    with path.open("rb") as plain:
        start = plain.read(6)
        plain.seek(0)
        opener = next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), None)
        size = path.stat().st_size
        end = max(FREE_BYTES, MAX_RATIO * size) if opener else size
        with opener(plain) if opener else nullcontext(plain) as file:
            try:
                tar = tarfile.open(fileobj=_Bounded(file, end), mode="r:")  # type: ignore[arg-type]  # noqa: SIM115
            except BROKEN:
                raise
            except Exception as error:  # forged headers make tarfile raise whatever it likes
                raise tarfile.ReadError(clipped(error)) from error
            with tar:
                yield tar


def members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members in their order in the file; ValueError where there are more, or larger ones, than any data set needs, or where
    the archive is damaged."""
    total = count = 0
    while True:
        try:
            member = tar.next()
        except Exception as error:  # forged headers make tarfile raise whatever it likes
            raise ValueError(f"{path}: not a complete archive ({clipped(error)})") from error
        if member is None:
            return
        # The archive would keep every header for what nobody asks of it here.
        tar.members.clear()
        total, count = total + member.size, count + 1
        if total > MAX_ARCHIVE_BYTES or count > MAX_MEMBERS:
            raise ValueError(f"{path}: holds more than {MAX_ARCHIVE_BYTES} bytes or {MAX_MEMBERS} files")
        yield member


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file that holds its bytes: no link, no device, none of holes that take no room."""
    return member.isreg() and not member.issparse()


def clipped(value: object, length: int = 200) -> str:
    """What a file holds, for a message: forged names and values can fill a screen, or a log."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."
