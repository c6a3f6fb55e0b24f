"""The charts of a report page as PNG files, for papers and slides: drawn by Pillow from the page's own SVG.

Only what `svg.Svg` writes is understood: lines, rectangles, circles, polylines, texts, and the paths of its markers.
"""

import functools
import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_SCALE = 2  # pixels per unit of the drawing
_SMOOTH = 2  # drawn that much larger and scaled down: Pillow's own lines have steps


def save_pngs(page: str, folder: Path) -> list[Path]:
    """Write every chart of a page to `folder` (made where missing) as NN-title.png, legends too; returns the paths.

    Files of the same names are replaced. Raises ImportError without Pillow, OSError where the folder cannot be written.
    """
    page = re.sub(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", "\ufffd", page)  # names may hold what XML does not admit
    drawings = [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]
    images = [(drawing.get("aria-label") or "chart", draw(drawing)) for drawing in drawings]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (title, image) in enumerate(images, start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
        path = folder / f"{number:02d}-{slug or 'chart'}.png"
        image.save(path)
        paths.append(path)
    return paths


def draw(drawing: ElementTree.Element) -> Any:
    """One <svg> element as a PIL image."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError('PNG files need Pillow: pip install "ltkernels[images]"') from error
    unit = _SCALE * _SMOOTH
    size = [round(float(drawing.get(side, "0")) * unit) for side in ("width", "height")]
    canvas = Image.new("RGB", (max(1, size[0]), max(1, size[1])), "white")
    pen = ImageDraw.Draw(canvas, "RGBA")
    for element in drawing:
        value = _numbers(element, unit)
        fill = _colour(element)
        if element.tag == "line":
            ends = [value["x1"], value["y1"], value["x2"], value["y2"]]
            pen.line(ends, element.get("stroke"), max(1, round(value["stroke-width"])))
        elif element.tag == "rect":
            x, y = value["x"], value["y"]
            # Pillow's rectangles hold their last pixel.
            pen.rectangle([x, y, max(x, x + value["width"] - 1), max(y, y + value["height"] - 1)], fill)
        elif element.tag == "circle":
            x, y, r = value["cx"], value["cy"], value["r"]
            pen.ellipse([x - r, y - r, x + r, y + r], fill, "white", unit // 2)
        elif element.tag == "path":
            pen.polygon([(x * unit, y * unit) for x, y in _corners(element.get("d", ""))], fill, "white", unit // 2)
        elif element.tag == "polyline":
            pairs = [tuple(float(v) * unit for v in pair.split(",")) for pair in element.get("points", "").split()]
            _polyline(
                pen,
                pairs,
                element.get("stroke"),
                round(value["stroke-width"]),
                "stroke-dasharray" in element.attrib,
                unit,
            )
        elif element.tag == "text":
            font = _font(value["font-size"])
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[element.get("text-anchor", "start")]
            bold = unit // 4 if element.get("font-weight") else 0
            place, text = (value["x"], value["y"]), element.text or ""
            pen.text(place, text, fill, font, anchor, stroke_width=bold, stroke_fill=fill)
    return canvas.resize((canvas.width // _SMOOTH, canvas.height // _SMOOTH), Image.Resampling.LANCZOS)


@functools.cache
def _font(size: float) -> Any:
    """DejaVu Sans, which matplotlib brings, has the letters of most alphabets; Pillow's own has those of English."""
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    path = Path(str(found.origin)).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if found else None
    return ImageFont.truetype(str(path), size) if path and path.is_file() else ImageFont.load_default(size)


def _numbers(element: ElementTree.Element, unit: int) -> dict[str, float]:
    """The numeric attributes, in pixels of the canvas."""
    found = {}
    for key, text in element.attrib.items():
        try:
            found[key] = float(text) * unit
        except ValueError:
            continue
    return found


def _colour(element: ElementTree.Element) -> tuple[int, ...]:
    text = element.get("fill", "#000000").lstrip("#")
    if len(text) != 6:
        return (255, 255, 255, 255) if text == "white" else (0, 0, 0, 0)
    opacity = round(255 * float(element.get("fill-opacity", "1")))
    return (*(int(text[i : i + 2], 16) for i in (0, 2, 4)), opacity)


def _corners(path: str) -> list[tuple[float, float]]:
    """The corners of a closed path of M, l and h."""
    x = y = 0.0
    corners = []
    for command, arguments in re.findall(r"([Mlh])([^Mlhz]*)", path):
        values = [float(v) for v in re.findall(r"-?[\d.]+", arguments)]
        if command == "M":
            x, y = values
        elif command == "h":
            x += values[0]
        else:
            x, y = x + values[0], y + values[1]
        corners.append((x, y))
    return corners


def _polyline(pen: Any, pairs: list[Any], colour: str | None, width: int, dashed: bool, unit: int) -> None:
    if not dashed:
        pen.line(pairs, colour, max(1, width), joint="curve")
        return
    on, off = 5 * unit, 3 * unit
    travelled = 0.0
    for (x1, y1), (x2, y2) in pairwise(pairs):
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        at = 0.0
        while at < length:
            phase = (travelled + at) % (on + off)
            step = min(length - at, (on if phase < on else on + off) - phase)
            if phase < on:
                a, b = at / length, (at + step) / length
                ends = [x1 + a * (x2 - x1), y1 + a * (y2 - y1), x1 + b * (x2 - x1), y1 + b * (y2 - y1)]
                pen.line(ends, colour, max(1, width))
            # A step that rounds to nothing would never end.
            at += max(step, 1e-3)
        travelled += length
