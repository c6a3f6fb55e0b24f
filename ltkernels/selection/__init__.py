"""Subsets of an augmented pool: cut by k-means, picked greedily by Feature Diversity Gain."""

from .greedy import Selection, select_subsets
from .kmeans import Subsets, kmeans_subsets

__all__ = ["Selection", "Subsets", "kmeans_subsets", "select_subsets"]
