"""From image files with labels to a data set: what `folder:`, `list:`, `csv:` and `hf:` share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ltkernels.train.data._dataset import DataRequest, Dataset, naming
from ltkernels.train.data._images import Source, pictures
from ltkernels.train.data._lazy import rows_of
from ltkernels.train.data._split import arrange, with_test


def build(
    request: DataRequest,
    name: str,
    place: object,
    parts: dict[str, tuple[Sequence[Source], np.ndarray]],
    class_names: Sequence[Any] | None = None,
    notes: Sequence[str] = (),
) -> Dataset:
    """Number, divide and thin the files of each part by their labels (n,), then decode and standardise what is left.

    Raises ValueError or TypeError naming the `place` for labels, ValueError naming the file for pictures, ImportError without Pillow.
    """
    parts, said = with_test(parts)
    with naming(place):
        labels = {part: given for part, (_, given) in parts.items()}
        arranged = arrange(labels, class_names, "the {} set", **request.division())
    sources = {part: np.array(parts[origin][0], object)[rows] for part, (origin, rows) in arranged.rows.items()}
    images = pictures(
        np.concatenate(list(sources.values())).tolist(),
        request.image_size,
        cache=request.cache,
        workers=request.workers,
        progress=request.progress,
    )
    arrays: dict[str, Any] = {}
    at = 0
    for part, files in sources.items():
        arrays[f"x_{part}"] = rows_of(images, slice(at, at + len(files)))
        arrays[f"y_{part}"] = arranged.labels[part]
        at += len(files)
    return Dataset.from_arrays(
        **arrays,
        class_names=arranged.names,
        name=name,
        defaults={"epochs": 30, "batch_size": 128, "lr": 0.1},
        image_size=request.image_size,
        pictures=True,
        notes=[*notes, *said, *arranged.notes],
        train_files=tuple(source.file for source in sources["train"]),
        test_files=tuple(source.file for source in sources["test"]),
    )
