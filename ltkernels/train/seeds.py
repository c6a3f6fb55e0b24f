"""Several trainings of one recipe: seeds, each a result folder of its own below one with means and deviations, or folds of the data."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ltkernels.train import distributed, jobs, rundir, signals
from ltkernels.train.config import Config, to_toml
from ltkernels.train.data import Dataset, k_fold
from ltkernels.train.engine import Progress

# Of a variant's entry: fractions that are averaged over the seeds, with their deviation.
_AVERAGED = (
    *("top1", "balanced_accuracy", "balanced_accuracy_se", "best_balanced_accuracy", "fdg_tail"),
    *("g_mean", "harmonic_mean", "macro_f1", "ece", "classifier_norm_variance", "tau", "relative_accuracy"),
)
# What is averaged or added place by place; titles are equal.
_COMBINED: dict[Callable[[Iterable[Any]], Any], tuple[str, ...]] = {
    mean: ("per_class_accuracy", "classifier_norms"),
    sum: ("confusion", "reliability", "seconds", "evaluation_seconds"),
}


def run_seeds(
    command: str,
    config: Config,
    seeds: Sequence[int],
    data: Dataset | None = None,
    *,
    out: str | Path,
    force: bool = False,
    resume: str = "never",
    progress: Progress | None = None,
    on_config: Callable[[Config], None] | None = None,
    on_notes: Callable[[Sequence[str]], None] | None = None,
) -> dict[str, Any]:
    """`train` or `run` (`command`) once for every seed, into `out`/seed-N; the summary above them has the means.

    In `out`/summary.json a variant's numbers are means over the seeds, `std` holds their standard deviations (n - 1), and
    `confusion` is the sum; `runs` lists every seed's. The data and its split stay the same (`data_seed`). Errors and
    `resume` as in `jobs.train`: seeds that are finished are not run again.
    """
    if len(set(seeds)) != len(seeds) or len(seeds) < 2 or min(seeds) < 0:
        raise ValueError(f"seeds must be at least two different numbers >= 0, got {','.join(map(str, seeds))}")
    distributed.refuse("a run of several seeds")
    job = {"train": jobs.train, "run": jobs.run}[command]
    start, out = time.perf_counter(), Path(out)
    head = f"# ltkernels {command}, seeds {','.join(map(str, seeds))}\n"
    rundir.check_free(out, force, resume == "auto")
    begun = out / rundir.CONFIG
    if resume == "auto" and begun.is_file():
        if not (text := begun.read_text(encoding="utf-8")).startswith(head):
            raise ValueError(f"--resume: {out} was begun with {text.partition(chr(10))[0]!r}")
        if summary := rundir.finished(out):
            return summary
    # The settings are checked before the folder is touched.
    # Loaded once for all seeds; under this name, the settings of each go on naming what was asked for.
    data = dataclasses.replace(jobs.load_data(config), name=config.data) if data is None else data
    config = jobs.resolve(config, data)
    if on_notes:
        on_notes(data.notes)
    if on_config:
        on_config(config)
    with rundir.open_run(out, force, resume == "auto"), signals.handled():
        rundir.write_text(out / rundir.CONFIG, head + to_toml(config))
        summaries = []
        for seed in seeds:
            told = {"out": out / f"seed-{seed}", "resume": "auto", "progress": _named(progress, f"seed {seed}")}
            summaries.append(job(config.replace(seed=seed), data, **told))
        summary = combine(summaries, time.perf_counter() - start)
        logs = [rundir.read_metrics(out / f"seed-{seed}") for seed in seeds]
        lines = [{"seed": seed, **record} for seed, log in zip(seeds, logs) for record in log]
        rundir.write_text(out / rundir.METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        rundir.write_text(out / rundir.REPORT, jobs.render_page(summary, logs[0]))
        rundir.write_json(out / rundir.SUMMARY, summary)
    return summary


def cross_validate(
    config: Config,
    data: Dataset | None = None,
    *,
    folds: int = 5,
    out: str | Path | None = None,
    force: bool = False,
    resume: str = "never",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`train` on every fold of the training set (see `data.k_fold`; `config.data_seed` draws them): the test set stays unread.

    Returns a summary as `run_seeds` does: means over the folds, `std` their standard deviations, `confusion` the sum over all of
    them, `runs` a list of every fold's numbers. With `out`, fold N is a result folder `out`/fold-N. Errors and `resume` as in
    `jobs.train`.
    """
    start = time.perf_counter()
    data = jobs.load_data(config, progress) if data is None else data
    parts = list(k_fold(data, folds, config.data_seed))
    summaries = []
    for i, part in enumerate(parts):
        place = None if out is None else Path(out) / f"fold-{i}"
        told = {"out": place, "force": force, "resume": resume, "progress": _named(progress, f"fold {i}")}
        summaries.append(jobs.train(config, part, **told))
    summary = combine(summaries, time.perf_counter() - start)
    del summary["seeds"]
    for i, run in enumerate(summary["runs"]):
        run["fold"] = i
    return {**summary, "folds": folds, "notes": list(parts[0].notes)}


