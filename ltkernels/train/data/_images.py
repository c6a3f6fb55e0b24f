"""Decoding image files that nobody vouches for: formats, sizes and totals are checked before pixels are decoded."""

import functools
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ltkernels._files import replacing
from ltkernels._npz import map_npy
from ltkernels.train.data import _lazy
from ltkernels.train.data._archive import clipped

# Of Pillow's forty decoders those of pictures as people keep them, and none that starts a program (PostScript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
MAX_PIXELS = 1 << 26  # of one image: 67 million, more than today's cameras give
MAX_FILE_BYTES = 1 << 27
MAX_SIZE = 4096  # of the side that images are brought to

_CHUNK = 256  # files read ahead of the decoders
_CHUNK_BYTES = 1 << 28  # of them; one file more than fits is read
_WORTH_A_THREAD = 1 << 13  # bytes of a file
_THREADS = 4  # each may hold an image of MAX_PIXELS

_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_PLAIN = ("RGB", "L", "1", "P", "CMYK", "YCbCr")


Decoded = Callable[[str, int, int, dict[str, Any]], None]
"""`progress(phase, done, total, {})` while pictures are decoded."""


@dataclass(frozen=True)
class Source:
    """One image file: the name that messages use, a function that opens it, and its place among files that are best read
    in order (a compressed archive starts anew to go back; `in_order`: it can be read no other way). `path` is the file on disk that
    it is or lies in, `stamp` says which content it has where there is none; `file` is its name in tables."""

    name: str
    open: Callable[[], Any]
    place: int = 0
    in_order: bool = False
    path: str | None = None
    stamp: str = ""
    file: str = ""

    @property
    def label(self) -> str:
        """The name for a message: in an archive it can have 64 KiB."""
        return clipped(self.name, 500)


def of_file(path: str | Path, file: str = "") -> Source:
    """A file on disk."""
    return Source(str(path), functools.partial(open, path, "rb"), path=str(path), file=file)


