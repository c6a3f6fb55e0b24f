"""From lists of image files with labels to a data set: what `folder:`, `list:` and `csv:` share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._images import Source, pictures
from ltkernels.train.data._longtail import make_long_tailed
from ltkernels.train.data._split import split_off


@dataclass(frozen=True)
class Part:
    """The files of train, test or val, their class indices (n,) and the names to tell them by."""

    sources: Sequence[Source]
    labels: np.ndarray
    files: Sequence[str]

    def rows(self, index: np.ndarray) -> "Part":
        return Part([self.sources[i] for i in index], self.labels[index], [self.files[i] for i in index])


def build(
    request: DataRequest, name: str, parts: Mapping[str, Part], names: Sequence[str], notes: Sequence[str] = ()
) -> Dataset:
    """Decode and standardise; a missing test part is held out of train, and an imbalance factor thins train before anything is
    decoded. Raises ValueError naming the file, ImportError without Pillow."""
    parts, notes = dict(parts), list(notes)
    if "test" not in parts:
        whole = parts["train"]
        split, names, said = split_off(whole.labels, names, request.test_split, request.seed)
        notes += said
        renumbered = Part(whole.sources, split.renumbered[whole.labels], whole.files)
        parts["train"], parts["test"] = renumbered.rows(split.kept), renumbered.rows(split.held)
        if "val" in parts:
            val = parts["val"]
            labels = split.renumbered[val.labels]
            parts["val"] = Part(val.sources, labels, val.files).rows(np.flatnonzero(labels >= 0))
    if request.imbalance is not None:
        kept = make_long_tailed(parts["train"].labels, request.imbalance, request.profile, request.seed)
        parts["train"] = parts["train"].rows(kept)
    sources = [source for part in parts.values() for source in part.sources]
    images = pictures(
        sources, request.image_size, cache=request.cache, workers=request.workers, progress=request.progress
    )
    arrays, at = {}, 0
    for key, part in parts.items():
        arrays[f"x_{key}"], arrays[f"y_{key}"] = images[at : at + len(part.sources)], part.labels
        at += len(part.sources)
    return Dataset.from_arrays(
        **arrays,
        class_names=list(names),
        name=name,
        defaults={"epochs": 30, "batch_size": 128, "lr": 0.1},
        image_size=request.image_size,
        pictures=True,
        notes=notes,
        train_files=tuple(parts["train"].files),
        test_files=tuple(parts["test"].files),
    )
