"""Decoding PNG and JPEG files that nobody vouches for: formats, sizes and totals are checked before pixels are decoded."""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 1 << 26  # of one image: 67 million, more than today's cameras give
MAX_FILE_BYTES = 1 << 27
MAX_TOTAL_BYTES = 1 << 33  # of the decoded set: float32 copies of it take four times as much
MAX_SIZE = 4096  # of the side that images are brought to

_CHUNK = 256  # files read ahead of the decoders
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


def pillow() -> Any:
    """The module PIL.Image. Raises ImportError naming the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading image files needs Pillow: pip install "ltkernels[images]"') from error
    return Image


def decode(sources: Sequence[Source], size: int | None) -> np.ndarray:
    """(n, 3, height, width) uint8: the images as RGB, transparent parts on white.

    With `size`, each is scaled so that its shorter side has `size` pixels and cut to the central square; without, all
    must have one size. Images are turned as their EXIF orientation says. Raises ImportError without Pillow,
    and ValueError naming the file that is no PNG or JPEG, damaged, too large or of another size.
    """
    image_module = pillow()
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise ValueError(f"image_size must be between 1 and {MAX_SIZE}, got {size}")
    if not sources:
        raise ValueError("there are no images to decode")
    out: np.ndarray | None = None
    order = sorted(range(len(sources)), key=lambda i: sources[i].place)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(order), _CHUNK):
            chunk = order[start : start + _CHUNK]
            contents = [_read(sources[i]) for i in chunk]
            # Pillow decodes outside Python's lock, but a small image is all Python, where threads only get in the way.
            each = pool.map if sum(map(len, contents)) > _WORTH_A_THREAD * len(contents) else map
            for i, pixels in zip(
                chunk, each(lambda i, data: _pixels(image_module, sources[i], data, size), chunk, contents)
            ):
                out = _room(len(sources), pixels) if out is None else out
                if pixels.shape != out.shape[1:]:
                    raise ValueError(
                        f"{sources[i].name}: {pixels.shape[1]} x {pixels.shape[0]} pixels, another image has {out.shape[2]} x "
                        f"{out.shape[1]}; set image_size to bring all to one size"
                    )
                out[i] = pixels
    assert out is not None
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


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
        raise ValueError(f"{source.name}: cannot be read: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{source.name}: larger than {MAX_FILE_BYTES} bytes")
    return content


def _pixels(image_module: Any, source: Source, content: bytes, size: int | None) -> np.ndarray:
    """(height, width, 3) uint8."""
    from PIL import ImageOps

    try:
        # Two decoders of Pillow's forty; opening reads the header alone.
        with image_module.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            if size is not None:
                image.draft("RGB", (size, size))  # a JPEG decodes straight to 1/2, 1/4 or 1/8, if that is large enough
            image = _as_rgb(image_module, ImageOps.exif_transpose(image))
            if size is not None and image.size != (size, size):
                image = ImageOps.fit(image, (size, size), image_module.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{source.name}: not a usable PNG or JPEG image: {str(error).splitlines()[0]}") from error


def _as_rgb(image_module: Any, image: Any) -> Any:
    if image.mode in _WITH_ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        return image_module.alpha_composite(white, image).convert("RGB")
    if image.mode not in _PLAIN:
        raise ValueError(f"pixels of mode {image.mode}; 8 bits a channel are read")
    return image.convert("RGB")