def _named(progress: Progress | None, whose: str) -> Progress | None:
    """A progress whose phases are those of one seed or fold."""
    if progress is None:
        return None

    def named(phase: str, *now: Any) -> None:
        progress(f"{whose} {phase}", *now)

    if hasattr(progress, "step"):
        named.step = lambda phase, *now: progress.step(f"{whose} {phase}", *now)
    return named


def combine(summaries: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """One summary from those of several seeds, in the form of a single one."""
    first = summaries[0]
    variants = [_averaged([s["variants"][i] for s in summaries]) for i in range(len(first["variants"]))]
    chosen = next(v for v in variants if v["name"] == first["chosen"])
    runs = []
    for s in summaries:
        brief = [{key: v[key] for key in ("name", *_AVERAGED) if key in v} for v in s["variants"]]
        runs.append({"seed": s["seed"], "variants": brief})
    return {
        **first,
        **{key: chosen[key] for key in jobs.HEADLINE},
        "std": chosen["std"],
        "variants": variants,
        # One seed's mean over its draws: draws of one seed share a network and pools, and count as one.
        "repeats": {mode: [_over(mean, s["repeats"][mode]) for s in summaries] for mode in first.get("repeats", {})},
        "seconds": seconds,
        "seeds": [s["seed"] for s in summaries],
        "runs": runs,
        "checkpoints": {},
        "balanced_run": None,
    }


def _over(combined: Callable[[Iterable[Any]], Any], values: Sequence[Any]) -> Any:
    """`combined` of numbers, or of every place of lists and dictionaries of one form; None where one of them is."""
    if None in values:
        return None
    if isinstance(values[0], dict):
        return {key: _over(combined, [value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [_over(combined, cells) for cells in zip(*values)]
    return combined(values)


def _averaged(variants: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean entry of one variant over the seeds, with `std` for what varies."""
    entry = dict(variants[0])
    entry["std"] = {}
    # Every seed's tau has its own curve on its own held-out samples; they are in the seeds' summaries.
    entry.pop("tau_on_held_out", None)
    entry.pop("epoch", None)
    for key in _AVERAGED:
        values: list[Any] = [v.get(key) for v in variants]
        if None not in values:
            entry[key] = mean(values)
            entry["std"][key] = stdev(values)
    for combined, keys in _COMBINED.items():
        entry |= {key: _over(combined, [v[key] for v in variants]) for key in keys if all(key in v for v in variants)}
    # Of the averaged accuracies, not of any one seed.
    worst = min(range(len(entry["per_class_accuracy"])), key=entry["per_class_accuracy"].__getitem__)
    entry["worst_class"] = {"label": worst, "accuracy": entry["per_class_accuracy"][worst]}
    for name, group in variants[0]["groups"].items():
        found = {key: _over(mean, [v["groups"][name][key] for v in variants]) for key in ("accuracy", "se")}
        entry["groups"] = {**entry["groups"], name: {**group, **found}}
    return entry