def pillow() -> Any:
    """The module PIL.Image. Raises ImportError naming the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading image files needs Pillow: pip install "ltkernels[images]"') from error
    return Image


def _stat(source: Source) -> tuple[int, int]:
    """Bytes and time of change. ValueError for a file that is empty or too large."""
    if source.path is None:
        return 0, 0
    status = os.stat(source.path)
    if not source.in_order and not 0 < status.st_size <= MAX_FILE_BYTES:
        what = f"larger than {MAX_FILE_BYTES} bytes" if status.st_size else "not a usable image: the file is empty"
        raise ValueError(f"{source.label}: {what}")
    return status.st_size, status.st_mtime_ns


def _digest(parts: Any) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return found.digest()


def pictures(
    sources: Sequence[Source],
    size: int | None,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Decoded | None = None,
) -> np.ndarray | _lazy.LazySamples:
    """(n, 3, height, width) uint8 as `decode` makes them: in memory where they fit, else decoded when they are asked for.

    In the folder `cache` they are kept decoded, in a file that is mapped into memory, for this run and others. Raises as
    `decode`, and ValueError for archives that do not fit into memory without a cache.
    """
    pillow()
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise ValueError(f"image_size must be between 1 and {MAX_SIZE}, got {size}")
    first = min(sources, key=lambda source: source.place)
    like = _decoded([first], size, None, 0)
    shape = (len(sources), *like.shape)
    if cache is not None:
        order = sorted(range(len(sources)), key=lambda i: sources[i].name)
        array = _cached([sources[i] for i in order], size, shape, cache, progress)
        # Equal names may be many rows of one file.
        mapped = _lazy.Mapped(array, hashlib.sha256(str(shape).encode()).digest())
        place = np.argsort(order)
        return _lazy.LazySamples(mapped).rows(place) if prod(shape) > _lazy.MAX_IN_MEMORY else mapped.read(place)
    if prod(shape) <= _lazy.MAX_IN_MEMORY:
        return decode(sources, size, np.empty(shape, np.uint8), progress)
    if any(source.in_order for source in sources):
        raise ValueError(
            f"{len(sources)} images of {shape[3]} x {shape[2]} take {prod(shape) / 2**30:.1f} GiB decoded, more than "
            f"{_lazy.MAX_IN_MEMORY / 2**30:g}, and an archive is read in its order alone: unpack it, name a folder for the decoded "
            "images with --cache, or choose a smaller image_size"
        )
    # Not where they lie: a run goes on where its data were moved.
    digest = _digest(f"{PurePath(source.name).name}\0{_stat(source)[0]}{source.stamp}" for source in sources)
    get = functools.partial(_decoded, sources, size, like.shape)
    return _lazy.LazySamples(_lazy.Items(get, len(sources), like, digest), workers)


def _decoded(sources: Sequence[Source], size: int | None, shape: tuple[int, ...] | None, row: int) -> np.ndarray:
    return _pixels(sources[row], _read(sources[row]), size, shape)


def _cached(
    sources: Sequence[Source], size: int | None, shape: tuple[int, ...], folder: Path, progress: Decoded | None
) -> np.ndarray:
    """The decoded images of a file in `folder`, which is made where there is none for these files as they are now."""
    key = _digest([f"{size}", *(f"{source.name}\0{_stat(source)}{source.stamp}" for source in sources)]).hex()[:32]
    path = folder / f"pictures-{key}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if prod(shape) > free:
            raise ValueError(f"cache {folder}: {prod(shape) / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")
        with replacing(path) as file:
            out = np.lib.format.open_memmap(file.name, "w+", np.uint8, shape)
            decode(sources, size, out, progress)
            out.flush()
    array = map_npy(path)
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"{path}: not what was decoded into it; remove it")
    return array


def decode(sources: Sequence[Source], size: int | None, out: np.ndarray, progress: Decoded | None = None) -> np.ndarray:
    """`out` (n, 3, height, width) uint8, filled: the images as RGB, transparent parts on white; of several frames the first.

    With `size`, each is scaled so that its shorter side has `size` pixels and cut to the central square; without, all
    must have one size. Images are turned as their EXIF orientation says. Raises
    ImportError without Pillow, and ValueError naming the file that is no image, damaged, too large or of another size.
    """

    def put(item: tuple[int, bytes]) -> None:
        # Into its place at once: decoded images that wait for a slower one before them would add up.
        i, content = item
        out[i] = _pixels(sources[i], content, size, out.shape[1:])

    done = 0
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for chunk in _chunks(sources):
            # Pillow decodes outside Python's lock, but a small image is all Python, where threads only get in the way.
            each = pool.map if sum(len(content) for _, content in chunk) > _WORTH_A_THREAD * len(chunk) else map
            for _ in each(put, chunk):
                pass
            done += len(chunk)
            if progress:
                progress("decoding", done, len(sources), {})
    return out


def _chunks(sources: Sequence[Source]) -> Iterator[list[tuple[int, bytes]]]:
    """Files to decode together, by index and content, in the order of their places: few and small enough for the memory."""
    chunk: list[tuple[int, bytes]] = []
    held = 0
    for i in sorted(range(len(sources)), key=lambda i: sources[i].place):
        chunk.append((i, _read(sources[i])))
        held += len(chunk[-1][1])
        if len(chunk) == _CHUNK or held >= _CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _read(source: Source) -> bytes:
    try:
        with source.open() as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # a damaged archive: zlib.error, BadZipFile, RuntimeError for an encrypted member, ...
        raise ValueError(f"{source.label}: cannot be read: {clipped(error)}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{source.label}: larger than {MAX_FILE_BYTES} bytes")
    return content


def _pixels(source: Source, content: bytes, size: int | None, shape: tuple[int, ...] | None) -> np.ndarray:
    """(3, height, width) uint8; with `shape`, of that shape."""
    image_module = pillow()
    from PIL import UnidentifiedImageError

    formats = _formats(image_module)
    pixels = None
    try:
        if not content:
            raise ValueError("the file is empty")
        # Opening reads the header alone.
        with image_module.open(io.BytesIO(content), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            # An image of another size is not decoded; one on its side may be turned by its EXIF orientation.
            if size is not None or shape is None or sorted(image.size) == sorted(shape[1:]):
                pixels = _prepared(image, size)
                height, width = pixels.shape[1:]
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, struct.error, ...
        reason = clipped(error).partition("\n")[0]
        if isinstance(error, UnidentifiedImageError):
            reason = f"by its content it is none of {', '.join(formats)}"
        raise ValueError(f"{source.label}: not a usable image: {reason}") from error
    if shape is not None and (pixels is None or pixels.shape != shape):
        raise ValueError(
            f"{source.label}: {width} x {height} pixels, another image has {shape[2]} x {shape[1]}; set image_size to bring all "
            f"to one size"
        )
    assert pixels is not None
    return pixels


@functools.cache
def _formats(image_module: Any) -> tuple[str, ...]:
    """Those of `_FORMATS` that this build of Pillow has."""
    image_module.init()
    return tuple(name for name in _FORMATS if name in image_module.OPEN)


def _prepared(image: Any, size: int | None) -> np.ndarray:
    """(3, height, width) uint8 of a Pillow image, prepared as `decode` says."""
    from PIL import Image, ImageOps

    if size is not None:
        # A JPEG decodes straight to 1/2, 1/4 or 1/8, if that is large enough.
        image.draft("RGB", (size, size))
    image = _as_rgb(ImageOps.exif_transpose(image))
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _as_rgb(image: Any) -> Any:
    if image.mode in _WITH_ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, "white")
        return pillow().alpha_composite(white, image).convert("RGB")
    if image.mode not in _PLAIN:
        raise ValueError(f"pixels of mode {image.mode}; 8 bits a channel are read")
    return image.convert("RGB")
