"""What a greedy step takes: the rule, ties, and the range of values that a bound must rule out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

MODES = ("max", "min", "quantile", "target")
# Two log-determinants closer than this (relative to 1 + that of the original set) are a tie, which the lowest index
# wins. Rounding differs between engines, devices and thread counts by about 1e-13; distinct subsets of real features
# differ by 1e-6 and more.
TIE = 1e-11


class Rule(NamedTuple):
    """A picking rule: mode, its q or its target (as a log-determinant in nats), and the width of a tie in nats."""

    mode: str
    q: float
    target: float
    tie: float


def quantile_rank(q: float, count: int) -> int:
    """Rank of the q-quantile among `count` sorted values, the smallest being 0."""
    return math.floor(q * (count - 1) + 0.5)


def choose(values: Tensor, free: Tensor, rule: Rule) -> int:
    """The subset that `rule` takes among those `free` (K,) bool, by their log-determinants `values` (K,); ties by
    lowest index."""
    ids = free.nonzero().squeeze(1)
    v = values[ids]
    if rule.mode == "max":
        tied = v >= v.max() - rule.tie
    elif rule.mode == "min":
        tied = v <= v.min() + rule.tie
    elif rule.mode == "target":
        distance = (v - rule.target).abs()
        tied = distance <= distance.min() + rule.tie
    else:
        tied = (v - v.sort().values[quantile_rank(rule.q, v.shape[0])]).abs() <= rule.tie
    return int(ids[tied.nonzero()[0, 0]])


def least_loss(low: np.ndarray, high: np.ndarray, rule: Rule) -> np.ndarray:
    """What `rule` minimises, at its smallest over the intervals [low, high]; the quantile has no such form."""
    if rule.mode == "max":
        return -high
    if rule.mode == "min":
        return low
    return np.maximum(0.0, np.maximum(low - rule.target, rule.target - high))
