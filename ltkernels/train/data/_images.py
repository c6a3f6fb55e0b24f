"""Decoding image files that nobody vouches for: formats, sizes and totals are checked before pixels are decoded."""

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ltkernels.train.data._archive import clipped

# Of Pillow's forty decoders those of pictures as people keep them, and none that starts a program (PostScript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
MAX_PIXELS = 1 << 26  # of one image: 67 million, more than today's cameras give
MAX_FILE_BYTES = 1 << 27
MAX_TOTAL_BYTES = 1 << 33  # of the decoded set: float32 copies of it take four times as much
MAX_SIZE = 4096  # of the side that images are brought to

_CHUNK = 256  # files read ahead of the decoders
_CHUNK_BYTES = 1 << 28  # of them; one file more than fits is read
_WORTH_A_THREAD = 1 << 13  # bytes of a file
_THREADS = 4  # each may hold an image of MAX_PIXELS

_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_PLAIN = ("RGB", "L", "1", "P", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Source:
    """One image file: the name that messages use, a function that opens it, and its place among files that are best read
    in order (a compressed archive starts anew to go back)."""

    name: str
    open: Callable[[], BinaryIO]
    place: int = 0

    @property
    def label(self) -> str:
        """The name for a message: in an archive it can have 64 KiB."""
        return clipped(self.name, 500)


def pillow() -> Any:
    """The module PIL.Image. Raises ImportError naming the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading image files needs Pillow: pip install "ltkernels[images]"') from error
    return Image


def decode(sources: Sequence[Source], size: int | None, shape: tuple[int, int] | None = None) -> np.ndarray:
    """(n, 3, height, width) uint8: the images as RGB, transparent parts on white; of several frames the first.

    With `size`, each is scaled so that its shorter side has `size` pixels and cut to the central square; without, all
    must have one size, (height, width) `shape` where it is given. Images are turned as their EXIF orientation says. Raises
    ImportError without Pillow, and ValueError naming the file that is no image, damaged, too large or of another size.
    """
    image_module = pillow()
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise ValueError(f"image_size must be between 1 and {MAX_SIZE}, got {size}")
    if not sources:
        raise ValueError("there are no images to decode")
    out: np.ndarray | None = None

    def put(i: int, content: bytes) -> None:
        # Into its place at once: decoded images that wait for a slower one before them would add up.
        assert out is not None
        out[i] = _pixels(image_module, sources[i], content, size, out.shape[1:])

    order = sorted(range(len(sources)), key=lambda i: sources[i].place)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for chunk, contents in _chunks(sources, order):
            if out is None:
                wanted = None if shape is None or size is not None else (*shape, 3)
                out = _room(len(sources), _pixels(image_module, sources[chunk[0]], contents[0], size, wanted))
            # Pillow decodes outside Python's lock, but a small image is all Python, where threads only get in the way.
            each = pool.map if sum(map(len, contents)) > _WORTH_A_THREAD * len(contents) else map
            for _ in each(put, chunk, contents):
                pass
    assert out is not None
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _chunks(sources: Sequence[Source], order: Sequence[int]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Indices of files to decode together, and the files' content: few and small enough for the memory."""
    chunk: list[int] = []
    contents: list[bytes] = []
    held = 0
    for i in order:
        chunk.append(i)
        contents.append(_read(sources[i]))
        held += len(contents[-1])
        if len(chunk) == _CHUNK or held >= _CHUNK_BYTES:
            yield chunk, contents
            chunk, contents, held = [], [], 0
    if chunk:
        yield chunk, contents


def _room(count: int, first: np.ndarray) -> np.ndarray:
    total = count * first.size
    if total > MAX_TOTAL_BYTES:
        raise ValueError(
            f"{count} images of {first.shape[1]} x {first.shape[0]} take {total / 2**30:.1f} GiB decoded, more than "
            f"{MAX_TOTAL_BYTES / 2**30:.0f}; choose a smaller image_size"
        )
    return np.empty((count, *first.shape), np.uint8)


def _read(source: Source) -> bytes:
    try:
        with source.open() as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # a damaged archive: zlib.error, BadZipFile, RuntimeError for an encrypted member, ...
        raise ValueError(f"{source.label}: cannot be read: {clipped(error)}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{source.label}: larger than {MAX_FILE_BYTES} bytes")
    return content


def _pixels(
    image_module: Any, source: Source, content: bytes, size: int | None, shape: tuple[int, ...] | None
) -> np.ndarray:
    """(height, width, 3) uint8; with `shape`, of that shape."""
    from PIL import UnidentifiedImageError

    pixels = None
    try:
        if not content:
            raise ValueError("the file is empty")
        # Opening reads the header alone.
        with image_module.open(io.BytesIO(content), formats=_formats(image_module)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            # An image of another size is not decoded; one on its side may be turned by its EXIF orientation.
            if size is not None or shape is None or sorted(image.size) == sorted(shape[:2]):
                if size is not None:
                    # A JPEG decodes straight to 1/2, 1/4 or 1/8, if that is large enough.
                    image.draft("RGB", (size, size))
                pixels = from_pillow(image, size)
                height, width = pixels.shape[:2]
    except UnidentifiedImageError as error:
        kinds = ", ".join(_formats(image_module))
        raise ValueError(f"{source.label}: not a usable image: by its content it is none of {kinds}") from error
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, struct.error, ...
        reason = clipped(error).partition("\n")[0]
        raise ValueError(f"{source.label}: not a usable image: {reason}") from error
    if pixels is None or (shape is not None and pixels.shape != shape):
        assert shape is not None
        raise ValueError(
            f"{source.label}: {width} x {height} pixels, another image has {shape[1]} x {shape[0]}; set image_size to bring all "
            f"to one size"
        )
    return pixels


@functools.cache
def _formats(image_module: Any) -> tuple[str, ...]:
    """Those of `_FORMATS` that this build of Pillow has."""
    image_module.init()
    return tuple(name for name in _FORMATS if name in image_module.OPEN)


def from_pillow(image: Any, size: int | None) -> np.ndarray:
    """(height, width, 3) uint8 of a Pillow image, prepared as `decode` says."""
    from PIL import Image, ImageOps

    image = _as_rgb(Image, ImageOps.exif_transpose(image))
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _as_rgb(image_module: Any, image: Any) -> Any:
    if image.mode in _WITH_ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        return image_module.alpha_composite(white, image).convert("RGB")
    if image.mode not in _PLAIN:
        raise ValueError(f"pixels of mode {image.mode}; 8 bits a channel are read")
    return image.convert("RGB")
