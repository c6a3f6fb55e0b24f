"""`ltkernels experiment fdg`: does the Feature Diversity Gain of the samples that complete the tail decide the accuracy?

The data-centric study of sections 4.1 to 4.3 (methods x data sets x augmented sets). For each data set a network is
trained with cross-entropy once. For each method and each of n sets, every tail class gets a pool of synthetic samples;
from it are drawn selections at L uniformly spaced FDG values between the greedy minimum and maximum. Each completes the
tail, and the classifier is trained again on the network's features. Beside the levels stand the same number of random
samples, the whole pool ("full"), and no augmentation ("none").

The level that counts as FDG-selected is the one with the lowest log-loss (mean over classes) on samples held out of
training, never the one that is best on the test set; that one is marked in the figure and called what it is. Log-loss and
not accuracy: a tail class holds out a sample or two, on which the accuracies of many levels are equal.
"""

import csv
import dataclasses
import functools
import io
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ltkernels import augment, diversity, selection
from ltkernels.train import distributed, jobs, rundir, signals
from ltkernels.train.config import Config, to_toml
from ltkernels.train.data import Dataset
from ltkernels.train.engine import Fit, Progress, apply
from ltkernels.train.experiment_report import CAVEAT, figure, findings, sentences
from ltkernels.train.features import derived_seed, head_tail_split
from ltkernels.train.models import feature_maps
from ltkernels.train.pipeline import Job
from ltkernels.train.schedules import loss_record
from ltkernels.train.trained import Trained, load_checkpoint

_COLUMNS = (
    "data",
    "method",
    "set",
    "arm",
    "level",
    "fdg_tail",
    "balanced_accuracy",
    "tail_accuracy",
    "held_out_accuracy",
    "held_out_log_loss",
)


@dataclass
class _Context:
    """A data set with its trained network, as a pool is made from it."""

    job: Job
    base: Trained
    head: list[int]
    tail: list[int]

    @property
    def features(self) -> Tensor:
        return self.job.features(self.base)[0]

    @functools.cached_property
    def maps(self) -> Tensor:
        return apply(feature_maps(self.base.model.backbone), self.job.x_train)


