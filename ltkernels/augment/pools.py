"""Offline pools of images for a tail class, labelled with that class: Remix and CMO as a data-centric recipe uses them.

A pool is made once, before selection (`ltkernels.selection`): for feature-space pools see `fdc`, `smote` and `ofa`, which
have the same form ``f(samples, labels, tail_class, n, *, ..., generator)``. As every sample gets the pure label of the
tail class, less than half of it may come from another class; and a partner of the tail class itself adds nothing that
the pool is for, so partners are drawn from other classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ltkernels import _checks
from ltkernels.augment import _draws
from ltkernels.augment._draws import Generator
from ltkernels.augment.mixing import blend, paste


def relative_heads(class_counts: _checks.ClassCounts, tail_class: int, kappa: float = 3.0) -> list[int]:
    """The classes with more than `kappa` times the samples of `tail_class`, in label order: Remix's condition."""
    counts = _checks.count_list(class_counts)
    if not 0 <= tail_class < len(counts):
        raise ValueError(f"tail_class is {tail_class}; there are {len(counts)} classes")
    bound = _checks.number("kappa", kappa, low=1.0) * counts[tail_class]
    return [label for label, count in enumerate(counts) if count > bound]


def _rows(
    labels: Tensor, tail_class: int, partners: Sequence[int], n: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Indices (n,) of tail samples, each as often as any other, and (n,) of random samples of the partner classes."""
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    if tail_class in partners:
        raise ValueError(f"the partners' classes hold the tail class {tail_class} itself")
    own = _draws.members(labels, tail_class)
    others = torch.isin(labels, torch.tensor(list(partners), dtype=torch.int64, device=labels.device))
    others = others.nonzero().flatten()
    if len(others) == 0:
        raise ValueError(
            f"labels holds no sample of the classes {', '.join(map(str, partners))} to mix class {tail_class} with"
        )
    picked = _draws.spread(n, len(own), generator).to(labels.device)
    partner = _draws.integers(len(others), n, generator).to(labels.device)
    return own[picked], others[partner]


def remix_pool(
    images: Tensor,
    labels: Tensor,
    tail_class: int,
    n: int,
    *,
    head_classes: Sequence[int] | None = None,
    kappa: float = 3.0,
    alpha: float = 1.0,
    per_row: bool = True,
    generator: Generator = None,
) -> Tensor:
    """`n` images (n, ...) of `tail_class`, each mixed with less than half of a random head sample.

    Tail samples come in whole rounds, so that each is used equally often. The head's share is min(lam, 1 - lam) with
    lam ~ Beta(alpha, alpha), which by symmetry is the distribution of lam drawn until it is below 1/2.

    Args:
        images: (m, ...) floating; labels: (m,) int64, both of the long-tailed training set.
        head_classes: where the partners come from; None: `relative_heads` of the counts in `labels` with `kappa`.
        kappa, alpha: of Remix. per_row: a share for each image, or one for all.
        generator: of any device; None is the global CPU generator.

    Raises TypeError or ValueError naming the argument; ValueError where no class has kappa times the tail's samples.
    """
    _draws.check_floating(images, "images")
    _draws.check_labels(labels, len(images), "labels")
    if head_classes is None:
        head_classes = relative_heads(torch.bincount(labels, minlength=tail_class + 1).tolist(), tail_class, kappa)
        if not head_classes:
            raise ValueError(f"no class has more than kappa = {kappa:g} times the samples of class {tail_class}")
    tail, head = _rows(labels, tail_class, head_classes, n, generator)
    lam = _draws.beta(alpha, n if per_row else 1, generator).expand(n).to(images.device)
    # Clamped below 1/2 in the images' precision: 0.4999... rounds up to it there.
    half = 0.5 - torch.finfo(images.dtype).eps
    return blend(images[tail], images[head], 1 - torch.minimum(lam, 1 - lam).clamp_max(half))


def cmo_pool(
    images: Tensor,
    labels: Tensor,
    tail_class: int,
    n: int,
    *,
    background_classes: Sequence[int] | None = None,
    min_area: float = 0.5,
    alpha: float = 1.0,
    generator: Generator = None,
) -> Tensor:
    """`n` images (n, ..., height, width) of `tail_class`: a box of a tail sample over a sample of another class.

    Tail samples come in whole rounds. Backgrounds are drawn from the training samples as they are distributed, without
    those of the tail class. The box covers more than `min_area` of the image: Beta(1, 1) alone would give boxes of every
    area, down to a pixel, all labelled with the tail class. The default keeps the background below one half.

    Args:
        images: (m, ..., height, width) of any dtype; labels: (m,) int64, both of the long-tailed training set.
        background_classes: None is every class but the tail class.
        min_area: in [0, 1). alpha: of Beta(alpha, alpha). generator: as in `remix_pool`.

    Raises TypeError or ValueError naming the argument.
    """
    _draws.check_images(images)
    _draws.check_labels(labels, len(images), "labels")
    min_area = _checks.number("min_area", min_area, low=0.0)
    if min_area >= 1:
        raise ValueError(f"min_area is {min_area}; it must be below 1")
    if background_classes is None:
        background_classes = [c for c in labels.unique().tolist() if c != tail_class]
    tail, background = _rows(labels, tail_class, background_classes, n, generator)
    share = 1 - _draws.beta(alpha, n, generator).to(images.device)
    return paste(images[background], images[tail], share, min_area, generator)[0]
