"""What the command line can be asked to do: `train`, `run`, `evaluate`; each is also a function for Python users."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ltkernels
from ltkernels.train import data as data_module
from ltkernels.train import rundir
from ltkernels.train.config import Config, from_mapping, read_toml, to_toml
from ltkernels.train.data import DataRequest, Dataset
from ltkernels.train.engine import Progress, predict
from ltkernels.train.features import random_arms, selected_arm
from ltkernels.train.metrics import confusion_matrix, summarize
from ltkernels.train.pipeline import Job, Trained, loss_record
from ltkernels.train.report import render

# What a data set that says nothing gets.
_DEFAULTS: dict[str, float | int] = {"epochs": 30, "batch_size": 64, "lr": 0.05}
# Of summary.json: the chosen loss's numbers are also the run's.
_HEADLINE = ("balanced_accuracy", "top1", "best_balanced_accuracy", "per_class_accuracy", "groups")

Stages = Callable[[Job], tuple[dict[str, Any], dict[str, Any], list[Trained]]]
"""A job's work: the chosen variant's entry, further keys of the summary, and the models to save."""


def load_data(config: Config) -> Dataset:
    """The data set that `config` names, with its profile. Raises ValueError or FileNotFoundError in words."""
    data_dir = Path(config.data_dir).expanduser() if config.data_dir else None
    request = DataRequest("", data_dir, config.imbalance, config.profile, config.data_seed, config.image_size)
    return data_module.load(config.data, request)


def resolve(config: Config, data: Dataset) -> Config:
    """`config` with everything that the data set and the loss leave to decide decided; names are checked here."""
    loss_record(config.loss)
    defaults = {**_DEFAULTS, "threads": torch.get_num_threads(), **data.defaults}
    unset = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return config.replace(device=str(device), **unset)


def environment() -> dict[str, str]:
    """Versions and thread count that a reader needs to repeat the numbers."""
    return {
        "ltkernels": ltkernels.__version__,
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
    progress: Progress | None = None,
    on_config: Callable[[Config], None] | None = None,
) -> dict[str, Any]:
    """One training with `config.loss`; returns the summary and, with `out`, writes the result folder.

    `data` replaces the data set that `config` names. `on_config` gets the settings as resolved before work starts.
    Raises ValueError, TypeError, ImportError or OSError in words for bad settings, missing data and an `out` that is
    taken; nothing has been written then.
    """
    return _execute("train", _train, config, data, out, force, progress, on_config)


def run(
    config: Config,
    data: Dataset | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_config: Callable[[Config], None] | None = None,
) -> dict[str, Any]:
    """The whole pipeline: train with cross-entropy and the chosen loss, complete the tail in feature space, compare.

    Arguments and errors as for `train`. The summary's `variants` are plain cross-entropy, the chosen loss, and three
    classifiers retrained on the features of one of them: on the real ones alone (the control), completed with the
    selected subsets, completed at random.
    """
    return _execute("run", _run, config, data, out, force, progress, on_config)


def _execute(
    command: str,
    stages: Stages,
    config: Config,
    data: Dataset | None,
    out: str | Path | None,
    force: bool,
    progress: Progress | None,
    on_config: Callable[[Config], None] | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    loss_record(config.loss)
    if out is not None:
        rundir.check_free(Path(out), force)
    if data is None:
        data = load_data(config)
    else:
        config = config.replace(data=data.name)
    config = resolve(config, data)
    job = Job(config, data, progress)
    job.check()
    if on_config:
        on_config(config)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _finish(command, stages, job, out, force, start)
    finally:
        torch.set_num_threads(before)


def _finish(
    command: str, stages: Stages, job: Job, out: str | Path | None, force: bool, start: float
) -> dict[str, Any]:
    if out is None:
        return _summary(command, job, *stages(job)[:2], start)
    with rundir.new_folder(Path(out), force) as folder:
        chosen, extra, models = stages(job)
        summary = _summary(command, job, chosen, extra, start)
        rundir.write_text(folder / rundir.CONFIG, to_toml(job.config))
        rundir.write_text(folder / rundir.METRICS, "".join(json.dumps(line) + "\n" for line in job.log))
        rundir.write_json(folder / rundir.SUMMARY, summary)
        rundir.write_text(folder / rundir.REPORT, render(summary, job.log))
        (folder / rundir.CHECKPOINTS).mkdir()
        for trained in models:
            save_checkpoint(folder / rundir.CHECKPOINTS / f"{trained.name}.pt", trained)
    return summary


def _train(job: Job) -> tuple[dict[str, Any], dict[str, Any], list[Trained]]:
    trained = job.train_chosen()
    variant = job.variant(trained, trained.title, [], None)
    return variant, {"variants": [variant]}, [trained]


def _run(job: Job) -> tuple[dict[str, Any], dict[str, Any], list[Trained]]:
    config = job.config
    plain = job.train_plain()
    chosen = plain if job.is_plain() else job.train_chosen()
    models = [plain] if chosen is plain else [plain, chosen]
    variants = [job.variant(t, t.title, [], None) for t in models]

    base = chosen if config.features_from == "loss" else plain
    head, tail = job.complete(base)
    selected = selected_arm(config)
    control = job.retrain(base, "retrained", [], None)
    models.append(control)
    variants.append(job.variant(control, "classifier retrained, no augmentation", [], None))
    if selected not in random_arms(config):
        completed = job.retrain(base, f"fdc-{selected.replace(':', '-')}", tail, selected)
        models.append(completed)
        variants.append(job.variant(completed, f"FDC, subsets by FDG ({selected})", tail, selected))
    repeats = []
    for arm in random_arms(config):
        trained = job.retrain(base, "fdc-random" if arm == "random-0" else f"fdc-{arm}", tail, arm)
        entry = job.variant(trained, "FDC, random samples", tail, arm)
        repeats.append({"balanced_accuracy": entry["balanced_accuracy"], "fdg_tail": entry["fdg_tail"]})
        if arm == "random-0":
            models.append(trained)
            variants.append(entry)
    extra = {
        "variants": variants,
        "random_repeats": repeats,
        "tail": {
            "features_from": base.name,
            "selected": selected,
            "head_classes": head,
            "classes": [t.to_dict() for t in tail],
        },
    }
    return variants[models.index(chosen)], extra, models


def _summary(command: str, job: Job, chosen: dict[str, Any], extra: dict[str, Any], start: float) -> dict[str, Any]:
    data = job.data
    return {
        "command": command,
        **{key: chosen[key] for key in _HEADLINE},
        "chosen": chosen["name"],
        "class_counts": data.class_counts,
        "class_names": list(data.class_names),
        "test_counts": torch.bincount(data.y_test, minlength=data.num_classes).tolist(),
        "seconds": time.perf_counter() - start,
        "seed": job.config.seed,
        "config": job.config.to_dict(),
        "environment": environment(),
        **extra,
    }


def save_checkpoint(path: Path, trained: Trained) -> None:
    """Plain tensors and strings, so that torch.load(weights_only=True) reads them; written whole or not at all."""
    partial = path.with_suffix(".partial")
    state = {key: value.cpu() for key, value in trained.model.state_dict().items()}
    torch.save({"format": 1, "loss": trained.record.name, "state": state}, partial)
    partial.replace(path)


def evaluate(run_dir: str | Path, data: Dataset | None = None) -> list[dict[str, Any]]:
    """Evaluate a result folder's checkpoints again: each variant's metrics, with `recorded_balanced_accuracy`.

    `data` replaces the data set that the folder's config.toml names. Raises FileNotFoundError or ValueError naming the
    file.
    """
    run_dir = Path(run_dir)
    summary = rundir.read_summary(run_dir)
    config = from_mapping(read_toml(run_dir / rundir.CONFIG), str(run_dir / rundir.CONFIG))
    data = data if data is not None else load_data(config)
    job = Job(resolve(config, data), data, None)
    results = []
    for variant in summary["variants"]:
        path = run_dir / rundir.CHECKPOINTS / f"{variant['name']}.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        try:
            saved = torch.load(path, map_location=job.config.device, weights_only=True)
            model = job.build(loss_record(saved["loss"]))
            model.load_state_dict(saved["state"])
        except Exception as error:  # torch.load of a damaged file raises whatever its parser meets: struct.error, ...
            raise ValueError(f"{path}: not a checkpoint of this run: {str(error).splitlines()[0]}") from error
        confusion = confusion_matrix(job.y_test, predict(model, job.x_test), data.num_classes).cpu()
        scores = summarize(confusion, data.class_counts)
        recorded = {"fdg_tail": variant["fdg_tail"], "recorded_balanced_accuracy": variant["balanced_accuracy"]}
        results.append({"name": variant["name"], **scores, **recorded})
    return results


def rebuild_report(run_dir: str | Path) -> Path:
    """Write report.html of a result folder anew from its summary.json and metrics.jsonl; returns its path."""
    run_dir = Path(run_dir)
    path = run_dir / rundir.REPORT
    rundir.write_text(path, render(rundir.read_summary(run_dir), rundir.read_metrics(run_dir)))
    return path
