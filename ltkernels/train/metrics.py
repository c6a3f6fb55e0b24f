"""What a run is judged by. `summarize` follows from the confusion matrix of the last epoch on the balanced test set; the
other measures take probabilities, classifier weights or features."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from ltkernels import diversity
from ltkernels.nn import CosineLinear

# Thresholds of Liu et al. 2019 (many / medium / few shot), on training samples per class.
MANY_ABOVE = 100
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")
RECALL_FLOOR = 1e-3
"""What a recall of 0 counts as in the geometric and harmonic mean, which would be 0 for one hopeless class otherwise."""


def confusion_matrix(target: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: entry [i, j] counts the samples of class i that were predicted as j."""
    return torch.bincount(target * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_recalls(confusion: Tensor) -> Tensor:
    """Float64 recalls of the classes that have samples: of a held-out part, not all have."""
    there = confusion.sum(1) > 0
    return confusion.diagonal()[there].double() / confusion.sum(1)[there]


def group_of(count: int) -> str:
    """`many` for more than 100 training samples, `few` for fewer than 20, `medium` between."""
    return "many" if count > MANY_ABOVE else "few" if count < FEW_BELOW else "medium"


def summarize(confusion: Tensor, class_counts: list[int]) -> dict[str, Any]:
    """Fractions from a confusion matrix (C, C) with at least one test sample per class.

    Returns top1; balanced_accuracy (mean of the per-class recalls) and balanced_accuracy_se (its standard error from the
    finite test set alone, by the binomial law per class); per_class_accuracy; groups: {name: {accuracy and se, None for an
    empty group, classes}}, a group's accuracy being the mean of its classes' recalls; worst_class: {label, accuracy}, the
    first of the lowest recalls; g_mean, the C-th root of the product of the recalls, and harmonic_mean of them, each with
    recalls below recall_floor raised to it; macro_f1, the mean of the per-class F1. ValueError for a class without a test sample.
    """
    hits, sizes = confusion.diagonal(), confusion.sum(1)
    if not bool(sizes.all()):
        raise ValueError(f"confusion has no sample of class {int(sizes.argmin())}: its recall is undefined")
    recall = hits.double() / sizes
    # Laplace's (k + 1) / (n + 2) inside the variance: a class with every sample right is not known without error.
    smoothed = (hits + 1).double() / (sizes + 2)
    variance = smoothed * (1 - smoothed) / sizes
    groups: dict[str, Any] = {}
    for name in GROUPS:
        classes = [c for c, count in enumerate(class_counts) if group_of(count) == name]
        accuracy = float(recall[classes].mean()) if classes else None
        error = math.sqrt(float(variance[classes].sum())) / len(classes) if classes else None
        groups[name] = {"accuracy": accuracy, "se": error, "classes": classes}
    raised = recall.clamp_min(RECALL_FLOOR)
    # A class that is never predicted and never right has F1 = 0 / (0 + its samples).
    f1 = 2 * hits.double() / (sizes + confusion.sum(0))
    worst = int(recall.argmin())
    return {
        "top1": float(hits.sum().double() / confusion.sum()),
        "balanced_accuracy": float(recall.mean()),
        "balanced_accuracy_se": math.sqrt(float(variance.sum())) / len(recall),
        "per_class_accuracy": recall.tolist(),
        "groups": groups,
        "worst_class": {"label": worst, "accuracy": float(recall[worst])},
        "g_mean": float(raised.log().mean().exp()),
        "harmonic_mean": float(1 / (1 / raised).mean()),
        "recall_floor": RECALL_FLOOR,
        "macro_f1": float(f1.mean()),
    }


def reliability(probabilities: Tensor, target: Tensor, bins: int = 15) -> dict[str, list[Any]]:
    """Samples by their confidence, the largest probability, in bins (k / bins, (k + 1) / bins]: of each bin `samples` and how many
    of them are `right`, and the sum of their `confidence`, so that those of several test sets add up.

    `probabilities` (n, C), `target` (n,) int64. In float64. Raises ValueError naming the argument.
    """
    if probabilities.dim() != 2 or target.shape != probabilities.shape[:1] or len(target) == 0:
        raise ValueError(
            f"probabilities must be (n, C) and target (n,) with n >= 1, got {tuple(probabilities.shape)} and "
            f"{tuple(target.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, predicted = probabilities.double().max(1)
    which = (torch.ceil(confidence * bins) - 1).clamp(0, bins - 1).long()
    right = torch.bincount(which[predicted == target], minlength=bins)
    sums = torch.zeros(bins, dtype=torch.float64, device=which.device).index_add_(0, which, confidence)
    samples = torch.bincount(which, minlength=bins)
    return {"samples": samples.tolist(), "right": right.tolist(), "confidence": sums.tolist()}


def expected_calibration_error(found: dict[str, list[Any]]) -> float:
    """ECE (Guo et al. 2017) of what `reliability` found: the gap between confidence and accuracy, averaged over samples by bins."""
    gaps = (abs(right - confidence) for right, confidence in zip(found["right"], found["confidence"]))
    return sum(gaps) / sum(found["samples"])


def relative_accuracy(accuracy: float, balanced_run: float) -> float:
    """Accuracy over that of the same recipe on a balanced training set of the same total size, which takes a run of its
    own. Raises ValueError where that is not above 0."""
    if not balanced_run > 0:
        raise ValueError(f"balanced_run must be above 0, got {balanced_run}")
    return accuracy / balanced_run


def classifier_norms(weight: Tensor) -> tuple[list[float], float]:
    """L2 norms of a classifier's rows, weight (C, d), and their variance (over the C rows, not C - 1), in float64."""
    norms = weight.detach().double().norm(dim=1)
    return norms.tolist(), float(norms.var(unbiased=False))


def class_diversity(features: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    """Feature diversity V of each class (log2 units); None for a class without samples. V measures how much a class
    holds, where a count only says how often it occurs ("semantic scale", Ma et al. 2023)."""
    classes = (features[labels == c] for c in range(num_classes))
    return [float(diversity.feature_diversity(rows)) if len(rows) else None for rows in classes]


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, d) float64 mean features; rows of classes without samples are 0."""
    total = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    total.index_add_(0, labels, features.double())
    counts = torch.bincount(labels, minlength=num_classes).clamp_min(1)
    return total / counts[:, None]


def class_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, C) float64: cosines between the classes' mean features, about the mean of these means.

    About that mean because features behind a ReLU are positive: all their means point the same way.
    """
    means = class_means(features, labels, num_classes)
    directions = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    return directions @ directions.T


def principal_plane(features: Tensor, labels: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """The two directions of largest variance: coordinates (m, 2) and labels (m,) of at most `per_class` samples a class,
    the first ones. Signs are fixed by each direction's largest entry, so that equal features give equal pictures."""
    if features.shape[1] < 2:
        raise ValueError(f"features must have at least 2 columns, got {features.shape[1]}")
    kept = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in labels.unique().tolist()])
    rows = features.double()
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    axes = vectors[:, [-1, -2]]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return rows[kept] @ axes, labels[kept]


def feature_drift(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], num_classes: int) -> dict[str, Any]:
    """How far the classes' features moved between two labelled sets (features (n, d), labels (n,)).

    For each class (None where either set has fewer than 2 samples of it): shift, the squared distance of the means over
    what sampling alone would give, tr(C) (1 / n + 1 / m) with C the pooled covariance, so that 1 is no drift whatever
    the dimension; and diversity_ratio, V after over V before (None where V before is 0). Also share_before and
    share_after, the classes' shares of the two sets.
    """
    shifts: list[float | None] = []
    ratios: list[float | None] = []
    for c in range(num_classes):
        old, new = (x[y == c].double() for x, y in (before, after))
        n, m = len(old), len(new)
        if n < 2 or m < 2:
            shifts.append(None)
            ratios.append(None)
            continue
        scatter = (old - old.mean(0)).square().sum() + (new - new.mean(0)).square().sum()
        noise = float(scatter) / (n + m - 2) * (1 / n + 1 / m)
        moved = float((old.mean(0) - new.mean(0)).square().sum())
        shifts.append(moved / noise if noise > 0 else None)
        base = float(diversity.feature_diversity(old))
        ratios.append(float(diversity.feature_diversity(new)) / base if base > 0 else None)
    shares = [(torch.bincount(y, minlength=num_classes) / max(1, len(y))).tolist() for _, y in (before, after)]
    return {"shift": shifts, "diversity_ratio": ratios, "share_before": shares[0], "share_after": shares[1]}


