"""Which classes a rank computes when negatives are sampled: those of the batch, and others drawn by counter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..losses import _terms


class NegativeSampling(NamedTuple):
    """Negative classes by chance (Partial FC: An et al. 2021, arXiv:2010.05222; 2022, arXiv:2203.15565).

    A rank with L classes computes those that are a label in the batch, all of them, and others that it draws uniformly without
    replacement, up to ceil(rate * L) in all. The gradient of a class that is not computed is 0 (an optimizer with momentum or weight
    decay moves it nevertheless). With P label classes and k drawn of the other L - P, a drawn class had the probability p = k / (L - P).

    correct: the loss estimates the exact one. Every sum over the classes (the softmax's sum of exp, and with label smoothing the sum of
        weighted logits) counts a drawn class 1 / p times, which adds -log p to its adjusted logit: the expectation of each sum is then
        the sum over all classes. The loss itself has its logarithm, so the expected loss is below the exact one, by about half the
        variance of the sum over its squared mean (Jensen); it and its gradient tend to the exact ones as the rate tends to 1. At least
        half of the ceil(rate * L) are drawn, however many labels there are, for p must not be 0.
        Without: the paper's loss, the exact loss of the classifier that has the computed classes only. Its sum of exp lacks the others,
        about 1 - rate of the negatives, at every step: it is a different loss, lower, with weaker negative gradients. No label
        smoothing. Where the labels alone are more than ceil(rate * L), nothing is drawn.
        Why corrected is the default: with 20 000 classes, cosine head, s = 16, rate 0.1, ten draws, the loss was 1.078 on average and
        the feature gradient of one draw 15 % off, for an exact loss of 1.079; without, 0.211 and 67 %. With s = 64, where a few hard
        negatives are the whole sum, both miss them when they are not drawn (6.8 and 4.9 for 8.7).
    rate: in (0, 1]. 1 is the exact loss, bit for bit as without sampling.
    seed, step: the draw is a function of these two and the class' number: the same after a resume, different at every step. Give the
        trainer's step counter.
    """

    rate: float
    step: int
    seed: int = 0
    correct: bool = True


class Kept(NamedTuple):
    """The classes of a shard that are computed: `classes` (K,) int64 within the shard, the first `labels` of them labels of the batch;
    `factor`: how many classes a drawn one stands for; `place` (L,): where a label class is in `classes`, -1 for all others."""

    classes: Tensor
    labels: int
    factor: float
    place: Tensor


def checked(sampling: NegativeSampling | None, label_smoothing: float | Tensor) -> NegativeSampling | None:
    """None where all classes are computed."""
    if sampling is None:
        return None
    if not isinstance(sampling, NegativeSampling):
        raise TypeError(f"sampling is {sampling!r}; it must be a NegativeSampling or None")
    rate = _checks.number("sampling.rate", sampling.rate, above=0.0, high=1.0)
    for name, bits in (("step", 63), ("seed", 64)):
        value = getattr(sampling, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"sampling.{name} is {value!r}; it must be an integer in [0, 2^{bits})")
    if not sampling.correct and _checks.smooths(label_smoothing):
        said = "a table" if isinstance(label_smoothing, Tensor) else label_smoothing
        raise ValueError(
            f"label_smoothing is {said}; sampling with correct=False leaves classes out, and smoothing is over all of them"
        )
    return None if rate == 1.0 else sampling._replace(rate=rate)


def draw(sampling: NegativeSampling, labels: Sequence[Tensor], start: int, part: int) -> Kept | None:
    """Of the classes [start, start + part); None where all are kept. `labels`: class ids of the batch; others are passed over."""
    device = labels[0].device
    is_label = torch.zeros(part, dtype=torch.bool, device=device)
    for y in labels:
        is_label[y[(y >= start) & (y < start + part)] - start] = True
    own = is_label.nonzero()[:, 0]
    others = part - len(own)
    budget = math.ceil(sampling.rate * part)
    drawn = min(others, max(budget - len(own), math.ceil(budget / 2) if sampling.correct else 0))
    if drawn == others:
        return None
    keys = _keys(sampling, start, part, device).masked_fill_(is_label, torch.iinfo(torch.int64).max)
    if drawn:
        chosen = (keys <= keys.kthvalue(drawn).values).nonzero()[:, 0]
    else:
        chosen = own[:0]
    place = torch.full((part,), -1, device=device)
    place[own] = torch.arange(len(own), device=device)
    factor = others / drawn if sampling.correct else 1.0
    return Kept(torch.cat([own, chosen]), len(own), factor, place)


def _keys(sampling: NegativeSampling, start: int, part: int, device: torch.device) -> Tensor:
    """(part,) random numbers, different for all classes: 32 random bits, then the class' place."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    for word in (sampling.seed, sampling.seed >> 32, sampling.step, sampling.step >> 32):
        key = _terms.mix32(key ^ (word & 0xFFFFFFFF))
    place = torch.arange(part, device=device)
    random = _terms.mix32(_terms.mix32((place + (start + 0x9E3779B9)) & 0xFFFFFFFF) ^ key)
    return (random << 31) | place
