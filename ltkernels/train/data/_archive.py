"""Named files out of a folder or a .tar.gz beside it, whole, in memory, and bounded in size; nothing is unpacked to disk."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_MEMBER_BYTES = 1 << 28
"""The largest file of the data sets read this way (CIFAR-100's training set) holds 155 MB."""

MAX_ARCHIVE_BYTES = 1 << 35
MAX_MEMBERS = 20_000_000
"""Of an archive's content: listing a compressed archive decompresses it."""

BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
"""What reading a damaged archive raises."""


def read_files(data_dir: Path, folder: str, archive: str, names: Sequence[str]) -> dict[str, bytes] | None:
    """The content of `names`, from data_dir/folder, data_dir itself or data_dir/archive (in this order); None where none of
    the three is there.

    Raises FileNotFoundError naming what is missing where only a part is there, ValueError for a damaged archive or a file
    above `MAX_MEMBER_BYTES`.
    """
    for place in (data_dir / folder, data_dir):
        if (place / names[0]).is_file():
            return {name: _read(place / name) for name in names}
    path = data_dir / archive
    if not path.is_file():
        return None
    wanted = {f"{folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in members(tar, path):
                name = wanted.get(member.name.removeprefix("./"))
                if name is None or name in found:
                    continue
                if not member.isreg() or member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{path}: {member.name} is no file of at most {MAX_MEMBER_BYTES} bytes")
                file = tar.extractfile(member)
                found[name] = b"" if file is None else file.read()
                if len(found) == len(wanted):
                    break
    except BROKEN as error:
        raise ValueError(f"{path}: not a complete archive ({error})") from error
    missing = [member for member, name in wanted.items() if name not in found]
    if missing:
        raise FileNotFoundError(f"{path}: lacks {', '.join(missing)}")
    return found


def members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members in their order in the file; ValueError where there are more, or larger ones, than any data set needs."""
    total = 0
    for count, member in enumerate(tar):
        total += member.size
        if total > MAX_ARCHIVE_BYTES or count >= MAX_MEMBERS:
            raise ValueError(f"{path}: holds more than {MAX_ARCHIVE_BYTES} bytes or {MAX_MEMBERS} files")
        yield member


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MAX_MEMBER_BYTES:
        raise ValueError(f"{path}: larger than {MAX_MEMBER_BYTES} bytes")
    return path.read_bytes()
