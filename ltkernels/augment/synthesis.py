"""New tail-class features drawn from what a well-sampled class teaches about spread.

Similar classes have similar variance (Yang et al. 2021, "Free Lunch for Few-shot Learning: Distribution Calibration").
FDC (Ma et al., IEEE TMM 2023) therefore keeps a tail class's mean and takes the covariance of its most similar head
class. No code of the authors is public; the choices that the text leaves open are named parameters here.
"""

import torch
from torch import Tensor

SIMILARITIES = ("euclidean", "cosine")
CENTERS = ("class_mean", "sample")


def most_similar_class(
    features: Tensor, labels: Tensor, tail_class: int, head_classes: list[int], *, similarity: str = "euclidean"
) -> int:
    """The head class whose mean feature is nearest (`euclidean`) or best aligned (`cosine`) with the tail class's mean.

    `features` (n, d) floating, `labels` (n,) integer. Ties go to the head class listed first. The tail class itself is
    never chosen. Raises ValueError naming the argument.
    """
    _check(features, labels)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    candidates = [c for c in head_classes if c != tail_class]
    if not candidates:
        raise ValueError("head_classes must hold a class other than tail_class")
    center = _members(features, labels, tail_class).mean(0)
    means = torch.stack([_members(features, labels, c).mean(0) for c in candidates])
    if similarity == "cosine":
        score = torch.nn.functional.cosine_similarity(means, center.unsqueeze(0), dim=1)
    else:
        score = -(means - center).norm(dim=1)
    return candidates[int(score.argmax())]


def fdc(
    features: Tensor,
    labels: Tensor,
    tail_class: int,
    n: int,
    *,
    head_classes: list[int],
    similarity: str = "euclidean",
    center: str = "class_mean",
    shrinkage: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`n` synthetic features (n, d) of `tail_class`: Gaussian with the tail's mean and a head class's covariance.

    `features` (m, d) floating, `labels` (m,) integer, both of the real samples; the head class is
    `most_similar_class(...)`. `center="class_mean"` draws around the mean of the tail class, `"sample"` around a real
    tail sample picked at random for each draw. The head's covariance S becomes
    (1 - shrinkage) S + (shrinkage + 1e-6) (tr S / d) I: a class of 30 samples in 64 dimensions has a singular S, which
    Cholesky rejects, and would confine every synthetic sample to a 29-dimensional plane.

    Computed in float64 and returned in the dtype and on the device of `features`. `generator` is a CPU generator (the
    draws are the same whatever the device); None takes torch's global one. Raises ValueError naming the argument.
    """
    _check(features, labels)
    if center not in CENTERS:
        raise ValueError(f"center must be one of {', '.join(CENTERS)}, got {center!r}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    head = most_similar_class(features, labels, tail_class, head_classes, similarity=similarity)
    spread = _members(features, labels, head)
    if len(spread) < 2:
        raise ValueError(f"head class {head} has one sample: no covariance")
    covariance = torch.cov(spread.T).reshape(features.shape[1], features.shape[1])
    mean_variance = covariance.diagonal().mean()
    if mean_variance <= 0:
        raise ValueError(f"the features of head class {head} are all equal: no covariance")
    covariance = (1 - shrinkage) * covariance
    covariance.diagonal().add_((shrinkage + 1e-6) * mean_variance)

    tail = _members(features, labels, tail_class)
    if center == "class_mean":
        origin = tail.mean(0, keepdim=True)
    else:
        origin = tail[torch.randint(len(tail), (n,), generator=generator).to(tail.device)]
    noise = torch.randn(n, features.shape[1], dtype=torch.float64, generator=generator).to(features.device)
    return (origin + noise @ torch.linalg.cholesky(covariance).T).to(features.dtype)


def _check(features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"features must be a floating (n, d) tensor, got {features.dtype} {tuple(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},), got {tuple(labels.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features holds NaN or infinite values")


def _members(features: Tensor, labels: Tensor, label: int) -> Tensor:
    rows = features[labels == label]
    if len(rows) == 0:
        raise ValueError(f"labels holds no sample of class {label}")
    return rows.double()
