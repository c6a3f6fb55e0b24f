"""The command line: parses, calls the library, prints.

Exit codes: 0 done, 1 a bug, 2 bad input (a full disk and a folder in use too); 130 and 143 stopped by SIGINT or SIGTERM,
128 plus the signal's number as shells count, with a state in --out that `--resume auto` continues.

With LTKERNELS_TRACEBACK=1 in the environment, errors that are reported in one line keep their traceback.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ltkernels

# The trainer is imported inside the functions: `ltkernels doctor` must work where scikit-learn and faiss do not.

_OPTIONAL = {
    "numpy": "numpy",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "triton": "triton",
}
_SELECT_SETTINGS = (
    "seed", "select", "head_ratio", "pool_factor", "subset_size", "similarity", "shrinkage", "random_repeats",
)  # fmt: skip
# What a study that fixes loss and recipe leaves to choose.
_EXPERIMENT_SETTINGS = (
    "data_dir", "imbalance", "profile", "data_seed", "image_size", "model", "epochs", "batch_size", "lr", "weight_decay", "seed",
    "device", "threads", "holdout", "head_ratio", "pool_factor", "subset_size", "similarity", "shrinkage", "retrain_epochs",
    "retrain_lr", "checkpoint_seconds",
)  # fmt: skip
_RESUME: dict[str, Any] = {
    "choices": ("never", "auto"),
    "default": "never",
    "help": "auto: continue the unfinished run in --out, to the same numbers; start where there is none",
}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        # An abbreviated flag would change its meaning when a flag with the same beginning is added.
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        # argparse prints the usage first; the promise is one line.
        self.exit(2, f"ltkernels: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ltkernels", description="Long-tailed recognition: train, select augmented data, report.")
    parser.add_argument("--version", action="version", version=f"ltkernels {ltkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    run = commands.add_parser("run", help="the whole pipeline: two trainings, FDG selection, retraining, report")
    train = commands.add_parser("train", help="one training")
    select = commands.add_parser("select", help="select synthetic tail features for features of your own")
    select.add_argument(
        "features",
        type=Path,
        metavar="FEATURES.npz",
        help="arrays features (n, d) and labels (n,), and pool and pool_labels if you have them; or features as .npy",
    )
    select.add_argument("--labels", type=Path, metavar="LABELS.npy", help="the labels of an .npy file of features")
    select.add_argument("--classes", type=int, nargs="+", metavar="C", help="complete these (default: the tail)")
    select.add_argument("--m", type=int, help="subsets to pick per class (default: up to the largest class)")
    select.add_argument(
        "--mode", help="max, min, quantile:Q, target:X, target:LOW:HIGH or random (default: what --select says)"
    )
    select.add_argument("--sets", type=int, default=0, help="also this many sets of uniformly spaced FDG (default: 0)")
    for command in (run, train):
        _add_settings(command, None)
    _add_settings(select, _SELECT_SETTINGS)
    for command, default in ((run, None), (train, None), (select, "selection")):
        command.add_argument("--out", type=Path, default=default, help="result folder")
        command.add_argument("--force", action="store_true", help="replace the results in an existing --out")
        command.add_argument("--config", type=Path, help="TOML file of settings; flags win")
        command.add_argument("--quiet", action="store_true", help="print nothing but errors")
    for command in (run, train):
        command.add_argument("--preset", help="settings of a published recipe; --config and flags win")
        command.add_argument("--seeds", type=_seeds, help="several seeds, as 0,1,2: one run each, means and deviations")
        command.add_argument("--resume", **_RESUME)

    experiment = commands.add_parser("experiment", help="whole studies in one command: fdg")
    experiment.add_argument(
        "name", choices=("fdg",), help="fdg: does the FDG of added tail samples decide the accuracy?"
    )
    _add_settings(experiment, _EXPERIMENT_SETTINGS)
    experiment.add_argument("--data", default="digits-lt", help="data sets, as digits-lt,fashion-mnist-lt")
    experiment.add_argument(
        "--methods", default="remix,cmo,ofa,fdc", help="remix, cmo, ofa, fdc, smote (default: the first four)"
    )
    experiment.add_argument("--levels", type=int, default=7, help="uniformly spaced FDG values (default: 7)")
    experiment.add_argument("--sets", type=int, default=5, help="sets at every level (default: 5)")
    experiment.add_argument("--processes", type=int, help="sets worked on side by side (default: by the cores)")
    experiment.add_argument("--out", type=Path, default=Path("runs/experiment-fdg"), help="result folder")
    experiment.add_argument("--force", action="store_true", help="replace the results in an existing --out")
    experiment.add_argument("--config", type=Path, help="TOML file of settings; flags win")
    experiment.add_argument("--quiet", action="store_true", help="print nothing but errors")
    experiment.add_argument("--resume", **_RESUME)

    evaluate = commands.add_parser("evaluate", help="evaluate a run's checkpoints again")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report = commands.add_parser("report", help="build a run's report.html again")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("--png", type=Path, metavar="DIR", help="also write the charts as PNG files to this folder")
    audit = commands.add_parser("audit", help="counts, diversity, suspected label errors and drift of your features")
    audit.add_argument("features", type=Path, metavar="FEATURES.npz", help="arrays features (n, d) and labels (n,)")
    audit.add_argument("--against", type=Path, metavar="OTHER.npz", help="a second set, to look for drift")
    audit.add_argument("--out", type=Path, default=Path("audit.html"), help="the page (default: audit.html)")
    audit.add_argument("--force", action="store_true", help="replace an existing --out")
    bench = commands.add_parser("bench", help="time the kernels against their peers")
    bench.add_argument("family", choices=("losses", "heads", "selection"))
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own flags; try --help")
    commands.add_parser("doctor", help="which back ends and optional packages are there, and why")
    return parser


def _add_settings(parser: argparse.ArgumentParser, only: Sequence[str] | None) -> None:
    """A flag per setting of `Config`; a flag that is not given stays out of the namespace."""
    from ltkernels.train.config import Config, kind_of, spelled

    for item in fields(Config):
        if only is not None and item.name not in only:
            continue
        text = item.metadata["help"]
        if item.default not in (None, ""):
            text += f" (default: {item.default})"
        flag = f"--{item.name.replace('_', '-')}"
        shared = {"dest": item.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        choices = item.metadata.get("choices")
        if kind_of(item) is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif choices:
            parser.add_argument(flag, type=partial(spelled, choices=choices), choices=choices, **shared)
        else:
            parser.add_argument(flag, type=kind_of(item), metavar=item.name.upper(), **shared)


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _config(arguments: argparse.Namespace) -> Any:
    from ltkernels.train.config import Config, from_mapping, read_toml

    values = {}
    if getattr(arguments, "preset", None):
        from ltkernels.train import presets

        values = presets.load(arguments.preset)
    if arguments.config:
        own = read_toml(arguments.config)
        from_mapping(own, str(arguments.config))  # its own faults, before flags hide them
        values |= own
    given = {item.name: getattr(arguments, item.name) for item in fields(Config) if hasattr(arguments, item.name)}
    return Config(**{**values, **given})


class _Progress:
    """One line on stderr that is written over; silent where stderr is not a terminal."""

    def __init__(self, quiet: bool) -> None:
        self.active = not quiet and sys.stderr.isatty()
        self.width = 0

    def __call__(self, phase: str, done: int, total: int, record: dict[str, Any]) -> None:
        if not self.active:
            return
        filled = 24 * done // max(total, 1)
        accuracy = record.get("test_balanced_accuracy")
        tail = "" if accuracy is None else f"  balanced accuracy {100 * accuracy:.1f} %"
        line = f"{phase:<28} [{'#' * filled}{'.' * (24 - filled)}] {done}/{total}{tail}"
        self.width = max(self.width, len(line))
        print(f"\r{line:<{self.width}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.active and self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)


def _job(arguments: argparse.Namespace) -> None:
    from ltkernels import train
    from ltkernels.train.config import to_toml

    config = _config(arguments)
    if arguments.seeds and hasattr(arguments, "seed"):
        raise ValueError("--seed and --seeds exclude each other")
    seeds = f"seed{config.seed}" if not arguments.seeds else f"seeds{','.join(map(str, arguments.seeds))}"
    out = arguments.out or Path("runs") / f"{arguments.command}-{config.data.partition(':')[0]}-{config.loss}-{seeds}"
    # torchrun starts several processes; the first one speaks.
    quiet = arguments.quiet or os.environ.get("RANK", "0") != "0"
    progress = _Progress(quiet)

    def on_config(resolved: Any) -> None:
        if not quiet:
            print(to_toml(resolved))

    job = train.run if arguments.command == "run" else train.train
    if arguments.seeds:
        job = partial(train.run_seeds, arguments.command, seeds=arguments.seeds)
    try:
        summary = job(
            config, out=out, force=arguments.force, resume=arguments.resume, progress=progress, on_config=on_config
        )
    finally:
        progress.clear()
    if not quiet:
        _print_variants(summary["variants"])
        print(f"\n{summary['seconds']:.1f} s; results in {out}, open {out / 'report.html'}")


def _print_variants(variants: list[dict[str, Any]]) -> None:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    def group(variant: dict[str, Any], name: str) -> str:
        return percent(variant["groups"][name]["accuracy"])

    print(f"{'variant':<24}{'balanced':>10}{'top-1':>8}{'many':>8}{'medium':>8}{'few':>8}{'FDG tail':>10}")
    for v in variants:
        fdg = "-" if v.get("fdg_tail") is None else f"{v['fdg_tail']:.3f}"
        groups = "".join(f"{group(v, name):>8}" for name in ("many", "medium", "few"))
        print(f"{_plain(v['name']):<24}{percent(v['balanced_accuracy']):>10}{percent(v['top1']):>8}{groups}{fdg:>10}")


def _experiment(arguments: argparse.Namespace) -> None:
    from ltkernels.train.experiment import fdg_experiment

    names = arguments.data.split(",")
    del arguments.data
    progress = _Progress(arguments.quiet)
    try:
        summary = fdg_experiment(
            _config(arguments),
            data=names,
            methods=arguments.methods.split(","),
            levels=arguments.levels,
            sets=arguments.sets,
            processes=arguments.processes,
            out=arguments.out,
            force=arguments.force,
            resume=arguments.resume,
            progress=progress,
        )
    finally:
        progress.clear()
    if not arguments.quiet:
        print("\n".join(summary["verdicts"]))
        print(f"\n{summary['seconds']:.1f} s; results in {arguments.out}, see {arguments.out / 'scatter.png'}")


def _select(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    progress = _Progress(arguments.quiet)
    try:
        result = train.select_features(
            arguments.features,
            _config(arguments),
            out=arguments.out,
            labels=arguments.labels,
            mode=arguments.mode,
            classes=arguments.classes,
            m=arguments.m,
            n_sets=arguments.sets,
            force=arguments.force,
            progress=progress,
        )
    finally:
        progress.clear()
    if arguments.quiet:
        return
    for entry in result["classes"]:
        arms = entry["arms"]
        source = entry["similar_head"]
        source = "from its pool" if source is None else f"in the spread of class {source}"
        print(
            f"class {entry['label']}: {entry['need']} added {source}, "
            f"FDG {arms[result['selected']]['fdg']:.3f} (at random {arms['random-0']['fdg']:.3f})"
        )
    if arguments.sets:
        sets = result["sets"]
        print(
            f"{len(sets['kept'])} sets, FDG_Tail {sets['fdg_tail'][0]:.3f} to {sets['fdg_tail'][-1]:.3f}, uniform to "
            f"{sets['spacing_error']:.2f} of the spacing"
        )
    if result["picture"] is None:
        print('no picture: matplotlib is missing (pip install "ltkernels[bench]")')
    print(f"{result['seconds']:.1f} s; results in {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    results = train.evaluate(arguments.run_dir)
    _print_variants(results)
    changed = [r["name"] for r in results if abs(r["balanced_accuracy"] - r["recorded_balanced_accuracy"]) > 1e-12]
    print(f"differs from summary.json: {', '.join(changed)}" if changed else "equal to summary.json")


def _report(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    path = train.rebuild_report(arguments.run_dir)
    print(path)
    if arguments.png:
        from ltkernels.train.report import save_pngs

        print(f"{len(save_pngs(path.read_text(encoding='utf-8'), arguments.png))} charts in {arguments.png}")


def _audit(arguments: argparse.Namespace) -> None:
    from ltkernels.train.report import audit_file

    result = audit_file(arguments.features, out=arguments.out, other=arguments.against, force=arguments.force)
    counts, errors = result["class_counts"], result["label_errors"]
    print(f"{sum(counts)} samples in {len(counts)} classes, {max(counts)} to {min(counts)} a class")
    found = "" if errors is None else f"{len(errors)}; "
    print(f"suspected label errors: {found}{result['label_errors_note']}")
    print(f"results in {arguments.out}")


def _bench(arguments: argparse.Namespace) -> None:
    benchmark = importlib.import_module(f"ltkernels.benchmarks.{arguments.family}")
    if benchmark.main(arguments.rest) != 0:
        raise ValueError(f"an answer of the {arguments.family} benchmark disagrees with float64")


def _doctor(_: argparse.Namespace) -> None:
    rows = [("ltkernels", ltkernels.__version__), *ltkernels.doctor_report()]
    known = {name for name, _ in rows}
    for module, package in _OPTIONAL.items():
        if package in known or module in known:
            continue
        # find_spec does not import: a broken optional package must not break the doctor.
        found = importlib.util.find_spec(module) is not None
        rows.append((package, _version(package) if found else "not installed"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


_COMMANDS = {
    "run": _job,
    "train": _job,
    "select": _select,
    "experiment": _experiment,
    "evaluate": _evaluate,
    "report": _report,
    "audit": _audit,
    "bench": _bench,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse's own exits are SystemExit with code 0 or 2)."""
    try:
        arguments = _parser().parse_args(argv)
        _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt as stop:
        # A stop inside a result folder knows its signal; Ctrl-C before that leaves nothing.
        signum = getattr(stop, "signum", None)
        left = "no results were written" if signum is None else "--resume auto continues it"
        print(f"ltkernels: {'interrupted' if signum is None else f'stopped by {stop}'}; {left}", file=sys.stderr)
        return 128 + (signum or signal.SIGINT)
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("LTKERNELS_TRACEBACK"):
            raise
        text = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
        print(f"ltkernels: error: {_plain(' '.join(text.split()))}", file=sys.stderr)
        return 2
    return 0


def _plain(text: str) -> str:
    """`text` for a terminal: names of files and classes may hold sequences that move its cursor or change its title."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
