"""Tables of a run for people and programs: CSV files of the test set's samples, of the classes, and of the confusions."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import precision_recall_fscore_support

from ltkernels.train.checkpoint import write_bytes
from ltkernels.train.pipeline import Job
from ltkernels.train.trained import Trained


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as UTF-8, whole or not at all. Raises OSError naming the file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # Names may hold halves of surrogate pairs, which UTF-8 cannot.
    write_bytes(path, buffer.getvalue().encode("utf-8", "backslashreplace"))


def write_tables(folder: Path, job: Job, trained: Trained) -> None:
    """Of the chosen model on the test set: samples.csv (id, file where there is one, label, prediction, probability of both,
    loss = -log p(label)), classes.csv (precision, recall, F1, support and training samples) and confusion.csv (rows: true)."""
    folder.mkdir(exist_ok=True)
    names, data = job.data.class_names, job.data
    scores, labels = job.test_scores(trained).cpu(), job.y_test.cpu()
    predicted = scores.argmax(1)
    own, best = scores.gather(1, labels[:, None])[:, 0], scores.gather(1, predicted[:, None])[:, 0]
    files = data.test_files or ("",) * len(labels)
    columns = (labels.tolist(), predicted.tolist(), own.exp().tolist(), best.exp().tolist(), (-own).tolist())
    write_csv(
        folder / "samples.csv",
        ("id", "file", "label", "prediction", "probability_of_label", "probability", "loss"),
        (
            (i, files[i], names[y], names[p], f"{of_label:.6g}", f"{top:.6g}", f"{loss:.6g}")
            for i, (y, p, of_label, top, loss) in enumerate(zip(*columns))
        ),
    )
    # A class that is never predicted has precision 0.
    scored = precision_recall_fscore_support(
        labels.numpy(), predicted.numpy(), labels=range(len(names)), zero_division=0.0
    )
    write_csv(
        folder / "classes.csv",
        ("label", "class", "precision", "recall", "f1", "support", "training_samples"),
        (
            (c, name, *(f"{value:.6g}" for value in measures), int(support), count)
            for c, (name, *measures, support, count) in enumerate(zip(names, *scored, data.class_counts))
        ),
    )
    confusion = torch.as_tensor(trained.fit.confusion)
    write_csv(folder / "confusion.csv", ("true", *names), ((n, *row) for n, row in zip(names, confusion.tolist())))
