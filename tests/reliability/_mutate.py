"""Damage to files: bytes anywhere, and the fields of gzip, zip, tar and PNG with their checksums made right again."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import random
import re
import struct
import tarfile
import zipfile
import zlib
from contextlib import suppress

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
NAMES = (
    "../../secret.png", "/etc/passwd.png", "train/../../secret.png", "train/a/../../../secret.png", "./train/a/x.png", "",
    "train", "train/a", "train/a/", "train/\x1b[31mred\x07/x.png", "train/<script>alert(1)</script>/x.png",
    "train/a\nb/x.png", "train/" + "9" * 5000 + "/x.png", "train/a/" + "7" * 5000 + ".png", "C:\\train\\a\\x.png",
    "train/a\x00b/x.png", "//train/a/x.png", "train/" + "n" * 70000 + "/x.png", "train/\udcff/x.png", "test/a/x.png",
)  # fmt: skip


def damage(data: bytes, rng: random.Random, times: int | None = None) -> bytes:
    """`data` with bits flipped, cut short, blocks doubled, moved or lost, and numbers set to the ends of their range."""
    out = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            return bytes(rng.randbytes(rng.randrange(40)))
        at = rng.randrange(len(out)) if rng.random() < 0.6 else rng.randrange(min(len(out), 128))
        size = min(rng.choice((1, 2, 4, 8, 16, 64, 512)), len(out) - at)
        kind = rng.randrange(10)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 100))
        elif kind == 3:
            block = out[at : at + size]
            del out[at : at + size]
            to = rng.randrange(len(out) + 1)
            out[to:to] = block
        elif kind == 4:
            del out[at : at + size]
        elif kind == 5:
            out[at : at + size] = rng.randbytes(size)
        elif kind in (6, 7):
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(_EDGES) % (1 << 8 * width)
            out[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 8:
            numbers = list(re.finditer(rb"\d+", bytes(out)))
            if numbers:
                found = rng.choice(numbers)
                value = rng.choice((b"0", b"-1", b"9" * 12, b"9" * 25, b"9" * 5000, b"1e999", b"nan"))
                out[found.start() : found.end()] = value
        else:
            out[at : at + size] = bytes(rng.choice((b"\0", b"\xff", b" ", b"[")) * size)
    return bytes(out)


def repack(name: str, data: bytes, rng: random.Random) -> bytes:
    """`data` damaged below its outer layer: content of an archive member, with right checksums around it."""
    try:
        if name.endswith(".tar"):
            return _tar_field(data, rng)
        if name.endswith("gz"):
            inner = gzip.decompress(data)
            return gzip.compress(repack(name[:-3], inner, rng), 1)
        if name.endswith(".xz"):
            return lzma.compress(repack(name[:-3], lzma.decompress(data), rng), preset=0)
        if name.endswith(".bz2"):
            return bz2.compress(repack(name[:-4], bz2.decompress(data), rng), 1)
        if name.endswith((".npz", ".zip", ".pt")):
            return _zip_member(data, rng)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error):
        pass
    return damage(data, rng)


def _tar_field(data: bytes, rng: random.Random) -> bytes:
    """One header's field replaced, or a member's content damaged, checksum put right."""
    heads = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not heads:
        return damage(data, rng)
    at, out = rng.choice(heads), bytearray(data)
    field = rng.choice(("name", "size", "type", "link", "prefix", "content"))
    if field == "content":
        end = rng.choice([*heads, len(out)])
        return bytes(out[: at + 512]) + damage(bytes(out[at + 512 : end]), rng) + bytes(out[end:])
    name = rng.choice(NAMES).encode("utf-8", "surrogateescape")
    if field in ("name", "prefix"):
        start, width = (at, 100) if field == "name" else (at + 345, 155)
        out[start : start + width] = name[:width].ljust(width, b"\0")
    elif field == "size":
        value = rng.choice(
            (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000000\0", b"-0000000001\0", b"junk")
        )
        out[at + 124 : at + 136] = value.ljust(12, b"\0")
    elif field == "type":
        out[at + 156] = rng.choice(b"0123456789xgLKSXAVDMN\0\xff")
    else:
        out[at + 157 : at + 257] = name[:100].ljust(100, b"\0")
        out[at + 156] = rng.choice(b"12")
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def _zip_member(data: bytes, rng: random.Random) -> bytes:
    """Written anew with one member damaged, renamed, doubled or lost; sometimes a field of the listing is damaged instead."""
    if rng.random() < 0.3:
        out = bytearray(data)
        heads = [m.start() for m in re.finditer(b"PK\x01\x02", data)] or [0]
        at = rng.choice(heads)
        # Flags, method, checksum, sizes, lengths, attributes, offset.
        place, width = rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (38, 4), (42, 4)))
        out[at + place : at + place + width] = (rng.choice(_EDGES) % (1 << 8 * width)).to_bytes(width, "little")
        return bytes(out)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    if not members:
        return damage(data, rng)
    i = rng.randrange(len(members))
    name, content = members[i]
    kind = rng.randrange(8)
    if kind == 0:
        del members[i]
    elif kind == 1:
        members.append((name, damage(content, rng)))
    elif kind == 2:
        members[i] = (rng.choice(NAMES).encode("utf-8", "replace").decode(), content)
    else:
        members[i] = (name, damage(content, rng))
    buffer = io.BytesIO()
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
    )
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for member, body in members:
            archive.writestr(member or "x", body)
    return buffer.getvalue()


def png(width: int, height: int, value: int = 0, rows: int | None = None, extra: bytes = b"") -> bytes:
    """A grey PNG by hand, so that forged headers need no encoder; `rows` of image data, `extra` chunks before them."""
    data = (b"\0" + bytes([value]) * min(width, 1 << 16)) * (min(height, 64) if rows is None else rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width % 2**32, height % 2**32, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@functools.cache
def _bomb() -> bytes:
    return zlib.compress(bytes(1 << 24))


def hostile_png(rng: random.Random) -> bytes:
    """Huge or no dimensions, bombs in the pixels and in the texts, chunks with wrong lengths."""
    return rng.choice(
        (
            lambda: png(rng.choice((0, 1 << 16, 1 << 31, 8192)), rng.choice((0, 8192, 1 << 31)), rows=1),
            lambda: png(4, 4, extra=chunk(b"zTXt", b"comment\0\0" + _bomb())),
            lambda: png(4, 4, extra=chunk(b"iCCP", b"profile\0\0" + _bomb())),
            lambda: png(4, 4, extra=chunk(b"eXIf", b"II*\0" + rng.randbytes(60))),
            lambda: png(4, 4, rows=1 << 20),
            lambda: png(4, 4)[: rng.randrange(60)],
            lambda: damage(png(4, 4), rng),
            lambda: png(4, 4, extra=chunk(b"acTL", struct.pack(">II", 1 << 31, 0))),
            lambda: png(4, 4, extra=chunk(b"PLTE", bytes(3 * 256)) + chunk(b"tRNS", bytes(300))),
            lambda: b"GIF89a" + rng.randbytes(30),
            lambda: b"\xff\xd8\xff\xe1" + rng.randbytes(200),
        )
    )()


def hostile_tar(files: dict[str, bytes], secret: str, rng: random.Random, mode: str = "w") -> bytes:
    """A tar of `files` with links, devices, names that lead out, false sizes and nested archives among them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        items = list(files.items())
        for _ in range(rng.randrange(1, 5)):
            items.insert(rng.randrange(len(items) + 1), (_name(rng, files), rng.choice((None, hostile_png(rng)))))
        for name, content in items:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = rng.choice(
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
                )
                info.linkname = rng.choice((secret, f"../..{secret}", "/dev/zero", name))
                _add(tar, info, b"")
                continue
            info.size = len(content)
            if rng.random() < 0.1:
                info.pax_headers = rng.choice(
                    (
                        {"size": "9" * 30}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"mtime": "x"},
                        {"GNU.sparse.map": "0,9999999999,5", "GNU.sparse.size": "99999999999"}, {"path": "../" * 9 + name},
                        {"GNU.sparse.size": "junk"}, {"hdrcharset": "BINARY"},
                    )
                )  # fmt: skip
            _add(tar, info, content)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, content: bytes) -> None:
    # Some names and values no writer lets through.
    with suppress(ValueError):
        tar.addfile(info, io.BytesIO(content))


def hostile_zip(files: dict[str, bytes], secret: str, rng: random.Random) -> bytes:
    """A zip of `files` with links, names that lead out, bombs, encrypted members and nested archives among them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for _ in range(rng.randrange(1, 5)):
            info = zipfile.ZipInfo(_name(rng, files).encode("utf-8", "replace").decode()[:60000] or "x")
            info.external_attr = rng.choice((0, 0o120777 << 16))
            content = rng.choice((secret.encode(), bytes(1 << 22), buffer.getvalue(), hostile_png(rng)))
            # Some names no writer lets through.
            with suppress(ValueError, zipfile.LargeZipFile):
                archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    data = bytearray(buffer.getvalue())
    if rng.random() < 0.2:
        for found in re.finditer(b"PK\x01\x02", bytes(data)):
            data[found.start() + 8] |= 1
    return bytes(data)


def _name(rng: random.Random, files: dict[str, bytes]) -> str:
    return rng.choice(
        (rng.choice(NAMES), f"{rng.choice(('train', 'test'))}/a/{rng.randrange(99)}.png", rng.choice(list(files)))
    )
