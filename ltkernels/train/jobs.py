"""What the command line can be asked to do: `train`, `run`, `evaluate`; each is also a function for Python users."""

import hashlib
import importlib.util
import json
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ltkernels
from ltkernels._files import commit
from ltkernels.selection._arms import arm_name
from ltkernels.train import data as data_module
from ltkernels.train import distributed, rundir, signals, stage2
from ltkernels.train.checkpoint import PhaseStore
from ltkernels.train.config import Config, from_mapping, read_toml, to_toml
from ltkernels.train.data import DataRequest, Dataset
from ltkernels.train.data._lazy import LazySamples
from ltkernels.train.engine import Progress
from ltkernels.train.features import TailClass, tail_mean
from ltkernels.train.logs import Callback, Journal, named, require
from ltkernels.train.metrics import summarize
from ltkernels.train.pipeline import Job
from ltkernels.train.recipe import Own
from ltkernels.train.relative import add_relative, balanced_twin
from ltkernels.train.schedules import loss_record
from ltkernels.train.tables import write_tables
from ltkernels.train.trained import Trained, load_saved, save_checkpoint

# What a data set that says nothing gets.
_DEFAULTS: dict[str, float | int | bool] = {
    "epochs": 30, "batch_size": 64, "lr": 0.05, "crop": 0, "flip": False, "weight_decay": 5e-4,
}  # fmt: skip
RESUME = ("never", "auto")
# Settings that change no number: a run may go on with others.
_FREE_ON_RESUME = {"data_dir", "checkpoint_seconds", "log", "cache", "workers"}
# Of summary.json: the chosen loss's numbers are also the run's.
HEADLINE = ("balanced_accuracy", "top1", "best_balanced_accuracy", "per_class_accuracy", "groups")

Stages = Callable[[Job], tuple[dict[str, Any], dict[str, Any], list[Trained]]]
"""A job's work: the chosen variant's entry, further keys of the summary, and the models to save."""


@dataclass(frozen=True)
class Order:
    """What `train` and `run` take beside settings and data."""

    out: str | Path | None
    force: bool
    resume: str
    progress: Progress | None
    on_config: Callable[[Config], None] | None
    on_notes: Callable[[Sequence[str]], None] | None
    own: Own = Own()  # noqa: RUF009 (frozen)
    callbacks: Sequence[Callback] = ()


def load_data(config: Config, progress: Progress | None = None) -> Dataset:
    """The data set that `config` names, with its profile. Raises ValueError or FileNotFoundError in words."""
    data_dir, cache = (Path(path).expanduser() if path else None for path in (config.data_dir, config.cache))
    request = DataRequest(
        data_dir=data_dir,
        imbalance=config.imbalance,
        profile=config.profile,
        seed=config.data_seed,
        image_size=config.image_size,
        test_split=config.test_split,
        cache=cache,
        workers=config.workers,
        progress=progress,
    )
    return data_module.load(config.data, request)


