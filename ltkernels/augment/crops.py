"""Random crop after padding, and horizontal flip, of a whole batch as tensor operations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ltkernels.augment import _draws
from ltkernels.augment._draws import Generator


def crop_flip(
    images: Tensor,
    *,
    padding: int = 4,
    flip: bool = True,
    fill: Tensor | None = None,
    generator: Generator = None,
) -> Tensor:
    """Each image shifted by up to `padding` pixels on both axes, and mirrored left to right with probability 1/2.

    The CIFAR recipe (He et al. 2016): pad by 4, crop back to the size, flip. No call waits for the device.

    Args:
        images: (n, channels, height, width) of any dtype.
        padding: 0 leaves the place as it is.
        flip: False leaves the sides as they are.
        fill: (channels,), what comes in; None is 0. Of standardised images, black is -mean / std.
        generator: of any device; None is the global CPU generator.

    Returns:
        (n, channels, height, width) in channels_last memory. Raises TypeError or ValueError naming the argument.
    """
    _draws.check_images(images)
    if images.dim() != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be (n, channels, height, width)")
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding is {padding!r}; it must be an integer of at least 0")
    n, channels, height, width = images.shape
    device = images.device
    last = images.permute(0, 2, 3, 1)
    if padding:
        if fill is not None and fill.shape != (channels,):
            raise ValueError(f"fill has shape {tuple(fill.shape)}; it must be ({channels},)")
        shape = (n, height + 2 * padding, width + 2 * padding, channels)
        padded = last.new_zeros(shape) if fill is None else fill.to(device, images.dtype).expand(shape).contiguous()
        padded[:, padding : padding + height, padding : padding + width] = last
        last = padded
    down, right = (_draws.integers(2 * padding + 1, n, generator).to(device) for _ in range(2))
    rows = down[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    if flip:
        mirrored = _draws.integers(2, n, generator).to(device).bool()
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = columns + right[:, None]
    each = torch.arange(n, device=device)
    # One gather for both, of whole pixels.
    return last[each[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(
    images: Tensor, *, smallest: float = 0.08, stretch: float = 4 / 3, generator: Generator = None
) -> Tensor:
    """Of each image a random box of `smallest` to all of its area, brought back to the image's size (Szegedy et al. 2015).

    A box is up to `stretch` times as wide, or as high, as the image's own shape would have it; its logarithm is uniform. Boxes
    are never larger than what they become, so bilinear interpolation needs no filter. No call waits for the device.

    Args:
        images: (n, channels, height, width), of a floating dtype.
        smallest: in (0, 1]. generator: of any device; None is the global CPU generator.

    Returns:
        (n, channels, height, width). Raises TypeError or ValueError naming the argument.
    """
    _check_pictures(images)
    if not 0 < smallest <= 1 or not stretch >= 1:
        raise ValueError(f"smallest must be in (0, 1] and stretch at least 1, got {smallest} and {stretch}")
    area, shape, across, down = (_draws.uniform(len(images), generator) for _ in range(4))
    area = smallest + (1 - smallest) * area
    ratio = torch.exp((2 * shape - 1) * math.log(stretch)).sqrt()
    wide, high = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = (part.to(theta) for part in (wide, high))
    # Centres between -1 and 1: as far from the middle as the box leaves room.
    theta[:, 0, 2], theta[:, 1, 2] = (
        ((2 * at - 1) * (1 - size)).to(theta) for at, size in ((across, wide), (down, high))
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _check_pictures(images: Tensor) -> None:
    _draws.check_images(images)
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating (n, channels, height, width), got {images.dtype} {tuple(images.shape)}"
        )


def five_crops(images: Tensor, *, enlarge: float = 248 / 224) -> list[Tensor]:
    """The four corners and the middle of (n, channels, height, width) `images` that were enlarged, each of the old size.

    The test-time ensemble of LIFT (Shi et al. 2024): pictures of 248 pixels, crops of 224. Raises TypeError or ValueError naming the
    argument.
    """
    _check_pictures(images)
    height, width = images.shape[2:]
    size = (max(height + 1, round(height * enlarge)), max(width + 1, round(width * enlarge)))
    larger = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    down, right = size[0] - height, size[1] - width
    corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    return [larger[:, :, top : top + height, left : left + width] for top, left in corners]
