"""Relative accuracy: what the same recipe reaches when the same number of training samples is spread evenly."""

from typing import Any

from ltkernels.train.config import Config
from ltkernels.train.data import Dataset, with_counts
from ltkernels.train.metrics import relative_accuracy
from ltkernels.train.pipeline import Job
from ltkernels.train.stage2 import follow


def balanced_twin(data: Dataset, source: Dataset, config: Config) -> Dataset:
    """A balanced set of `data`'s total size (rounded to whole samples a class) from `source`, the data before thinning.

    Raises ValueError where a class of the source has too few samples.
    """
    total, classes = sum(data.class_counts), data.num_classes
    each = round(total / classes)
    if source.num_classes != classes or min(source.class_counts) < each:
        raise ValueError(
            f"relative: {config.data} has classes of {min(source.class_counts)} samples; a balanced set of {total} needs {each}"
        )
    return with_counts(source, [each] * classes, config.data_seed)


def add_relative(job: Job, twin: Dataset, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Train the recipe of `job` on `twin`, and put `relative_accuracy` into each entry of `variants`, which came of it."""
    other = Job(job.config, twin, job.journal, prefix="balanced/", own=job.own)
    base = other.train_chosen()
    accuracies = []
    for entry, trained in zip(variants, [base, *follow(other, base), *other.best]):
        balanced = other.variant(trained)["balanced_accuracy"]
        entry["relative_accuracy"] = relative_accuracy(entry["balanced_accuracy"], balanced)
        accuracies.append(balanced)
    return {"class_counts": twin.class_counts, "balanced_accuracy": accuracies}
