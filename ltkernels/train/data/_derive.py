"""Data sets made from data sets: other class counts, folds of one, and one class made similar to another."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ltkernels.train.data._dataset import Dataset
from ltkernels.train.data._lazy import LazySamples, rows_of
from ltkernels.train.data._split import fold_rows, listed


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
    generator = torch.Generator().manual_seed(seed)
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
    counts = data.class_counts
    kept = [c for c, count in enumerate(counts) if count > 1]
    if len(kept) < 1 or folds > max(counts):
        raise ValueError(f"folds is {folds}, the largest class of {data.name} has {max(counts)} samples")
    notes = list(data.notes)
    for what, classes in (
        ("left out, with one sample", [c for c in range(len(counts)) if c not in kept]),
        (f"tested more than once, with fewer samples than {folds} folds", [c for c in kept if counts[c] < folds]),
    ):
        if classes:
            notes.append(f"{what}: {listed([data.class_names[c] for c in classes])}")
    renumbered = torch.full((len(counts),), -1)
    renumbered[kept] = torch.arange(len(kept))
    rows = (renumbered[data.y_train] >= 0).nonzero().flatten()
    labels = renumbered[data.y_train[rows]]
    for i, held in enumerate(fold_rows(labels.numpy(), folds, seed)):
        tested = torch.zeros(len(rows), dtype=torch.bool)
        tested[held] = True
        parts = {"train": rows[~tested], "test": rows[tested]}
        samples = {f"x_{part}": rows_of(data.x_train, index) for part, index in parts.items()}
        moments = {}
        if data.mean is not None and data.std is not None and not isinstance(data.x_train, LazySamples):
            moments, samples = _standardised_anew(samples, data.mean, data.std)
        files = {f"{part}_files": _chosen(data.train_files, index) for part, index in parts.items()}
        ys = {"y_train": labels[~tested], "y_test": labels[tested], "x_val": None, "y_val": None}
        names = tuple(data.class_names[c] for c in kept)
        yield replace(
            data, name=f"{data.name} fold {i + 1}/{folds}", class_names=names, notes=tuple(notes), **samples, **ys, **files, **moments
        )  # fmt: skip


def _chosen(files: Sequence[str], index: torch.Tensor) -> tuple[str, ...]:
    return tuple(files[i] for i in index.tolist()) if files else ()


def _standardised_anew(
    samples: dict[str, torch.Tensor], mean: torch.Tensor, std: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The samples by the moments of x_train, and mean and std of the raw ones."""
    x = samples["x_train"].double()
    axes = (0, *range(2, x.dim()))
    shift, scale = x.mean(axes), x.std(axes)
    scale = torch.where(scale > 1e-6, scale, 1.0)  # constant here: standardised values are of order 1
    shape = (1, -1, *[1] * (x.dim() - 2))
    found = {name: ((x.double() - shift.view(shape)) / scale.view(shape)).float() for name, x in samples.items()}
    return {"mean": mean + std * shift, "std": std * scale}, found