def describe_classifier(head: torch.nn.Module, log_probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the report shows of a classifier beside its confusion matrix, ready for JSON.

    `log_probabilities` (n, C) and labels are those of the test set. Returns reliability and ece, classifier_norms and
    classifier_norm_variance (None for cosine heads, which divide by the norms, and for heads without a `weight` matrix).
    """
    norms = variance = None
    weight: Any = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(head, CosineLinear):
        norms, variance = classifier_norms(weight)
    found = reliability(log_probabilities.exp(), labels)
    described = {
        "ece": expected_calibration_error(found),
        "classifier_norms": norms,
        "classifier_norm_variance": variance,
    }
    return {**described, "reliability": found}


def describe_features(
    train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor], num_classes: int, *, points: int = 600
) -> dict[str, Any]:
    """What the report shows of a feature space, ready for JSON: from (features (n, d), labels (n,)) of both sets.

    Returns class_diversity and class_similarity (C x C) of the training set, and embedding: {x, y, label}, about `points`
    test samples in the plane of largest variance (None for a single feature).
    """
    embedding = None
    if test_set[0].shape[1] >= 2:
        place, label = principal_plane(*test_set, max(1, -(-points // num_classes)))
        embedding = {"x": _rounded(place[:, 0], 4), "y": _rounded(place[:, 1], 4), "label": label.tolist()}
    return {
        "class_diversity": class_diversity(*train_set, num_classes),
        "class_similarity": _rounded(class_similarity(*train_set, num_classes), 4),
        "embedding": embedding,
    }


def _rounded(values: Tensor, digits: int) -> Sequence[Any]:
    return torch.round(values, decimals=digits).tolist()


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean of two values or more, and half of its 95 % interval by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "half": float(half)}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """`interval` of the paired differences, how many are above 0, and the verdict in words."""
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = interval(values)
    low, high = found["mean"] - found["half"], found["mean"] + found["half"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return {**found, "wins": sum(v > 0 for v in values), "verdict": verdict}
