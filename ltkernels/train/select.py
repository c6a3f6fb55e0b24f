"""The job `ltkernels select`: complete the tail classes of features that the user brings."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltkernels.train import rundir
from ltkernels.train.config import Config
from ltkernels.train.data.npz import read_arrays
from ltkernels.train.engine import Progress
from ltkernels.train.features import complete_tail, selected_arm


def select_features(
    path: str | Path,
    config: Config,
    *,
    out: str | Path,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Select synthetic features for the tail classes of an .npz file with `features` (n, d) and `labels` (n,).

    Writes into the folder `out` selection.npz (`features` (m, d) and `labels` (m,) of what is to be added, in the order
    of selection within a class) and selection.json (split, and per tail class its similar head class and FDG paths);
    returns the content of the latter. Raises ValueError or FileNotFoundError naming the file, array or setting.
    """
    start = time.perf_counter()
    path, out = Path(path), Path(out)
    rundir.check_free(out, force)
    arrays = read_arrays(path, ("features", "labels"))
    features, labels = arrays["features"], arrays["labels"]
    if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
        raise ValueError(
            f"{path}: features must be a finite floating (n, d) array, got {features.dtype} {features.shape}"
        )
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise ValueError(
            f"{path}: labels must hold {len(features)} class indices >= 0, got {labels.dtype} {labels.shape}"
        )
    real = torch.from_numpy(features.astype(np.float64 if features.dtype == np.float64 else np.float32))
    real_labels = torch.from_numpy(labels.astype(np.int64))

    def on_class(done: int, total: int) -> None:
        if progress:
            progress("augment and select", done, total, {})

    head, tail = complete_tail(real, real_labels, config, on_class)
    arm = selected_arm(config)
    result = {
        "input": path.name,
        "class_counts": torch.bincount(real_labels).tolist(),
        "selected": arm,
        "head_classes": head,
        "classes": [t.to_dict() for t in tail],
        "fdg_tail": sum(t.arms[arm].fdg for t in tail) / len(tail) if tail else None,
        "seconds": time.perf_counter() - start,
        "seed": config.seed,
        "config": config.to_dict(),
    }
    added = torch.cat([real[:0], *(t.added(arm) for t in tail)])
    added_labels = torch.cat([real_labels[:0], *(real_labels.new_full((t.need,), t.label) for t in tail)])
    with rundir.new_folder(out, force) as folder:
        np.savez(folder / rundir.SELECTION_ROWS, features=added.numpy(), labels=added_labels.numpy())
        rundir.write_json(folder / rundir.SELECTION, result)
    return result
