"""What a greedy step takes: the rule, ties, and the range of values that a bound must rule out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MODES = ("max", "min", "quantile", "target")
# Two log-determinants closer than this (relative to 1 + that of the original set) are a tie, which the lowest index
# wins. Rounding differs between engines, devices and thread counts by about 1e-13; distinct subsets of real features
# differ by 1e-6 and more.
TIE = 1e-11


class Rule(NamedTuple):
    """A picking rule, in log-determinants (nats): mode, q, the target's range [low, high], the width of a tie, and how
    near to the range a run stops (negative: never)."""

    mode: str
    q: float = 0.0
    low: float = 0.0
    high: float = 0.0
    tie: float = TIE
    stop: float = -1.0

    def stops(self, value: float) -> bool:
        return self.stop >= 0.0 and self.low - self.stop <= value <= self.high + self.stop


def choose(values: np.ndarray, free: np.ndarray, rule: Rule) -> int:
    """The subset that `rule` takes among those `free` (K,) bool, by log-determinants `values` (K,); ties by lowest
    index."""
    ids = np.flatnonzero(free)
    v = values[ids]
    if rule.mode == "quantile":
        rank = math.floor(rule.q * (len(v) - 1) + 0.5)  # 0 is the smallest
        distance = np.abs(v - np.partition(v, rank)[rank])
    else:
        distance = least_loss(v, v, rule)
        distance = distance - distance.min()
    return int(ids[np.argmax(distance <= rule.tie)])


def least_loss(low: np.ndarray, high: np.ndarray, rule: Rule) -> np.ndarray:
    """What `rule` minimises, at its smallest over the intervals [low, high]; the quantile has no such form."""
    if rule.mode == "max":
        return -high
    if rule.mode == "min":
        return low
    return np.maximum(0.0, np.maximum(low - rule.high, rule.low - high))
