"""`ltkernels experiment fdg`: does it pay to choose, by Feature Diversity Gain, the samples that complete the tail?

For each data set a network is trained with cross-entropy (`networks` of them, dealt over the sets). For each method and each
of n sets, every tail class gets a pool of synthetic samples; the arms of `experiment_arms` take equally many rows from it,
by rules that are fixed before anything is trained: the target of FDG is calibrated on head classes with their held-out
samples. Every arm is judged by the same classifier (`Judge`), beside random draws of the same size, no augmentation, and,
where the data set has them, real samples that training never saw: the room that there is.

Remix and CMO mix images, which in feature space pass through the frozen network; in image space every arm trains a network of its
own on the completed set (`experiment_image`, Definition 4).
"""

import copy
import dataclasses
import functools
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

from ltkernels import augment
from ltkernels.diversity import FdgTarget, feature_diversity_gain, standardized_offset
from ltkernels.experiments.arms import Judge, make_arms
from ltkernels.experiments.findings import CAVEAT, figure, findings, sentences
from ltkernels.experiments.image import POOLS, ArmRow, image_rows
from ltkernels.experiments.protocol import Protocol
from ltkernels.selection._arms import calibrated
from ltkernels.train import distributed, jobs, rundir, signals
from ltkernels.train.config import Config, to_toml
from ltkernels.train.data import Dataset
from ltkernels.train.engine import Fit, Progress, apply
from ltkernels.train.features import derived_seed, head_tail_split
from ltkernels.train.models import feature_maps
from ltkernels.train.pipeline import Job
from ltkernels.train.schedules import loss_record
from ltkernels.train.tables import write_csv
from ltkernels.train.trained import Trained, load_checkpoint

_COLUMNS = ("data", "method", "set", "share", "arm", "fdg_tail", "offset_tail", "balanced_accuracy", "tail_accuracy")


@dataclass(eq=False)
class Context:
    """A data set with its trained network, as a pool is made from it, and the real samples that training never sees."""

    job: Job
    base: Trained | None  # in image space every arm has its own
    head: list[int]
    tail: list[int]
    spare: Dataset | None

    @property
    def features(self) -> Tensor:
        return self.job.features(self.base)[0]

    @functools.cached_property
    def maps(self) -> Tensor:
        return apply(feature_maps(self.base.model.backbone), self.job.x_train)

    @functools.cached_property
    def held(self) -> Tensor:
        return apply(self.base.model.backbone, self.job.x_held)

    @functools.cached_property
    def spare_features(self) -> tuple[Tensor, Tensor] | None:
        if self.spare is None:
            return None
        return apply(self.base.model.backbone, self.spare.x_train), self.spare.y_train

    def need(self, label: int, protocol: Protocol) -> int:
        """Rows that a tail class gets: what brings it to the largest, at most `added` unless counts are the point."""
        counts = self.job.class_counts
        need = max(counts) - counts[label]
        return need if protocol.classifier == "literal" else min(need, protocol.added)


