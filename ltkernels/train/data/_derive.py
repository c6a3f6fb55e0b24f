"""Data sets made from data sets: other class counts, folds of one, and one class made similar to another."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels._checks import ClassCounts, count_list
from ltkernels._features import check_seed
from ltkernels.train.data._dataset import Dataset, moments, standardised
from ltkernels.train.data._lazy import rows_of
from ltkernels.train.data._longtail import thinned
from ltkernels.train.data._split import chosen, fold_rows, listed


def with_counts(data: Dataset, class_counts: ClassCounts, seed: int = 0) -> Dataset:
    """`data` with class_counts[c] training samples of class c, kept by a shuffle seeded with (seed, c); the test set stays.

    The samples keep the standardisation of `data`, so that two such sets differ in nothing else. Raises ValueError naming
    the class where fewer samples are there than asked for, or none is asked for.
    """
    class_counts = count_list(class_counts)
    if len(class_counts) != data.num_classes:
        raise ValueError(f"class_counts has {len(class_counts)} entries, {data.name} has {data.num_classes} classes")
    for label, (wanted, there) in enumerate(zip(class_counts, data.class_counts)):
        if not 1 <= wanted <= there:
            raise ValueError(f"class_counts asks for {wanted} samples of class {label}; {data.name} has {there}")
    rows = thinned(data.y_train.numpy(), class_counts, seed)
    index = torch.from_numpy(rows)
    files = chosen(data.train_files, rows)
    return replace(data, x_train=rows_of(data.x_train, index), y_train=data.y_train[index], train_files=files)


def mix_categories(data: Dataset, majority: int, minority: int, rho: float, lam: float, seed: int = 0) -> Dataset:
    """`data` with a majority class that reaches into a minority class: the simulation of the category-similarity study.

    round(rho * n) of the n training samples of `majority` become lam * x_i + (1 - lam) * x_j with x_j a random training
    sample of `minority`, and keep their label. lam = 1 changes nothing, lam = 0 puts copies of minority samples under the
    majority's label. The same seed replaces nested sets of samples by the same partners as rho grows, so that runs over
    rho and lam differ in nothing else. The test set stays. Raises ValueError naming the argument.
    """
    for name, value in (("majority", majority), ("minority", minority)):
        if not 0 <= value < data.num_classes:
            raise ValueError(f"{name} is {value}; {data.name} has the classes 0 to {data.num_classes - 1}")
    if majority == minority:
        raise ValueError(f"majority and minority are both class {majority}")
    for name, share in (("rho", rho), ("lam", lam)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    generator = torch.Generator().manual_seed(check_seed(seed))
    own, other = ((data.y_train == label).nonzero().flatten() for label in (majority, minority))
    order = torch.randperm(len(own), generator=generator)
    partners = other[torch.randint(len(other), (len(own),), generator=generator)]
    count = round(rho * len(own))
    replaced = own[order[:count]]
    x = data.x_train.clone()
    x[replaced] = torch.lerp(data.x_train[partners[:count]], data.x_train[replaced], lam)
    return replace(data, x_train=x)


def k_fold(data: Dataset, folds: int = 5, seed: int = 0) -> Iterator[Dataset]:
    """`folds` data sets of the training set of `data`: each tests a fold of every class and trains on the others. Its test set stays
    out of all of them.

    Samples are standardised anew by what each trains on (lazy ones keep the standardisation of `data`). A class of one sample is
    left out; one of fewer samples than folds is tested with some of them more than once; both are among the notes. Raises ValueError
    naming the argument.
    """
    if not isinstance(folds, int) or isinstance(folds, bool) or folds < 2:
        raise ValueError(f"folds must be an integer of at least 2, got {folds!r}")
    counts = np.array(data.class_counts)
    kept = np.flatnonzero(counts > 1)
    if not len(kept) or folds > counts.max():
        raise ValueError(f"folds is {folds}, the largest class of {data.name} has {counts.max()} samples")
    notes = list(data.notes)
    for what, classes in (
        ("left out, with one sample", counts == 1),
        (f"tested more than once, with fewer samples than {folds} folds", (counts > 1) & (counts < folds)),
    ):
        if classes.any():
            notes.append(f"{what}: {listed(chosen(data.class_names, classes))}")
    y = data.y_train.numpy()
    rows = np.flatnonzero(counts[y] > 1)
    labels = np.searchsorted(kept, y[rows])
    for i, held in enumerate(fold_rows(labels, folds, seed)):
        tested = np.isin(np.arange(len(rows)), held)
        changes: dict[str, Any] = {"x_val": None, "y_val": None}
        for part, of in (("train", ~tested), ("test", tested)):
            changes[f"x_{part}"] = rows_of(data.x_train, torch.from_numpy(rows[of]))
            changes[f"y_{part}"] = torch.from_numpy(labels[of])
            changes[f"{part}_files"] = chosen(data.train_files, rows[of])
        x = changes["x_train"]
        if data.mean is not None and data.std is not None and isinstance(x, Tensor):
            shift, scale, _ = moments(x.numpy())
            changes |= {name: standardised(name, changes[name].numpy(), shift, scale) for name in ("x_train", "x_test")}
            changes |= {"mean": data.mean + data.std * shift, "std": data.std * scale}
        names = chosen(data.class_names, kept)
        yield replace(data, name=f"{data.name} fold {i + 1}/{folds}", class_names=names, notes=tuple(notes), **changes)
