"""What happens to a step's samples between the data set and the model: crop, flip, policy, mixing. No host sync but in policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltkernels import augment
from ltkernels.train.data._lazy import LazySamples, Samples
from ltkernels.train.recipe import Recipe
from ltkernels.train.samplers import Sampler, class_probabilities

Target = Tensor | tuple[Tensor, Tensor, Tensor]

# CMO mixes in epochs strictly between 3 and epochs - 3, counted from 0 (Park et al. 2022).
_CMO_MARGIN = 3


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Each square image (n, c, s, s) turned by 90 degrees `turns` (n,) times, counted as `torch.rot90` does."""
    rotated = images
    for quarter in (1, 2, 3):
        rotated = torch.where((turns == quarter).view(-1, 1, 1, 1), images.rot90(quarter, (2, 3)), rotated)
    return rotated


# Of every method the probability per batch where the user gives none.
MIXERS = {"mixup": 1.0, "remix": 1.0, "cutmix": 0.5, "cmo": 0.5}


@dataclass(frozen=True)
class Pixels:
    """How standardised images came from pixels: (pixel - mean) / std, both (channels,), with pixels from 0 (black) to `top`."""

    mean: Tensor
    std: Tensor
    top: float = 255.0

    @property
    def black(self) -> Tensor:
        return -self.mean / self.std

    def bytes(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) uint8."""
        raw = images * self.std.to(images).view(-1, 1, 1) + self.mean.to(images).view(-1, 1, 1)
        return (raw * (255 / self.top)).round_().clamp_(0, 255).byte()

    def standardised(self, images: Tensor, like: Tensor) -> Tensor:
        """Of uint8 images, in the dtype of `like`."""
        mean, std = self.mean.to(like).view(-1, 1, 1), self.std.to(like).view(-1, 1, 1)
        return (images.to(like) * (self.top / 255) - mean) / std


def _policy(name: str, pixels: Pixels | None) -> Callable[[Tensor], Tensor]:
    """A policy of torchvision with its defaults, on standardised images. Raises ImportError where torchvision is missing."""
    if pixels is None:
        raise ValueError(
            f"augment {name} works on pixels: it needs images, and a data set that says their mean and std"
        )
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        reason = str(error).splitlines()[0][:200]
        raise ImportError(f"augment {name} needs torchvision: pip install torchvision ({reason})") from error
    policy = {"randaugment": v2.RandAugment, "autoaugment": v2.AutoAugment, "trivialaugment": v2.TrivialAugmentWide}[
        name
    ]()

    def changed(images: Tensor) -> Tensor:
        return pixels.standardised(torch.stack([policy(image) for image in pixels.bytes(images)]), images)

    return changed


class Batches:
    """Turns a step's indices into (samples, target), with the recipe's crop, flip, policy and mixing.

    The draws are those of the whole step, whichever process keeps which rows: runs on one and on several processes see
    the same samples. `pixels` say what black is, which a crop brings in (None: 0). The generator's state is the only state.
    """

    def __init__(
        self,
        x: Samples,
        y: Tensor,
        num_classes: int,
        recipe: Recipe,
        seed: int,
        pixels: Pixels | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if (recipe.crop or recipe.flip or recipe.resized_crop) and x.dim() != 4:
            raise ValueError(f"crop and flip need images, the data has samples of shape {tuple(x.shape[1:])}")
        named = [] if recipe.augment == "none" else [_policy(recipe.augment, pixels)]
        self._transforms = [*named, *([transform] if transform else [])]
        if recipe.task == "rotation" and (x.dim() != 4 or x.shape[2] != x.shape[3]):
            raise ValueError(
                f"pretrain rotation needs square images, the data has samples of shape {tuple(x.shape[1:])}"
            )
        if recipe.mix not in ("none", *MIXERS):
            raise ValueError(f"mix must be one of none, {', '.join(MIXERS)}, got {recipe.mix!r}")
        if recipe.mix in ("cutmix", "cmo") and x.dim() != 4:
            raise ValueError(f"mix {recipe.mix} needs images, the data has samples of shape {tuple(x.shape[1:])}")
        self.sampler = Sampler(y, num_classes)
        self._x, self._y, self._recipe = x, y, recipe
        self._fill = None if pixels is None else pixels.black.to(x.device, x.dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self._counts = torch.bincount(y, minlength=num_classes)
        self._balanced = class_probabilities("balanced", self._counts.tolist())

    def state(self) -> Tensor:
        return self._generator.get_state()

    def set_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def ahead(self, steps: Sequence[Tensor]) -> None:
        """Say which indices `make` gets next: samples that lie in files are read meanwhile."""
        if isinstance(self._x, LazySamples):
            self._x.ahead(steps)

    def make(self, index: Tensor, epoch: int) -> tuple[Tensor, Target]:
        x, y = self._images(index), self._y[index]
        if self._recipe.task == "rotation":
            turns = torch.randint(4, (len(x),), generator=self._generator).to(x.device, non_blocking=True)
            return rotate(x, turns), turns
        return self._mixed(x, y) if self._mixes(epoch) else (x, y)

    def _mixed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Target]:
        drawn = {"alpha": self._recipe.mix_alpha, "generator": self._generator}
        if self._recipe.mix == "remix":
            return augment.remix(x, y, self._counts, **drawn)
        if self._recipe.mix == "cmo":
            # Its foreground are samples of every class equally often, weights 1 / n_y.
            index = self.sampler.draw(self._balanced, len(x), self._generator).to(y.device)
            return augment.cmo(x, y, self._images(index), self._y[index], **drawn)
        return {"mixup": augment.mixup, "cutmix": augment.cutmix}[self._recipe.mix](x, y, **drawn)

    def _images(self, index: Tensor) -> Tensor:
        x, recipe = self._x[index], self._recipe
        if recipe.resized_crop:
            x = augment.resized_crop(x, smallest=recipe.resized_crop, generator=self._generator)
        if recipe.crop or recipe.flip:
            x = augment.crop_flip(x, padding=recipe.crop, flip=recipe.flip, fill=self._fill, generator=self._generator)
        if self._transforms:
            # They draw from the global generator: from the same place on every process, and after a resumption.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
                for transform in self._transforms:
                    x = transform(x)
        return x

    def _mixes(self, epoch: int) -> bool:
        recipe = self._recipe
        if recipe.mix == "none":
            return False
        if recipe.mix == "cmo" and not _CMO_MARGIN < epoch < recipe.epochs - _CMO_MARGIN:
            return False
        probability = MIXERS[recipe.mix] if recipe.mix_prob is None else recipe.mix_prob
        return probability >= 1 or float(torch.rand((), generator=self._generator)) < probability


def rows_of(target: Target, rows: Tensor | slice) -> Target:
    """The rows of a target, plain or mixed."""
    if isinstance(target, tuple):
        first, second, share = target
        return first[rows], second[rows], share[rows]
    return target[rows]


def denominator(weight: Tensor | None, target: Target) -> Tensor | int:
    """What torch's weighted mean divides by: the sum of the rows' class weights, or their number without weights."""
    first = target[0] if isinstance(target, tuple) else target
    if weight is None:
        return len(first)
    weight = weight.double()
    if isinstance(target, tuple):
        first, second, share = target
        return (share * weight[first] + (1 - share) * weight[second]).sum()
    return weight[first].sum()
