"""Augmentation for tail classes; so far in feature space."""

from ltkernels.augment.synthesis import fdc, most_similar_class

__all__ = ["fdc", "most_similar_class"]
