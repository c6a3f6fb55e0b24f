"""Classifiers and data values of frozen features that need no training: k nearest neighbours, nearest class mean, KNN-Shapley.

All distances are computed chunk by chunk, exactly; no matrix of all queries by all references is held.
"""

from ._classifiers import KNeighborsClassifier, NearestClassMean
from ._search import METRICS, Neighbors, nearest_neighbors
from ._shapley import knn_shapley

__all__ = [
    "METRICS",
    "KNeighborsClassifier",
    "NearestClassMean",
    "Neighbors",
    "knn_shapley",
    "nearest_neighbors",
]
