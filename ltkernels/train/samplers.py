"""Which samples a batch holds: class frequencies by record, so that a new sampler is one line in `SAMPLERS`.

With q_j proportional to n_j^power: `instance` (power 1) is every sample once an epoch; `sqrt` (1/2, Mahajan et al.
2018) and `balanced` (0, Kang et al. 2020) draw a class by q, then a sample of it, with replacement.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SAMPLERS: dict[str, float] = {"instance": 1.0, "sqrt": 0.5, "balanced": 0.0}


def class_probabilities(name: str, class_counts: list[int]) -> Tensor:
    """(C,) float64: the share of class j among the samples that the sampler emits. ValueError for an unknown name."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    weights = torch.tensor(class_counts, dtype=torch.float64) ** SAMPLERS[name]
    return weights / weights.sum()


def batches(
    labels: Tensor, name: str, num_classes: int, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """The batches of one epoch: int64 indices into `labels` (n,), n of them in all, on the labels' device.

    A last batch of a single sample joins the one before it: batch normalisation cannot take one value per channel.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if SAMPLERS.get(name) == 1.0:
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
    else:
        per_class = class_probabilities(name, counts.tolist()).to(labels.device) / counts.clamp_min(1)
        order = torch.multinomial(per_class[labels].cpu(), len(labels), replacement=True, generator=generator).to(
            labels.device
        )
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    yield from chunks