def _fdc(context: Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    config, labels = context.job.config, context.job.y_train
    options = {"similarity": config.similarity, "shrinkage": config.shrinkage, "head_classes": context.head}
    return augment.fdc(context.features, labels, label, n, generator=generator, **options)


def _smote(context: Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    return augment.smote(context.features, context.job.y_train, label, n, generator=generator)


def _ofa(context: Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    head = context.base.model.head
    weight, bias = head.weight.detach(), head.bias.detach()
    options = {"weight": weight, "bias": bias, "head_classes": context.head}
    return augment.ofa(context.maps, context.job.y_train, label, n, generator=generator, **options)


def _mixing(pool: Callable[..., Tensor]) -> Callable[["Context", int, int, torch.Generator], Tensor]:
    """The features of images that `pool` mixes."""

    def make(context: Context, label: int, n: int, generator: torch.Generator) -> Tensor:
        images = pool(context.job.x_train, context.job.y_train, label, n, generator=generator)
        return apply(context.base.model.backbone, images)

    return make


def _mixed(context: Context, label: int, n: int, generator: torch.Generator) -> Tensor:
    """An equal part of every other method, in random order."""
    makers = [make for name, make in METHODS.items() if name != "mixed"]
    parts = [make(context, label, ceil(n / len(makers)), generator) for make in makers]
    return torch.cat(parts)[torch.randperm(sum(map(len, parts)), generator=generator)[:n]]


METHODS: dict[str, Callable[[Context, int, int, torch.Generator], Tensor]] = {
    "remix": _mixing(augment.remix_pool),
    "cmo": _mixing(augment.cmo_pool),
    "ofa": _ofa,
    "fdc": _fdc,
    "smote": _smote,
    "mixed": _mixed,
}
DEFAULT_METHODS = ("remix", "cmo", "ofa", "fdc")


def fdg_experiment(
    config: Config,
    *,
    data: Sequence[str] = ("digits-lt",),
    methods: Sequence[str] = DEFAULT_METHODS,
    protocol: Protocol | None = None,
    processes: int | None = None,
    out: str | Path,
    force: bool = False,
    resume: str = "never",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiment into `out`; returns what summary.json holds. `config` gives everything but the data's name.

    Writes table.csv and table.json (a row per data set, method, set, share and arm), scatter.png (accuracy against FDG) and
    summary.json (means with intervals, and the verdicts in words). `processes` work side by side (None: one a core, over
    the settings' threads). Every finished set is on the disk: `resume="auto"` goes on after a stop. Raises ValueError,
    ImportError or OSError in words, before any work for what can be known before it.
    """
    protocol = protocol or Protocol()
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, got {','.join(methods)}")
    if not data or len(set(data)) != len(data):
        raise ValueError(f"data must name different data sets, got {','.join(data)}")
    if protocol.space == "image" and not set(methods) <= set(POOLS):
        raise ValueError(f"space image is for methods {', '.join(POOLS)}, got {','.join(methods)}")
    if resume not in jobs.RESUME:
        raise ValueError(f"resume must be one of {', '.join(jobs.RESUME)}, got {resume!r}")
    distributed.refuse("the experiment")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('the experiment draws with matplotlib: pip install "ltkernels[experiment]"') from error
    out, start = Path(out), time.perf_counter()
    rundir.check_free(out, force, resume == "auto")
    # Plain cross-entropy, and post-hoc adjustment for the samples that it holds out: they calibrate the target of FDG.
    config = config.replace(loss="ce", schedule="none", sampler="instance", stage2="none", post_hoc="tau", mix="none")
    config = config.replace(data=",".join(data))  # in what is written; each piece of work names its own
    head = f"# ltkernels experiment fdg: methods {','.join(methods)}; {protocol}\n"
    begun = out / rundir.CONFIG
    if resume == "auto" and begun.is_file() and begun.read_text(encoding="utf-8") != head + to_toml(config):
        raise ValueError(f"--resume: {out} was begun with other settings; --force starts anew")
    if resume == "auto" and (out / rundir.SUMMARY).is_file():
        rundir.tidy(out)
        return rundir.read_json(out / rundir.SUMMARY)
    loaded = {name: _load(config, name) for name in data}
    for name in data:
        _check(config.replace(data=name), loaded[name], methods)
    with rundir.open_run(out, force, resume == "auto", undone=()), signals.handled():
        rundir.write_text(out / rundir.CONFIG, head + to_toml(config))
        (out / rundir.ITEMS).mkdir(exist_ok=True)

        def of_network(name: str, network: int) -> Config:
            return config.replace(data=name, seed=(config.seed + network) % 2**64)

        for name in data:
            for network in range(protocol.networks if protocol.space == "feature" else 0):
                own = of_network(name, network)
                jobs.train(own, loaded[name], out=_base_folder(out, own), resume="auto", progress=progress)
        work = [
            (str(out), of_network(name, index % protocol.networks), method, index, protocol)
            for index in range(protocol.sets)
            for name in data
            for method in methods
        ]
        _work_all(work, processes, progress)
        rows = [row for item in work for row in rundir.read_json(_item_path(item))["rows"]]
        rundir.write_json(out / rundir.TABLE_JSON, rows)
        write_csv(out / rundir.TABLE_CSV, _COLUMNS, ([r[key] for key in _COLUMNS] for r in rows))
        results = findings(rows)
        figure(out / rundir.SCATTER, rows, results)
        summary = {
            "command": "experiment fdg",
            "results": results,
            "verdicts": [*(sentence for result in results for sentence in sentences(result)), CAVEAT],
            "protocol": dataclasses.asdict(protocol),
            "seconds": time.perf_counter() - start,
            "config": config.to_dict(),
            "environment": jobs.environment(),
        }
        rundir.write_json(out / rundir.SUMMARY, summary)
    return summary


Work = tuple[str, Config, str, int, Protocol]
"""(result folder, settings with the data set and the network's seed, method, number of the set, protocol)."""


def _load(config: Config, name: str) -> Dataset:
    return dataclasses.replace(jobs.load_data(config.replace(data=name)), name=name)


def _check(config: Config, data: Dataset, methods: Sequence[str]) -> None:
    """Raise what would fail after the network's training: a tail class of one sample, a method that wants images."""
    job = Job(jobs.resolve(config, data), data)
    job.check()
    _, tail = head_tail_split(job.class_counts, config.head_ratio)
    single = [label for label in tail if job.class_counts[label] < 2]
    if single:
        raise ValueError(f"data {data.name}: class {single[0]} has one sample to train on: its FDG is undefined")
    if not tail:
        raise ValueError(f"data {data.name}: no tail classes at head_ratio {config.head_ratio}")
    images = job.x_train.dim() == 4
    if not images and {"remix", "cmo", "mixed"} & set(methods):
        raise ValueError(f"data {data.name}: methods remix, cmo and mixed need images")
    if {"ofa", "mixed"} & set(methods):
        feature_maps(job.build(loss_record("ce")).backbone)


def spare_samples(config: Config, data: Dataset) -> Dataset | None:
    """The real samples that thinning to the long tail left out, standardised as `data`; None where there are none."""
    try:
        full = jobs.load_data(config.replace(imbalance=1.0))
    except ValueError:
        return None
    if (
        full.mean is None
        or full.std is None
        or data.mean is None
        or data.std is None
        or len(full.y_train) <= len(data.y_train)
    ):
        return None

    def raw(part: Dataset) -> Tensor:
        shape = (1, -1, *[1] * (part.x_train.dim() - 2)) if part.x_train.dim() == 4 else (1,) * part.x_train.dim()
        return part.x_train.double() * part.std.double().view(shape) + part.mean.double().view(shape)  # type: ignore[union-attr]

    def keys(values: Tensor) -> list[bytes]:
        # Standardisation in float32 moves a value of a byte's range by less than this rounding hides; + 0.0 makes of -0.0 a 0.
        return [row.tobytes() for row in ((values * 64.0).round() + 0.0).float().flatten(1).numpy()]

    values, used = raw(full), set(keys(raw(data)))
    left = torch.tensor([key not in used for key in keys(values)])
    shape = (1, -1, *[1] * (values.dim() - 2)) if values.dim() == 4 else (1,) * values.dim()
    x = ((values - data.mean.double().view(shape)) / data.std.double().view(shape)).float()
    return dataclasses.replace(data, x_train=x[left], y_train=full.y_train[left])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _base_folder(out: Path, config: Config) -> Path:
    return out / rundir.BASES / f"{_slug(config.data)}.{config.seed}"


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


@functools.lru_cache(maxsize=2)
def _context(out: str, config: Config, space: str) -> Context:
    data = _load(config, config.data)
    resolved = jobs.resolve(config, data)
    job = Job(resolved, data)
    split = head_tail_split(job.class_counts, config.head_ratio)
    if space == "image":
        return Context(job, None, *split, spare_samples(config, data))
    folder = _base_folder(Path(out), config)
    sums = rundir.read_summary(folder)["checkpoints"]
    model = load_checkpoint(folder / rundir.CHECKPOINTS / "ce.pt", sums["ce"], resolved.device).classifier
    base = Trained("ce", loss_record("ce"), model, Fit([], torch.empty(0), 0.0))
    return Context(job, base, *split, spare_samples(config, data))


def _work(item: Work) -> None:
    """One set: pools for all tail classes, every arm, a classifier for each; written in one file."""
    out, config, method, index, protocol = item
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        rows = _rows(_context(out, config, protocol.space), method, index, protocol)
    finally:
        torch.set_num_threads(before)
    # A run that was killed leaves its workers behind; the folder may be another run's by now.
    parent = multiprocessing.parent_process()
    if parent is None or parent.is_alive():
        rundir.write_json(_item_path(item), {"rows": rows})


def set_seed(seed: int, method: str, index: int) -> int:
    """The seed of one set of a method."""
    return derived_seed(seed, list(METHODS).index(method), index) % 2**31


def _rows(context: Context, method: str, index: int, protocol: Protocol) -> list[dict[str, Any]]:
    seed = set_seed(context.job.config.seed, method, index)
    rows: list[dict[str, Any]] = []

    def add(share: float | None, found: Sequence[ArmRow]) -> None:
        for arm, fdg, offset, accuracy in found:
            means = [sum(x) / len(x) if x else None for x in (fdg, offset)]
            values = (context.job.config.data, method, index, share, arm, *means, *accuracy)
            rows.append(dict(zip(_COLUMNS, values)))

    if protocol.space == "image":
        found, targets = image_rows(context, method, index, seed, protocol)
        add(None, found)
    else:
        targets = _feature_rows(context, method, seed, protocol, add)
    for label, target in targets.items():
        if target is not None:
            rows[0].setdefault("targets", {})[str(label)] = [target.value, target.spread]
    return rows


def _feature_rows(
    context: Context, method: str, seed: int, protocol: Protocol, add: Callable[[float | None, Sequence[ArmRow]], None]
) -> dict[int, FdgTarget | None]:
    """Adds every arm of one set, "none" first; returns the targets by label."""
    job = context.job
    generator = torch.Generator().manual_seed(seed)
    features, labels = context.features, job.y_train
    if protocol.tail_divisor > 1:
        kept = []
        for label in range(job.data.num_classes):
            rows = (labels == label).nonzero().flatten()
            if label in context.tail:
                size = max(2, round(len(rows) / protocol.tail_divisor))
                rows = rows[torch.randperm(len(rows), generator=generator)[:size]]
            kept.append(rows)
        thinned = torch.cat(kept)
        context = _thinned(context, thinned)
        features, labels = features[thinned], labels[thinned]
    added = {label: context.need(label, protocol) for label in context.tail}
    added = {label: n for label, n in added.items() if n > 0}
    originals = {label: features[labels == label] for label in added}
    pools = {
        label: METHODS[method](context, label, ceil(job.config.pool_factor * n), generator)
        for label, n in added.items()
    }
    heads = {label: features[labels == label] for label in context.head}
    held = {label: context.held[job.y_held == label] for label in context.head}
    targets = {label: calibrated(heads, held, len(originals[label]), n, seed + label) for label, n in added.items()}
    arms = make_arms(
        originals,
        pools,
        targets,
        added,
        levels=protocol.levels,
        names=protocol.arms,
        seed=seed,
        subset_size=job.config.subset_size or 10,
    )
    judge = Judge(
        features,
        labels,
        (job.features(context.base)[1], job.y_test),
        context.tail,
        job.data.num_classes,
        protocol.classifier,
    )
    add(None, [("none", [], [], judge.accuracy(None, 0.0))])
    real = _real(context, originals, added, generator)
    for share in protocol.shares if protocol.classifier == "balanced" else (None,):
        for name, arm in arms.items():
            chosen = {label: pools[label][rows] for label, rows in arm.rows.items()}
            add(share, [(name, arm.fdg, arm.offset, judge.accuracy(chosen, share or 0.0))])
        if real is not None:
            add(share, [("real", real[1], real[2], judge.accuracy(real[0], share or 0.0))])
    return targets


def _thinned(context: Context, rows: Tensor) -> Context:
    """The context of fewer training samples; the network and everything held out stay."""
    job = copy.copy(context.job)
    job.x_train, job.y_train = job.x_train[rows], job.y_train[rows]
    job.class_counts = torch.bincount(job.y_train, minlength=job.data.num_classes).tolist()
    train, test = job.features(context.base)
    job._features = {context.base.model.backbone: (train[rows], test)}
    made = dataclasses.replace(context, job=job)
    for name in ("held", "spare_features"):
        made.__dict__[name] = getattr(context, name)
    return made


def _real(
    context: Context, originals: dict[int, Tensor], added: dict[int, int], generator: torch.Generator
) -> tuple[dict[int, Tensor], list[float], list[float]] | None:
    """Unseen real samples of every tail class, as many as an arm adds; None where there are not enough."""
    if context.spare_features is None:
        return None
    features, labels = context.spare_features
    chosen, fdg, offset = {}, [], []
    for label, n in added.items():
        own = features[labels == label]
        if len(own) < n:
            return None
        chosen[label] = own[torch.randperm(len(own), generator=generator)[:n]]
        fdg.append(float(feature_diversity_gain(originals[label], chosen[label])))
        offset.append(standardized_offset(originals[label], chosen[label]))
    return chosen, fdg, offset
