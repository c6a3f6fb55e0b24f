"""Random crop after padding, and horizontal flip, of a whole batch as tensor operations."""

import torch
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
