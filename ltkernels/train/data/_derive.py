"""Data sets made from data sets: other class counts, and one class made similar to another."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ltkernels.train.data._dataset import Dataset


def with_counts(data: Dataset, class_counts: Sequence[int], seed: int = 0) -> Dataset:
    """`data` with class_counts[c] training samples of class c, kept by a shuffle seeded with (seed, c); the test set stays.

    The samples keep the standardisation of `data`, so that two such sets differ in nothing else. Raises ValueError naming
    the class where fewer samples are there than asked for, or none is asked for.
    """
    if len(class_counts) != data.num_classes:
        raise ValueError(f"class_counts has {len(class_counts)} entries, {data.name} has {data.num_classes} classes")
    kept = []
    for label, (wanted, there) in enumerate(zip(class_counts, data.class_counts)):
        if not 1 <= wanted <= there:
            raise ValueError(f"class_counts asks for {wanted} samples of class {label}; {data.name} has {there}")
        rows = (data.y_train == label).nonzero().flatten().numpy()
        kept.append(np.random.default_rng([seed, label]).permutation(rows)[:wanted])
    index = torch.from_numpy(np.concatenate(kept))
    files = tuple(data.train_files[i] for i in index.tolist()) if data.train_files else ()
    return replace(data, x_train=data.x_train[index], y_train=data.y_train[index], train_files=files)


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
    generator = torch.Generator().manual_seed(seed)
    own, other = ((data.y_train == label).nonzero().flatten() for label in (majority, minority))
    order = torch.randperm(len(own), generator=generator)
    partners = other[torch.randint(len(other), (len(own),), generator=generator)]
    count = round(rho * len(own))
    replaced = own[order[:count]]
    x = data.x_train.clone()
    x[replaced] = torch.lerp(data.x_train[partners[:count]], data.x_train[replaced], lam)
    return replace(data, x_train=x)
