"""What a run is judged by. Everything follows from the confusion matrix of the last epoch on the balanced test set."""

import math
from typing import Any

import torch
from torch import Tensor

# Thresholds of Liu et al. 2019 (many / medium / few shot), on training samples per class.
MANY_ABOVE = 100
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")


def confusion_matrix(target: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: entry [i, j] counts the samples of class i that were predicted as j."""
    return torch.bincount(target * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def group_of(count: int) -> str:
    """`many` for more than 100 training samples, `few` for fewer than 20, `medium` between."""
    return "many" if count > MANY_ABOVE else "few" if count < FEW_BELOW else "medium"


def summarize(confusion: Tensor, class_counts: list[int]) -> dict[str, Any]:
    """Fractions from a confusion matrix with at least one test sample per class.

    Returns top1, balanced_accuracy (mean of the per-class recalls), balanced_accuracy_se (its standard error from the
    finite test set alone, by the binomial law per class), per_class_accuracy, and groups: {name: {accuracy or None for
    an empty group, classes}}, a group's accuracy being the mean of its classes' recalls.
    """
    per_class_size = confusion.sum(1)
    recall = confusion.diagonal().double() / per_class_size
    # Laplace's (k + 1) / (n + 2) inside the variance: a class with every sample right is not known without error.
    smoothed = (confusion.diagonal() + 1).double() / (per_class_size + 2)
    variance = (smoothed * (1 - smoothed) / per_class_size).sum() / len(recall) ** 2
    groups: dict[str, Any] = {}
    for name in GROUPS:
        classes = [c for c, count in enumerate(class_counts) if group_of(count) == name]
        groups[name] = {"accuracy": float(recall[classes].mean()) if classes else None, "classes": classes}
    return {
        "top1": float(confusion.diagonal().sum() / confusion.sum()),
        "balanced_accuracy": float(recall.mean()),
        "balanced_accuracy_se": math.sqrt(float(variance)),
        "per_class_accuracy": recall.tolist(),
        "groups": groups,
    }