def _fdc(context: _Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    config, labels = context.job.config, context.job.y_train
    options = {"similarity": config.similarity, "shrinkage": config.shrinkage, "head_classes": context.head}
    return augment.fdc(context.features, labels, label, n, generator=generator, **options)


def _smote(context: _Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    return augment.smote(context.features, context.job.y_train, label, n, generator=generator)


def _ofa(context: _Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    head = context.base.model.head
    weight, bias = head.weight.detach(), head.bias.detach()
    options = {"weight": weight, "bias": bias, "head_classes": context.head}
    return augment.ofa(context.maps, context.job.y_train, label, n, generator=generator, **options)


def _remix(context: _Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    images = augment.remix_pool(context.job.x_train, context.job.y_train, label, n, generator=generator)
    return apply(context.base.model.backbone, images)


def _cmo(context: _Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    images = augment.cmo_pool(context.job.x_train, context.job.y_train, label, n, generator=generator)
    return apply(context.base.model.backbone, images)


METHODS: dict[str, Callable[[_Context, int, int, torch.Generator], Tensor]] = {
    "remix": _remix,
    "cmo": _cmo,
    "ofa": _ofa,
    "fdc": _fdc,
    "smote": _smote,
}
DEFAULT_METHODS = ("remix", "cmo", "ofa", "fdc")


def fdg_experiment(
    config: Config,
    *,
    data: Sequence[str] = ("digits-lt",),
    methods: Sequence[str] = DEFAULT_METHODS,
    levels: int = 7,
    sets: int = 5,
    processes: int | None = None,
    out: str | Path,
    force: bool = False,
    resume: str = "never",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiment into `out`; returns what summary.json holds. `config` gives everything but the data's name.

    Writes table.csv and table.json (a row per data set, method, set and arm), scatter.png (accuracy against FDG) and
    summary.json (means with intervals, and the verdicts in words). `processes` work side by side (None: one a core, over
    the settings' threads). Every finished set is on the disk: `resume="auto"` goes on after a stop. Raises ValueError,
    ImportError or OSError in words, before any work for what can be known before it.
    """
    for name, value, least in (("levels", levels, 2), ("sets", sets, 3)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, got {','.join(methods)}")
    if not data or len(set(data)) != len(data):
        raise ValueError(f"data must name different data sets, got {','.join(data)}")
    if resume not in jobs.RESUME:
        raise ValueError(f"resume must be one of {', '.join(jobs.RESUME)}, got {resume!r}")
    distributed.refuse("the experiment")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('the experiment draws with matplotlib: pip install "ltkernels[experiment]"') from error
    out, start = Path(out), time.perf_counter()
    rundir.check_free(out, force, resume == "auto")
    # Plain cross-entropy, and post-hoc adjustment for the samples that it holds out: here they choose the level.
    config = config.replace(loss="ce", schedule="none", sampler="instance", stage2="none", post_hoc="tau", mix="none")
    config = config.replace(data=",".join(data))  # in what is written; each piece of work names its own
    head = f"# ltkernels experiment fdg: methods {','.join(methods)}; levels {levels}; sets {sets}\n"
    begun = out / rundir.CONFIG
    if resume == "auto" and begun.is_file() and begun.read_text(encoding="utf-8") != head + to_toml(config):
        raise ValueError(f"--resume: {out} was begun with other settings; --force starts anew")
    if resume == "auto" and (out / rundir.SUMMARY).is_file():
        rundir.tidy(out)
        return rundir.read_json(out / rundir.SUMMARY)
    loaded = {name: _load(config, name) for name in data}
    for name in data:
        _check(config.replace(data=name), loaded[name], methods)
    with rundir.open_run(out, force, resume == "auto", keep=True), signals.handled():
        rundir.write_text(out / rundir.CONFIG, head + to_toml(config))
        (out / rundir.ITEMS).mkdir(exist_ok=True)
        for name in data:
            jobs.train(
                config.replace(data=name), loaded[name], out=_base_folder(out, name), resume="auto", progress=progress
            )
        work = [
            (str(out), config.replace(data=name), method, index, levels)
            for index in range(sets)
            for name in data
            for method in methods
        ]
        _work_all(work, processes, progress)
        rows = [row for item in work for row in rundir.read_json(_item_path(item))["rows"]]
        rundir.write_json(out / rundir.TABLE_JSON, rows)
        rundir.write_text(out / rundir.TABLE_CSV, _csv(rows))
        results = findings(rows)
        figure(out / rundir.SCATTER, rows, results)
        summary = {
            "command": "experiment fdg",
            "results": results,
            "verdicts": [*(sentence for result in results for sentence in sentences(result)), CAVEAT],
            "levels": levels,
            "sets": sets,
            "seconds": time.perf_counter() - start,
            "config": config.to_dict(),
            "environment": jobs.environment(),
        }
        rundir.write_json(out / rundir.SUMMARY, summary)
    return summary


Work = tuple[str, Config, str, int, int]
"""(result folder, settings with the data set, method, number of the set, levels)."""


def _load(config: Config, name: str) -> Dataset:
    return dataclasses.replace(jobs.load_data(config.replace(data=name)), name=name)


def _check(config: Config, data: Dataset, methods: Sequence[str]) -> None:
    """Raise what would fail after the network's training: a tail class of one sample, a method that wants images."""
    job = Job(jobs.resolve(config, data), data, None)
    job.check()
    _, tail = head_tail_split(job.class_counts, config.head_ratio)
    single = [label for label in tail if job.class_counts[label] < 2]
    if single:
        raise ValueError(f"data {data.name}: class {single[0]} has one sample to train on: its FDG is undefined")
    if not tail:
        raise ValueError(f"data {data.name}: no tail classes at head_ratio {config.head_ratio}")
    images = job.x_train.dim() == 4
    if not images and {"remix", "cmo"} & set(methods):
        raise ValueError(f"data {data.name}: methods remix and cmo need images")
    if "ofa" in methods:
        feature_maps(job.build(loss_record("ce")).backbone)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _base_folder(out: Path, name: str) -> Path:
    return out / rundir.BASES / _slug(name)


def _item_path(item: Work) -> Path:
    out, config, method, index, _ = item
    return Path(out) / rundir.ITEMS / f"{_slug(config.data)}.{method}.{index}.json"


def _work_all(work: Sequence[Work], processes: int | None, progress: Progress | None) -> None:
    """Do every item whose file is not there yet, in `processes` processes."""
    left = [item for item in work if not _item_path(item).is_file()]
    done = len(work) - len(left)

    def report() -> None:
        if progress:
            progress("augmented sets", done, len(work), {})

    report()
    count = min(len(left), processes or max(1, (os.cpu_count() or 1) // (left[0][1].threads or 1) if left else 1))
    if count <= 1:
        for item in left:
            _work(item)
            done += 1
            report()
        return
    # spawn: a forked child of a process with OpenMP threads hangs. Leaving the block ends the children, on a signal too.
    with multiprocessing.get_context("spawn").Pool(count, _ignore_interrupts) as pool:
        for _ in pool.imap_unordered(_work, left):
            done += 1
            report()


def _ignore_interrupts() -> None:
    # Ctrl-C goes to the whole group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.lru_cache(maxsize=1)
def _context(out: str, config: Config) -> _Context:
    data = _load(config, config.data)
    resolved = jobs.resolve(config, data)
    job = Job(resolved, data, None)
    record = loss_record("ce")
    folder = _base_folder(Path(out), config.data)
    sums = rundir.read_summary(folder)["checkpoints"]
    model = load_checkpoint(folder / rundir.CHECKPOINTS / "ce.pt", sums["ce"], resolved.device).classifier
    base = Trained("ce", record, job.head_spec(record), model, Fit([], torch.empty(0), 0.0))
    return _Context(job, base, *head_tail_split(job.class_counts, config.head_ratio))


def _work(item: Work) -> None:
    """One set: pools for all tail classes, selections at every level, a classifier for each arm; written in one file."""
    out, config, method, index, levels = item
    context = _context(out, config)
    before = torch.get_num_threads()
    torch.set_num_threads(context.job.config.threads)
    try:
        rows = _arms(context, method, index, levels)
    finally:
        torch.set_num_threads(before)
    # A run that was killed leaves its workers behind; the folder may be another run's by now.
    parent = multiprocessing.parent_process()
    if parent is None or parent.is_alive():
        rundir.write_json(_item_path(item), {"rows": rows})


def _arms(context: _Context, method: str, index: int, levels: int) -> list[dict[str, Any]]:
    job, base = context.job, context.base
    seed = derived_seed(job.config.seed, list(METHODS).index(method), index)
    pools = {label: _pool(context, method, label, levels, seed) for label in context.tail}
    pools = {label: arms for label, arms in pools.items() if arms}
    held = apply(base.model.backbone, job.x_held)
    rows = []
    arms = [("none", None), *(("fdg", level) for level in range(levels)), ("random", None), ("full", None)]
    for arm, level in arms:
        added, gains = None, []
        if arm != "none" and pools:
            chosen = {label: made["fdg"][level] if arm == "fdg" else made[arm] for label, made in pools.items()}
            features = torch.cat([features for features, _ in chosen.values()])
            labels = torch.cat([job.y_train.new_full((len(f),), label) for label, (f, _) in chosen.items()])
            added, gains = (features, labels), [gain for _, gain in chosen.values()]
        # One seed for all arms of a set: what differs between them is what was added.
        trained = job.retrain(base, f"{method}-{arm}", added, seed=seed)
        recall = trained.fit.confusion.diagonal().double() / trained.fit.confusion.sum(1)
        scores = apply(trained.model.head, held)
        hits = _class_means((scores.argmax(1) == job.y_held).double(), job.y_held)
        values = (
            *(job.config.data, method, index, arm, level, sum(gains) / len(gains) if gains else None),
            *(
                float(recall.mean()),
                float(recall[context.tail].mean()),
                float(hits.mean()),
                _log_loss(scores, job.y_held),
            ),
        )
        rows.append(dict(zip(_COLUMNS, values)))
    return rows


def _class_means(values: Tensor, labels: Tensor) -> Tensor:
    """The mean of `values` in each class that has any."""
    counts = torch.bincount(labels)
    return (torch.bincount(labels, values) / counts)[counts > 0]


def _log_loss(scores: Tensor, labels: Tensor) -> float:
    """Cross-entropy in nats, the mean over classes of the means over their samples."""
    return float(_class_means(cross_entropy(scores.double(), labels, reduction="none"), labels).mean())


def _pool(context: _Context, method: str, label: int, levels: int, seed: int) -> dict[str, Any]:
    """Of one tail class: (features, FDG) for each level, at random and of the whole pool; {} where nothing is needed."""
    job, config = context.job, context.job.config
    need = max(job.class_counts) - job.class_counts[label]
    if need == 0:
        return {}
    generator = torch.Generator().manual_seed(derived_seed(seed, label))
    subsets = ceil(config.pool_factor * need / config.subset_size)
    pool = METHODS[method](context, label, subsets * config.subset_size, generator)
    clusters = selection.kmeans_subsets(pool, subsets, balanced=True, seed=derived_seed(seed, label, 1) % 2**31)
    pool = pool[clusters.order]
    original = context.features[job.y_train == label]
    wanted = min(ceil(need / config.subset_size), subsets)
    chosen = selection.uniform_fdg_sets(original, pool, clusters.offsets, m=wanted, n_sets=levels)

    def measured(rows: Tensor) -> tuple[Tensor, float]:
        added = pool[rows.to(pool.device)]
        return added, float(diversity.feature_diversity_gain(original, added))

    return {
        # The last subset is cut where the class would outgrow the largest one; FDG is that of what is really added.
        "fdg": [measured(picked.indices[:need]) for picked in chosen.selections],
        "random": measured(torch.randperm(len(pool), generator=generator)[:need]),
        "full": measured(torch.arange(len(pool))),
    }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if row[key] is None else row[key] for key in _COLUMNS} for row in rows)
    return buffer.getvalue()
