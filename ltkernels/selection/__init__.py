"""Subsets of an augmented pool: cut by k-means, picked greedily by Feature Diversity Gain."""

from .arms import ClassSets
from .greedy import Selection, select_subsets, select_subsets_batched
from .kmeans import Subsets, kmeans_subsets, kmeans_subsets_batched
from .match import match_pool
from .recipe import Recipe, fdg_recipe, head_tail_split
from .sets import UniformSets, uniform_fdg_sets

__all__ = [
    "ClassSets",
    "Recipe",
    "Selection",
    "Subsets",
    "UniformSets",
    "fdg_recipe",
    "head_tail_split",
    "kmeans_subsets",
    "kmeans_subsets_batched",
    "match_pool",
    "select_subsets",
    "select_subsets_batched",
    "uniform_fdg_sets",
]
