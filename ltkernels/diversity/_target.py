"""The FDG that new real samples of a class bring, measured where there are many: on the head classes."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._features import check_alpha, check_centering, check_count, check_features, check_seed
from ._measures import feature_diversity_gain

# Without held-out samples a class is cut into so many folds, and each is held out in turn.
_FOLDS = 5


class NoHeadClass(ValueError):
    """No class has samples to calibrate on."""


class FdgTarget(NamedTuple):
    """A calibrated FDG.

    Attributes:
        value: mean over the classes; spread: standard deviation over the classes (0 for one).
        classes: FDG of each class, the mean over its repeats, by label.
        held_out: labels that were measured with samples held out of training; the others by folds of their own, which a
            network that was trained on them makes too small.
    """

    value: float
    spread: float
    classes: dict[Any, float]
    held_out: list[Any]


def fdg_target(
    features: Mapping[Any, Any],
    held_out: Mapping[Any, Any] | None,
    n: int,
    *,
    added: int | None = None,
    repeats: int = 10,
    seed: int = 0,
    centering: str = "joint",
    alpha: float = 1.0,
) -> FdgTarget:
    """FDG that real samples bring to n real samples of their class, on classes that have more: a target, or a cap, for
    augmented samples of a class of n.

    Args:
        features: (n_h, d) features of head classes, by label.
        held_out: further samples of the same classes, which the network behind the features was not trained on: its own
            training samples lie closer together, and a target from them is too small. A class that has none, or None
            for all: leave-out folds of its `features`.
        n: samples of the class that the target is for, at least 2. Heads that cannot spare so many are passed over.
        added: how many samples are added (default: all that are held out). FDG depends on it little.
        repeats: draws of n samples per class, each with its own `added`.
        seed: of the draws. centering, alpha: of FDG.

    Raises:
        TypeError, ValueError: as `feature_diversity_gain`; n below 2, repeats below 1, labels of `held_out` that
            `features` lacks. NoHeadClass: a ValueError, no class with n samples and others to add.

    Source: this library. For Gaussian classes and N' >> N it estimates E[log det(I + alpha C)] / E[log det(I + alpha
    C_n)] - 1 with C_n the covariance of n samples.
    """
    for name, value, least in (("n", n, 2), ("repeats", repeats, 1), ("added", 1 if added is None else added, 1)):
        check_count(value, name, least)
    seed = check_seed(seed)
    check_centering(centering)
    check_alpha(alpha)
    for name, given in (("features", features), ("held_out", {} if held_out is None else held_out)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} must be a mapping from labels to features, got {type(given).__name__}")
    others = dict(held_out or {})
    unknown = [label for label in others if label not in features]
    if unknown:
        raise ValueError(f"held_out has class {unknown[0]}, features has not")
    found: dict[Any, float] = {}
    used = []
    for position, (label, given) in enumerate(features.items()):
        z = check_features(given, f"features of class {label}").detach()
        extra = check_features(others[label], f"held_out of class {label}").detach() if label in others else z[:0]
        folds = not len(extra)
        if len(z) - (len(z) // _FOLDS if folds else 0) < n or (folds and len(z) < _FOLDS):
            continue
        draws = np.random.SeedSequence((seed, position))
        generator = torch.Generator().manual_seed(int(draws.generate_state(1)[0]))
        gains = []
        for repeat in range(repeats):
            if folds:
                if repeat % _FOLDS == 0:
                    order = torch.randperm(len(z), generator=generator)
                own, rest = _fold(z, order, repeat % _FOLDS)
            else:
                own, rest = z, extra
            rows = own[torch.randperm(len(own), generator=generator)[:n].to(own.device)]
            take = torch.randperm(len(rest), generator=generator)[: added or len(rest)]
            gains.append(
                float(feature_diversity_gain(rows, rest[take.to(rest.device)], centering=centering, alpha=alpha))
            )
        found[label] = fmean(gains)
        if not folds:
            used.append(label)
    if not found:
        raise NoHeadClass(
            f"no head class to calibrate FDG on: none of {len(features)} has {n} samples and others to add; give fdg a number"
        )
    values = list(found.values())
    return FdgTarget(fmean(values), stdev(values) if len(values) > 1 else 0.0, found, used)


def _fold(z: Tensor, order: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(all but one fold, that fold)."""
    mask = torch.zeros(len(z), dtype=torch.bool)
    mask[order[number::_FOLDS]] = True
    mask = mask.to(z.device)
    return z[~mask], z[mask]
