"""Subsets of an augmented pool: cut by k-means, picked greedily by Feature Diversity Gain."""

from ._arms import ClassSets
from ._greedy import Selection, select_subsets, select_subsets_batched
from ._kdpp import k_dpp_log_probability, sample_k_dpp
from ._kmeans import Subsets, kmeans_subsets
from ._match import match_pool
from ._recipe import Recipe, fdg_recipe, head_tail_split
from ._sets import UniformSets, uniform_fdg_sets
from ._subsets import subset_gains

__all__ = [
    "ClassSets",
    "Recipe",
    "Selection",
    "Subsets",
    "UniformSets",
    "fdg_recipe",
    "head_tail_split",
    "k_dpp_log_probability",
    "kmeans_subsets",
    "match_pool",
    "sample_k_dpp",
    "select_subsets",
    "select_subsets_batched",
    "subset_gains",
    "uniform_fdg_sets",
]