def vector_defaults(samples: int) -> dict[str, float | int | str]:
    """For tables, and for features that somebody else's network made: what a regularised linear model does, and more where there
    is more. At least a thousand steps, and the decay of scikit-learn's logistic regression: one over the number of samples, and none of
    biases, which stand for how frequent the classes are."""
    batch_size = 16 if samples < 1000 else 64
    epochs = max(20, -(-1000 * batch_size // samples))
    return {
        "model": "wide",
        "batch_size": batch_size,
        "epochs": epochs,
        "lr": 0.02,
        "weight_decay": max(5e-4, 1 / samples),
        "decay": "weights",
    }


def resolve(config: Config, data: Dataset) -> Config:
    """`config` with everything that the data set and the loss leave to decide decided; names are checked here."""
    loss_record(config.loss)
    defaults = {**_DEFAULTS, "threads": torch.get_num_threads(), "model": "cnn", **data.defaults}
    if len(data.input_shape) == 1 and config.model is None:
        defaults = {**_DEFAULTS, "threads": defaults["threads"], **vector_defaults(len(data.y_train)), **data.defaults}
    if config.optimizer == "adamw":
        defaults["lr"] = 1e-3
    if config.freeze or config.resized_crop:
        defaults |= {"crop": 0} if config.resized_crop else {"crop": 0, "flip": False}
    unset = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    unset |= {"pretrain_epochs": config.pretrain_epochs or config.epochs or defaults["epochs"]}
    try:
        device = torch.device(distributed.local_device(config.device))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    config = config.replace(device=str(device), **unset)
    if config.warmup is not None and config.warmup >= config.epochs:
        raise ValueError(f"warmup {config.warmup:g} is not below the number of epochs, {config.epochs}")
    return config


def _check(command: str, config: Config, data: Dataset, order: Order) -> list[str]:
    """Raise now what a phase would raise after another has taken its time; returns sentences on what is done to the data."""
    job = Job(config, data, own=order.own)
    job.check()
    stage2.check(job)
    require(config.log)
    for package in ("jinja2", "matplotlib", *(("scipy",) if command == "run" else ())) if order.out is not None else ():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'the report needs {package}: pip install "ltkernels[train]"')
    if command == "run" and config.init:
        raise ValueError("init goes on from one model; run compares trainings from one start: use train")
    if (command == "run" or config.stage2 == "fdc") and importlib.util.find_spec("faiss") is None:
        what = "run" if command == "run" else "stage2 fdc"
        raise ImportError(f'{what} selects subsets with FAISS: pip install "ltkernels[select]"')
    return [*data.notes, *job.notes]


def environment() -> dict[str, str | None]:
    """Versions and thread count that a reader needs to repeat the numbers."""
    return {
        "ltkernels": ltkernels.__version__,
        "commit": commit(Path(ltkernels.__file__).parent.parent),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def train(
    config: Config,
    data: Dataset | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    resume: str = "never",
    progress: Progress | None = None,
    on_config: Callable[[Config], None] | None = None,
    on_notes: Callable[[Sequence[str]], None] | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None = None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """One training with `config.loss` and what `stage2` and `post_hoc` add; returns the summary and, with `out`, writes the
    result folder.

    `data` replaces the data set that `config` names. `on_config` gets the settings as resolved before work starts,
    `on_notes` sentences on what was done to the data.
    `optimizer(groups)`, `scheduler(optimizer, steps)`, stepped after each step, and `transform(images)`, a batch of standardised
    samples, replace what the settings name (`recipe.Own`); their states are in the checkpoints, they themselves must be given
    again to resume. `callbacks` are told what happens (`logs.Callback`).
    `resume="auto"` goes on with an unfinished run in `out`, to the same numbers, and returns the summary of a finished
    one; where there is none it starts. Raises ValueError, TypeError, ImportError or OSError in words for bad settings,
    missing data and an `out` that is taken (nothing has been written then), and `signals.Stopped`, a KeyboardInterrupt,
    when SIGINT or SIGTERM stopped it with a checkpoint in `out`.

    Custom data are two lines, and one flag afterwards (`Config(data="mine")`, or `--data npz:FILE` for arrays in a file):

        train.data.register("mine", lambda request: train.data.Dataset.from_arrays(x, y, x_test, y_test))
        train.train(train.Config(data="mine", loss="ldam"), out="results")
    """
    own = Own(optimizer, scheduler, transform)
    order = Order(out, force, resume, progress, on_config, on_notes, own, callbacks)
    return _execute("train", _train, config, data, order)


def run(
    config: Config,
    data: Dataset | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    resume: str = "never",
    progress: Progress | None = None,
    on_config: Callable[[Config], None] | None = None,
    on_notes: Callable[[Sequence[str]], None] | None = None,
) -> dict[str, Any]:
    """The whole pipeline: train with cross-entropy and the chosen loss, complete the tail in feature space, compare.

    Arguments and errors as for `train`, and `resume` likewise. The summary's `variants` are plain cross-entropy, the chosen loss, and three
    classifiers retrained on the features of one of them: on the real ones alone (the control), completed with the
    selected subsets, completed at random.
    """
    return _execute("run", _run, config, data, Order(out, force, resume, progress, on_config, on_notes))


def _execute(command: str, stages: Stages, config: Config, data: Dataset | None, order: Order) -> dict[str, Any]:
    start = time.perf_counter()
    loss_record(config.loss)
    if order.resume not in RESUME:
        raise ValueError(f"resume must be one of {', '.join(RESUME)}, got {order.resume!r}")
    if config.log != "none" and order.out is None:
        raise ValueError(f"log {config.log} writes into the result folder: give out")
    with distributed.joined(distributed.local_device(config.device)) as world, ExitStack() as stack:
        if not world.is_main:
            # One process writes and speaks; the others compute.
            order = replace(order, out=None, progress=None, on_config=None, on_notes=None, callbacks=())
        out, resumes = None if order.out is None else Path(order.out), order.resume == "auto"
        if out is not None:
            rundir.check_free(out, order.force, resumes)
        if data is None:
            data = load_data(config, order.progress)
        else:
            config = config.replace(data=data.name)
        asked, config = config, resolve(config, data)
        notes = _check(command, config, data, order)
        if order.on_notes:
            order.on_notes(notes)
        if order.on_config:
            order.on_config(config)
        goes_on = resumes and out is not None and (out / rundir.CONFIG).is_file()
        if goes_on:
            _check_settings(out, command, config, asked)
        if summary := world.share(rundir.finished(out) if goes_on else None):
            return summary
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.threads)
        journal = Journal(order.progress, order.callbacks)
        if out is not None:
            stack.enter_context(rundir.open_run(out, order.force, resumes))
            stop = stack.enter_context(signals.handled())
            rundir.write_text(out / rundir.CONFIG, f"# ltkernels {command}\n{to_toml(config)}")
            state, fingerprint = out / rundir.STATE, _fingerprint(command, config, data, order.own)

            def store(phase: str) -> PhaseStore:
                return PhaseStore(state, phase, fingerprint, config.checkpoint_seconds)

            journal = Journal(order.progress, [*named(config.log, out), *order.callbacks], out, store, stop)
        end = stack.enter_context(journal.told(config.to_dict()))
        journal.rewrite()
        summary = _carry_out(command, stages, Job(config, data, journal, own=order.own), out, start)
        end(summary)
        return summary


def _carry_out(command: str, stages: Stages, job: Job, out: Path | None, start: float) -> dict[str, Any]:
    """The work, and what it leaves in the result folder where there is one."""
    data = job.data
    try:
        chosen, extra, models = stages(job)
    except (ValueError, TypeError) as error:
        if out is None or not job.trained:
            raise
        names = ", ".join(f"{name}.pt" for name in _save(out, job, job.trained))
        raise type(error)(f"{error} (what was trained is kept: {out / rundir.CHECKPOINTS}, {names})") from error
    if out is not None:
        job.journal.rewrite()
        extra["checkpoints"] = _save(out, job, models)
        write_tables(out / rundir.TABLES, job, next(t for t in models if t.name == chosen["name"]))
    summary = {
        "command": command,
        **{key: chosen[key] for key in HEADLINE},
        "chosen": chosen["name"],
        "class_counts": data.class_counts,
        "class_names": list(data.class_names),
        "test_counts": torch.bincount(data.y_test, minlength=data.num_classes).tolist(),
        "seconds": time.perf_counter() - start + job.journal.seconds,
        "seed": job.config.seed,
        "notes": list(data.notes) + job.notes,
        "config": job.config.to_dict(),
        "environment": environment(),
        **extra,
    }
    if out is not None:
        rundir.write_text(out / rundir.REPORT, render_page(summary, job.journal.records))
        # Last: a folder with a summary is a finished run.
        rundir.write_json(out / rundir.SUMMARY, summary)
    return summary


def _save(out: Path, job: Job, models: Sequence[Trained]) -> dict[str, str]:
    """Write the models' checkpoints; returns their checksums by name."""
    folder = out / rundir.CHECKPOINTS
    folder.mkdir(exist_ok=True)
    return {t.name: save_checkpoint(folder, t, job.config, job.data, job.class_counts) for t in models}


def _fingerprint(command: str, config: Config, data: Dataset, own: Own) -> str:
    """What must be equal for a checkpoint to be resumed: the command, the settings that decide numbers, and the data; files of
    weights by their content, objects of the user's by their presence."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _FREE_ON_RESUME}
    digest = hashlib.sha256(json.dumps([command, settings, list(data.class_names)], sort_keys=True).encode())
    digest.update(str([name for name, part in vars(own).items() if part is not None]).encode())
    paths = [Path(name).expanduser() for name in (config.weights, config.head_init) if name]
    for path in (*paths, *sorted(Path(config.model.removeprefix("hf:")).expanduser().glob("*.safetensors"))):
        if path.is_file():
            digest.update(f"{zlib.crc32(path.read_bytes()):08x}".encode())
    validation = () if data.x_val is None else (data.x_val, data.y_val)
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test, *validation):
        if isinstance(tensor, LazySamples):
            digest.update(tensor.digest())
            continue
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{array.dtype}{array.shape}{zlib.crc32(array.reshape(-1).view(np.uint8)):08x}".encode())
    return digest.hexdigest()


def _check_settings(out: Path, command: str, config: Config, asked: Config) -> None:
    """Raise ValueError naming what differs between the run in `out` and what is asked for now."""
    path = out / rundir.CONFIG
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    if first != f"# ltkernels {command}":
        raise ValueError(f"--resume: {out} was begun by {first.lstrip('# ')[:80]!r}, not 'ltkernels {command}'")
    begun, now = from_mapping(read_toml(path), str(path)).to_dict(), config.to_dict()
    free = _FREE_ON_RESUME | (set() if "rotation" in (begun["pretrain"], now["pretrain"]) else {"pretrain_epochs"})
    changed = [k for k in now if begun[k] != now[k] and k not in free]
    if changed:
        # What only follows from other settings was never given.
        named = [k for k in changed if getattr(asked, k) is not None] or changed
        words = ", ".join(f"{k} {begun[k]!r} (now {now[k]!r})" for k in named)
        more = ""
        if command == "train" and (out / rundir.SUMMARY).is_file():
            more = f"; it is finished: --init {out} with another --out goes on from its model"
        raise ValueError(f"--resume: {out} was begun with {words}; --force starts anew{more}")


def _train(job: Job) -> tuple[dict[str, Any], dict[str, Any], list[Trained]]:
    # Loaded first: what is missing must not come out after the training.
    twin = None
    if job.config.relative:
        try:
            source = load_data(job.config.replace(imbalance=1.0))
        except ValueError as error:
            raise ValueError(
                f"relative: {job.config.data} cannot be spread evenly over its classes: {error}"
            ) from error
        twin = balanced_twin(job.data, source, job.config)
    base = job.train_chosen()
    models = [base, *stage2.follow(job, base)]
    last = len(models) - 1
    models += job.best
    variants = [job.variant(trained) for trained in models]
    extra = {"variants": variants, "features": job.feature_space(base)}
    if twin is not None:
        extra["balanced_run"] = add_relative(job, twin, variants)
    return variants[last], extra, models


_SELECTIONS = {
    "random": "random samples",
    "mean": "real mean kept (mean)",
    "match": "real mean kept, FDG capped (match)",
    "max": "greedy, largest FDG (max)",
    "min": "greedy, smallest FDG (min)",
}


def _run(job: Job) -> tuple[dict[str, Any], dict[str, Any], list[Trained]]:
    config = job.config
    plain = job.train_plain()
    chosen = plain if job.is_plain() else job.train_chosen()
    models = [plain] if chosen is plain else [plain, chosen]
    models += stage2.follow(job, chosen)
    last = len(models) - 1
    models += job.best

    base = chosen if config.features_from == "loss" else plain
    # Beside the chosen selection, random draws and the paper's: as many draws of each, from the same pools.
    modes = list(dict.fromkeys([config.select, "max", "random"]))
    head, tail = job.complete(base, compared=modes)
    models.append(job.augmented(base, "retrained", [], None, title="classifier retrained, no augmentation"))
    repeats: dict[str, list[dict[str, float | None]]] = {mode: [] for mode in modes}
    for mode in modes:
        title = f"FDC, {_SELECTIONS.get(mode, f'selected by {mode}')}"
        for number in range(config.random_repeats):
            arm = arm_name(mode, number)
            trained = job.augmented(base, f"fdc-{arm if number else mode}".replace(":", "-"), tail, arm, title=title)
            repeats[mode].append(_repeat(job, trained, tail, arm))
            if number == 0:
                models.append(trained)
    variants = [job.variant(trained) for trained in models]
    extra = {
        "variants": variants,
        "repeats": repeats,
        "features": job.feature_space(base),
        "tail": {
            "features_from": base.name,
            "selected": arm_name(config.select),
            "head_classes": head,
            "classes": [t.to_dict() for t in tail],
        },
    }
    return variants[last], extra, models


def _repeat(job: Job, trained: Trained, tail: Sequence[TailClass], arm: str) -> dict[str, float | None]:
    """What the comparison of selections keeps of one draw; None where no class was completed."""
    scores = summarize(trained.fit.confusion, job.data.class_counts)
    recalls = [scores["per_class_accuracy"][t.label] for t in tail]
    return {
        "balanced_accuracy": scores["balanced_accuracy"],
        "fdg_tail": trained.note["fdg_tail"],
        "tail_accuracy": sum(recalls) / len(recalls) if recalls else None,
        "offset_tail": tail_mean(tail, arm, "offset"),
    }


def evaluate(run_dir: str | Path, data: Dataset | None = None) -> list[dict[str, Any]]:
    """Evaluate a result folder's checkpoints again: each variant's metrics, with `recorded_balanced_accuracy`.

    `data` replaces the data set that the folder's config.toml names. Raises FileNotFoundError or ValueError naming the
    file.
    """
    run_dir = Path(run_dir)
    summary = rundir.read_summary(run_dir)
    if "seeds" in summary:
        with rundir.judged(run_dir / rundir.SUMMARY):
            first = int(summary["seeds"][0])
        raise ValueError(f"{run_dir} holds several seeds; evaluate {run_dir / 'seed-'}{first}, ...")
    config = from_mapping(read_toml(run_dir / rundir.CONFIG), str(run_dir / rundir.CONFIG))
    data = data if data is not None else load_data(config)
    with rundir.judged(run_dir / rundir.CONFIG):
        job = Job(resolve(config, data), data)
    results = []
    for variant in summary["variants"]:
        with rundir.judged(run_dir / rundir.SUMMARY):
            name, fdg, recorded = variant["name"], variant["fdg_tail"], float(variant["balanced_accuracy"])
        saved = load_saved(run_dir, name, job.config.device)
        if (saved.preprocessing.input_shape, len(saved.class_names)) != (data.input_shape, data.num_classes):
            raise ValueError(
                f"{run_dir / rundir.CHECKPOINTS / name}.pt: the model takes samples of {saved.preprocessing.input_shape} in "
                f"{len(saved.class_names)} classes, the data has {data.input_shape} in {data.num_classes}"
            )
        scores = summarize(job.confusion(saved.classifier), data.class_counts)
        results.append({"name": name, **scores, "fdg_tail": fdg, "recorded_balanced_accuracy": recorded})
    return results


def rebuild_report(run_dir: str | Path, png: str | Path | None = None) -> Path:
    """Write report.html of a result folder anew from its summary.json and metrics.jsonl, and its charts as PNG files into the
    folder `png` where there is one; returns the page's path."""
    run_dir = Path(run_dir)
    path = run_dir / rundir.REPORT
    if png is not None:
        rundir.check_parents(Path(png), "--png", folder=True)
    summary, records = rundir.read_summary(run_dir), rundir.read_metrics(run_dir)
    with rundir.judged(run_dir):
        if "seeds" in summary:  # of several seeds, the curves are those of the first
            first = summary["seeds"][0]
            records = [{k: v for k, v in r.items() if k != "seed"} for r in records if r["seed"] == first]
        page = render_page(summary, records)
        if png is not None:
            from ltkernels.train.report import save_pngs

            save_pngs(summary, records, Path(png))
    rundir.write_text(path, page)
    return path


def render_page(summary: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """report.html. Drawing is imported where something is drawn: a second that no other command pays."""
    from ltkernels.train.report import render

    return render(summary, records)
