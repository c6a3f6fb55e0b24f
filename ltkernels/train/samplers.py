"""Which samples a batch holds: class frequencies by record, so that a new sampler is one function in `SAMPLERS`.

`instance` takes every sample once an epoch. The others draw a class by the probabilities q that their function gives,
then a sample of it, with replacement; an epoch has as many draws as there are samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Effective number of samples (Cui et al. 2019); the value of the deferred re-sampling in Cao et al. 2019.
_BETA = 0.9999

ClassShares = Callable[[Tensor, float], Tensor]
"""(counts (C,) float64, progress in [0, 1]) -> unnormalised shares (C,)."""


def _instance(counts: Tensor, progress: float) -> Tensor:
    return counts


def _balanced(counts: Tensor, progress: float) -> Tensor:
    """Kang et al. 2020: every class that has samples equally often."""
    return (counts > 0).to(counts.dtype)


def _sqrt(counts: Tensor, progress: float) -> Tensor:
    """Mahajan et al. 2018: q_j proportional to n_j^(1/2)."""
    return counts.sqrt()


def _effective(counts: Tensor, progress: float) -> Tensor:
    """Samples weighted by the inverse effective number of their class, as Cao et al. 2019 re-sample: n_j / E(n_j)."""
    effective = -torch.expm1(counts * torch.log(torch.tensor(_BETA, dtype=counts.dtype))) / (1 - _BETA)
    return torch.where(counts > 0, counts / effective, 0.0)


def _progressive(counts: Tensor, progress: float) -> Tensor:
    """Kang et al. 2020: from instance to balanced sampling, linearly in the epoch."""
    instance, balanced = counts / counts.sum(), _balanced(counts, progress)
    return (1 - progress) * instance + progress * balanced / balanced.sum()


SAMPLERS: dict[str, ClassShares] = {
    "instance": _instance,
    "balanced": _balanced,
    "sqrt": _sqrt,
    "effective": _effective,
    "progressive": _progressive,
}


def class_probabilities(name: str, class_counts: list[int], progress: float = 0.0) -> Tensor:
    """(C,) float64: the share of class j among the samples that the sampler emits. ValueError for an unknown name.

    `progress` is the epoch over the last epoch, in [0, 1]; `progressive` alone depends on it.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    shares = SAMPLERS[name](torch.tensor(class_counts, dtype=torch.float64), progress)
    return shares / shares.sum()


class Sampler:
    """Draws the batches of epochs; all labels are looked at once, here.

    `labels` (n,) int64 of the training set, on any device; indices come back on it.
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self._device, self._size = labels.device, len(labels)
        self._counts = torch.bincount(labels, minlength=num_classes).cpu()
        self._starts = self._counts.cumsum(0) - self._counts
        # Samples grouped by class: a draw is a class, then a place in its group.
        self._by_class = labels.cpu().argsort(stable=True)

    def epoch(self, name: str, generator: torch.Generator, progress: float = 0.0) -> Tensor:
        """(n,) int64 indices in the order in which an epoch visits them; `generator` is a CPU generator."""
        if name == "instance":
            order = torch.randperm(self._size, generator=generator)
        else:
            order = self.draw(class_probabilities(name, self._counts.tolist(), progress), self._size, generator)
        return order.to(self._device)

    def draw(self, probabilities: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """(size,) int64 indices: a class by `probabilities` (C,), then one of its samples, with replacement."""
        classes = torch.multinomial(probabilities, size, replacement=True, generator=generator)
        within = torch.rand(size, dtype=torch.float64, generator=generator) * self._counts[classes]
        # u < 1, but u * n may round up to n.
        place = torch.minimum(within.long(), self._counts[classes] - 1)
        return self._by_class[self._starts[classes] + place]


def batches(order: Tensor, batch_size: int, least: int = 2) -> list[Tensor]:
    """The batches of an epoch's `order`; a last one of fewer than `least` joins the one before it.

    Batch normalisation cannot take one value per channel, and every process and part of a step needs two samples.
    """
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and len(chunks[-1]) < least:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks
