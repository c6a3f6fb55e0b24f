"""The job `ltkernels select`: complete the tail classes of features that the user brings."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ltkernels._arrays import readable, tensor
from ltkernels._npz import map_arrays, map_npy, read_arrays
from ltkernels._ranks import Ranks, together
from ltkernels.augment import most_similar_class
from ltkernels.selection._arms import ClassSets, arm_name
from ltkernels.selection._checkpoint import drop_damaged
from ltkernels.selection._recipe import Recipe, fdg_recipe, head_tail_split
from ltkernels.train import distributed, rundir
from ltkernels.train.config import Config
from ltkernels.train.data._split import listed
from ltkernels.train.engine import Progress
from ltkernels.train.features import fdc_pool, recipe_settings, tail_class
from ltkernels.train.tables import write_csv

# Rows looked at together: a memory-mapped file is never read whole.
_BLOCK = 1 << 16


def load_features(path: Path, labels: Path | None = None, optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Arrays `features` and `labels`, and `class_names` and those of `optional` that the file has, memory-mapped where the format allows
    (.npy, and .npz written without compression).

    `path` is an .npz file with these keys, or an .npy file of features with the labels in another. Raises
    FileNotFoundError or ValueError naming the file; pickled objects are refused.
    """
    if path.suffix == ".npy":
        if labels is None:
            raise ValueError(f"{path}: an .npy file holds features only; name the file of the labels (--labels)")
        return readable(path, {"features": map_npy(path), "labels": map_npy(labels)})
    if labels is not None:
        raise ValueError(f"--labels {labels}: only for an .npy file of features; {path} holds its own labels")
    optional = ("class_names", *optional)
    arrays: dict[str, np.ndarray] = dict(map_arrays(path, ("features", "labels", *optional)))
    rest = tuple(name for name in ("features", "labels") if name not in arrays)
    missing = tuple(name for name in optional if name not in arrays)
    return readable(path, {**arrays, **read_arrays(path, rest, missing)})


def check_labelled(path: Path, arrays: dict[str, np.ndarray], features: str, labels: str) -> tuple[Tensor, Tensor]:
    """The two arrays as tensors over the same memory; ValueError naming the file and the array."""
    x, y = arrays[features], arrays[labels]
    if x.ndim != 2 or x.dtype.kind != "f" or x.shape[1] == 0:
        raise ValueError(f"{path}: {features} must be a floating (n, d) array, got {x.dtype} {x.shape}")
    for first in range(0, len(x), _BLOCK):
        finite = np.isfinite(x[first : first + _BLOCK]).all(axis=1)
        if not finite.all():
            raise ValueError(f"{path}: {features} holds NaN or infinity, first in row {first + int(finite.argmin())}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not len(y):
        raise ValueError(f"{path}: {labels} must hold {len(x)} class indices >= 0, got {y.dtype} {y.shape}")
    if y.min() < 0:
        raise ValueError(f"{path}: {labels} must not be negative, got {y.min()}")
    # Before a table of all classes is made: one forged label would make it as large as it likes.
    if labels == "labels" and y.max() >= len(y):
        raise ValueError(f"{path}: {labels} reach {y.max()}, of {len(y)} samples: some class has none")
    return tensor(x), torch.from_numpy(y.astype(np.int64))


def select_features(
    path: str | Path,
    config: Config,
    *,
    out: str | Path,
    labels: str | Path | None = None,
    classes: Sequence[int] | None = None,
    m: int | None = None,
    n_sets: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Select synthetic features for the tail classes of features in a file (see `load_features`).

    Pools come from the file's own `pool` and `pool_labels`, or else from `fdc`. `config.select` says how rows are chosen, `classes`,
    `m` and `n_sets` are as in `fdg_recipe`, the random arm has config.random_repeats repeats. An interrupted job, made again
    with the same arguments, goes on from the last round of each class. Several processes (torchrun) share the classes out; the
    first one writes, and the files are those of one process.

    Writes into the folder `out`: selection.npz (`features` (rows, d) and `labels` (rows,) of what is to be added, in the
    order of selection within a class; of pools from the file also `indices` (rows,), their rows in its `pool`, and `files` where
    it has `pool_files`; with sets, also `pool_C` (P, d), `sets_C` (n_sets, need), rows of that pool, and `pool_indices_C` (P,)),
    selection.csv (label, index and file of the rows, of pools from the file), selection.json (split, and per tail class its
    arms with their FDG paths), and selection.png where matplotlib is
    there. Returns the content of the JSON file. Raises ValueError or FileNotFoundError naming the file, array or setting.
    """
    begin = time.perf_counter()
    path, out = Path(path), Path(out)
    with distributed.joined("cpu") as world, ExitStack() as stack:
        # A rank may wait long for another: a class can take hours.
        group = dist.new_group(timeout=timedelta(days=30)) if world.size > 1 else None
        ranks = None if group is None else Ranks(group)
        with together(ranks):
            if world.is_main:
                # Nobody resumes from this folder: what stops the work, Ctrl-C too, leaves nothing of it.
                stack.enter_context(rundir.open_run(out, force, resume=False, undone=(BaseException,)))
            source = _Source(path, None if labels is None else Path(labels), config)
            if classes is None and source.able == []:
                raise ValueError(f"{path}: every tail class has one sample: its feature diversity gain is undefined")
        settings = (sorted(config.to_dict().items()), classes, m, n_sets)
        checkpoint = out.parent / f".{out.name}.select-{source.token(settings)}"
        with together(ranks):
            if world.is_main:
                drop_damaged(checkpoint)
        try:
            recipe = fdg_recipe(
                source,
                source.make_pool,
                source.counts,
                classes=source.able if classes is None else classes,
                m=m,
                n_sets=n_sets,
                checkpoint=checkpoint if n_sets else None,
                progress=None if progress is None else (lambda what, done, total: progress(what, done, total, {})),
                group=group,
                **recipe_settings(config),
            )
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
        result: dict[str, Any] = {}
        with together(ranks):
            if recipe is not None:
                result = _write(source, recipe, config.select, n_sets, out, begin)
                shutil.rmtree(checkpoint, ignore_errors=True)
        return result if ranks is None else ranks.share(result)[0]


class _Source(Mapping[int, Tensor]):
    """The file's features by class, and the pools that complete them."""

    def __init__(self, path: Path, labels: Path | None, config: Config) -> None:
        self.path, self.config = path, config
        arrays = load_features(path, labels, ("pool", "pool_labels", "pool_files"))
        self.real, self.labels = check_labelled(path, arrays, "features", "labels")
        self.pools = None
        if ("pool" in arrays) != ("pool_labels" in arrays):
            raise ValueError(f"{path}: pool and pool_labels go together; one of them is missing")
        if "pool" in arrays:
            self.pools = check_labelled(path, arrays, "pool", "pool_labels")
            width = self.real.shape[1]
            if self.pools[0].shape[1] != width:
                raise ValueError(f"{path}: pool has {self.pools[0].shape[1]} features per sample, features has {width}")
        self.files = arrays.get("pool_files")
        if self.files is not None and (self.pools is None or self.files.shape != (len(self.pools[1]),)):
            raise ValueError(
                f"{path}: pool_files must name the file of every row of pool, got {self.files.shape} names"
            )
        self.counts = torch.bincount(self.labels).tolist()
        if 0 in self.counts:
            raise ValueError(f"{path}: labels have no sample of class {self.counts.index(0)}")
        names = arrays.get("class_names")
        if names is not None and names.shape != (len(self.counts),):
            raise ValueError(f"{path}: class_names must name {len(self.counts)} classes, got {names.shape} names")
        self.names = None if names is None else names.tolist()
        self.dtype = torch.float64 if self.real.dtype == torch.float64 else torch.float32
        self.head, tail = head_tail_split(self.counts, config.head_ratio)
        singles = [label for label in tail if self.counts[label] == 1]
        # None: every tail class.
        self.able = [label for label in tail if self.counts[label] > 1] if singles else None
        self.notes = (
            [f"not completed, with one sample: class {listed(list(map(self.name, singles)))}"] if singles else []
        )
        if not any(self.counts[label] < max(self.counts) for label in tail):
            self.notes.append(
                f"no class is completed: none beyond the head (head_ratio {config.head_ratio:g}) has fewer samples than the largest"
            )

    def __getitem__(self, label: int) -> Tensor:
        return self.real[self.labels == label].to(self.dtype)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.counts)))

    def __len__(self) -> int:
        return len(self.counts)

    def make_pool(self, label: int, rows: int) -> Tensor:
        if self.pools is None:
            return fdc_pool(self.real.to(self.dtype), self.labels, label, rows, self.head, self.config)
        found = self.pools[0][self.pools[1] == label].to(self.dtype)
        if not len(found):
            raise ValueError(
                f"{self.path}: pool has no samples of class {self.name(label)}; --classes says which classes to complete"
            )
        return found

    def name(self, label: int) -> str:
        """The class' number, and its name where the file has one."""
        return str(label) if self.names is None else f"{label} ({self.names[label]})"

    def pool_rows(self, label: int) -> Tensor:
        """Rows of the file's pool that are of a class, in order."""
        return (self.pools[1] == label).nonzero().flatten()

    def similar_head(self, label: int) -> int | None:
        """The head class in whose spread the pool of a class lies; None where the file brought the pool."""
        if self.pools is not None:
            return None
        real = self.real.to(self.dtype)
        return most_similar_class(real, self.labels, label, self.head, similarity=self.config.similarity)

    def token(self, settings: Any) -> str:
        """Names what an interrupted job may go on with: this file, as it is now, and these settings."""
        what = repr((*settings, self.path.resolve(), self.path.stat().st_mtime_ns))
        return hashlib.sha256(what.encode()).hexdigest()[:12]


def _write(source: _Source, recipe: Recipe, wanted: str, n_sets: int, folder: Path, begin: float) -> dict[str, Any]:
    config, single = source.config, source.dtype
    arm = arm_name(wanted)
    result = {
        "input": source.path.name,
        "class_names": source.names,
        "class_counts": source.counts,
        "selected": arm,
        "notes": source.notes,
        "head_classes": recipe.head,
        "classes": [_entry(entry, source.similar_head(entry.label), source.counts) for entry in recipe.classes],
        "sets": {
            "kept": [list(which) for which in recipe.kept],
            "fdg_tail": recipe.fdg.tolist(),
            "spacing_error": None if not recipe.kept else recipe.spacing_error,
        },
        "seconds": time.perf_counter() - begin,
        "seed": config.seed,
        "config": config.to_dict(),
    }
    fdg = [entry["arms"][arm]["fdg"] for entry in result["classes"]]
    result["fdg_tail"] = sum(fdg) / len(fdg) if fdg else None
    none = source.labels[:0]
    saved = {
        "features": torch.cat([source.real[:0].to(single), *(e.pool[e.rows].to(single) for e in recipe.classes)]),
        "labels": torch.cat([none, *(none.new_full((e.need,), e.label) for e in recipe.classes)]),
    }
    for entry in recipe.classes if n_sets else ():
        saved[f"pool_{entry.label}"] = entry.pool.to(single)
        saved[f"sets_{entry.label}"] = entry.set_rows
    files: dict[str, np.ndarray] = {}
    if source.pools is not None:
        own = [source.pool_rows(e.label) for e in recipe.classes]
        indices = torch.cat([none, *(rows[e.rows] for rows, e in zip(own, recipe.classes))])
        saved["indices"] = indices
        saved |= {f"pool_indices_{e.label}": rows for rows, e in zip(own, recipe.classes) if n_sets}
        if source.files is not None:
            files["files"] = source.files[indices.numpy()]
        rows = zip(saved["labels"].tolist(), indices.tolist(), files.get("files", [""] * len(indices)))
        write_csv(folder / rundir.SELECTION_TABLE, ("label", "index", "file"), rows)
    np.savez(folder / rundir.SELECTION_ROWS, **{name: x.numpy() for name, x in saved.items()}, **files)
    result["picture"] = _picture(recipe, wanted, source.name, folder / rundir.SELECTION_PICTURE)
    rundir.write_json(folder / rundir.SELECTION, result)
    return result


def _entry(entry: ClassSets, similar: int | None, counts: list[int]) -> dict[str, Any]:
    found = tail_class(entry, similar, counts, entry.pool.dtype).to_dict()
    if len(entry.set_fdg):
        found["sets"] = {"fdg": entry.set_fdg.tolist(), "spacing_error": entry.spacing_error}
    return found


def _picture(recipe: Recipe, wanted: str, name: Callable[[int], str], path: Path) -> str | None:
    """FDG paths of the classes, and how the sets are spread; the file's name, or None without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = 2 if recipe.kept or any(e.random for e in recipe.classes) else 1
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    left, colours = axes[0], colormaps["viridis"]
    shown = recipe.classes[:: max(1, -(-len(recipe.classes) // 8))]
    for i, entry in enumerate(shown):
        colour = colours(0.9 * i / max(1, len(shown) - 1))
        if wanted != "random":
            # Rows that are chosen all at once have no path, only its end.
            marker = "o" if len(entry.chosen.path) == 1 else ""
            left.plot(*zip(*entry.chosen.path), color=colour, marker=marker, label=f"class {name(entry.label)}")
        if entry.random:
            label = f"class {name(entry.label)}" if wanted == "random" else None
            left.plot(*zip(*entry.random[0].path), color=colour, linestyle=":", label=label)
    left.axhline(0.0, color="0.6", linewidth=0.8)
    drawn = "points" if all(len(e.chosen.path) == 1 for e in shown) else "solid"
    title = "at random" if wanted == "random" else f"{wanted} ({drawn}), at random (dotted)"
    left.set(xlabel="samples added", ylabel="FDG", title=title)
    if shown:
        left.legend(fontsize="small", frameon=False)
    if panels == 2:
        right = axes[1]
        random = torch.stack([e.random_fdg for e in recipe.classes]).mean(0)
        if len(random):
            right.hist(random.numpy(), bins=20, color="0.75", label="random repeats")
            right.yaxis.get_major_locator().set_params(integer=True)
        if wanted != "random" and recipe.classes:
            fdg = sum(e.fdg for e in recipe.classes) / len(recipe.classes)
            right.axvline(fdg, color=colours(0.0), label=wanted)
        if recipe.kept:
            values = recipe.fdg.numpy()
            right.plot(values, np.arange(1, len(values) + 1), ".", color="#0072B2", label="kept sets, in order")
            right.plot(
                np.linspace(values[0], values[-1], len(values)), np.arange(1, len(values) + 1), color="0.3", linewidth=0.8,
                label="uniform spacing",
            )  # fmt: skip
        right.set(xlabel="FDG_Tail (mean over the classes)", ylabel="sets", title="distribution of the sets")
        right.legend(fontsize="small", frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return path.name
