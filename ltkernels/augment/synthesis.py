"""New tail-class features: drawn from what a well-sampled class teaches about spread (FDC), or between neighbours (SMOTE).

Similar classes have similar variance (Yang et al. 2021, "Free Lunch for Few-shot Learning: Distribution Calibration").
FDC (Ma et al., IEEE TMM 2023) therefore keeps a tail class's mean and takes the covariance of its most similar head
class. No code of the authors is public; the choices that the text leaves open are named parameters here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels._features import as_tensor, check_integers
from ltkernels.augment import _draws

SIMILARITIES = ("euclidean", "cosine")
CENTERS = ("class_mean", "sample")


def most_similar_class(
    features: Any, labels: Any, tail_class: int, head_classes: list[int], *, similarity: str = "euclidean"
) -> int:
    """The head class whose mean feature is nearest (`euclidean`) or best aligned (`cosine`) with the tail class's mean.

    `features` (n, d) floating, `labels` (n,) integer; tensors or NumPy arrays. Ties go to the head class listed first. The tail
    class itself is never chosen. Raises TypeError or ValueError naming the argument.
    """
    features, labels = _checked(features, labels)
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


class Calibration(NamedTuple):
    """What FDC draws a tail class from: `centers` (1, d) or (tail samples, d), and the Cholesky factor (d, d) of the
    calibrated covariance, both float64. Made once, it serves training that draws new samples for every batch."""

    centers: Tensor
    factor: Tensor

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, d) float64: a center picked at random for each draw (there may be one) plus Gaussian noise. `generator` is
        a CPU generator (the draws are the same whatever the device); None takes torch's global one."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        origin = self.centers
        if len(origin) > 1:
            origin = origin[torch.randint(len(origin), (n,), generator=generator).to(origin.device)]
        noise = torch.randn(n, origin.shape[1], dtype=torch.float64, generator=generator).to(origin.device)
        return origin + noise @ self.factor.T


def calibrate(
    features: Any,
    labels: Any,
    tail_class: int,
    *,
    head_classes: list[int],
    similarity: str = "euclidean",
    center: str = "class_mean",
    shrinkage: float = 0.1,
) -> Calibration:
    """The distribution that `fdc` draws from; arguments and errors are the same."""
    features, labels = _checked(features, labels)
    if center not in CENTERS:
        raise ValueError(f"center must be one of {', '.join(CENTERS)}, got {center!r}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
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
    centers = tail.mean(0, keepdim=True) if center == "class_mean" else tail
    return Calibration(centers, torch.linalg.cholesky(covariance))


def fdc(
    features: Any,
    labels: Any,
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

    `features` (m, d) floating, `labels` (m,) integer, both of the real samples, tensors or NumPy arrays; the head class is
    `most_similar_class(...)`. `center="class_mean"` draws around the mean of the tail class, `"sample"` around a real
    tail sample picked at random for each draw. The head's covariance S becomes
    (1 - shrinkage) S + (shrinkage + 1e-6) (tr S / d) I: a class of 30 samples in 64 dimensions has a singular S, which
    Cholesky rejects, and would confine every synthetic sample to a 29-dimensional plane.

    Computed in float64 and returned in the dtype and on the device of `features`. `generator` is a CPU generator (the
    draws are the same whatever the device); None takes torch's global one. Raises TypeError or ValueError naming the argument.
    """
    features, labels = _checked(features, labels)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    calibration = calibrate(
        features,
        labels,
        tail_class,
        head_classes=head_classes,
        similarity=similarity,
        center=center,
        shrinkage=shrinkage,
    )
    return calibration.sample(n, generator).to(features.dtype)


def smote(
    features: Any,
    labels: Any,
    tail_class: int,
    n: int,
    *,
    k: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`n` synthetic features (n, d) between neighbours of `tail_class` (SMOTE: Chawla et al. 2002, arXiv:1106.1813).

    Each is x + u (y - x): x a real sample of the class (all are used equally often), y one of its `k` nearest neighbours
    in the class, never x itself, u uniform in [0, 1). A class with fewer than k + 1 samples has all others as neighbours.
    `features` (m, d) floating, `labels` (m,) integer; tensors or NumPy arrays. Distances and sums in float64; the result has the
    dtype and device of `features`. `generator` may be of any device. Raises TypeError or ValueError naming the argument, and for a
    class of one sample.
    """
    features, labels = _checked(features, labels)
    if n < 1 or k < 1:
        raise ValueError(f"n and k must be at least 1, got {n} and {k}")
    own = _members(features, labels, tail_class)
    if len(own) < 2:
        raise ValueError(f"class {tail_class} has one sample: it has no neighbour")
    distance = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)  # by index: a duplicate of the sample is a neighbour, the sample is not
    neighbours = distance.topk(min(k, len(own) - 1), largest=False).indices
    rows = _draws.spread(n, len(own), generator).to(own.device)
    which = _draws.integers(neighbours.shape[1], n, generator).to(own.device)
    share = _draws.uniform(n, generator).to(own.device)
    return torch.lerp(own[rows], own[neighbours[rows, which]], share[:, None]).to(features.dtype)


def _checked(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors, in the dtypes that they have."""
    features, labels = as_tensor(features, "features"), check_integers(labels, "labels")
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"features must be a floating (n, d) tensor, got {features.dtype} {tuple(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},), got {tuple(labels.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features holds NaN or infinite values")
    return features, labels


def _members(features: Tensor, labels: Tensor, label: int) -> Tensor:
    rows = features[labels == label]
    if len(rows) == 0:
        raise ValueError(f"labels holds no sample of class {label}")
    return rows.double()
