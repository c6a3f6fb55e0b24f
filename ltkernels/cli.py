"""The command line: parses, calls the library, prints.

Exit codes: 0 done, 1 a bug, 2 bad input (a full disk and a folder in use too); 130 and 143 stopped by SIGINT or SIGTERM,
128 plus the signal's number as shells count, with a state in --out that `--resume auto` continues.

With LTKERNELS_TRACEBACK=1 in the environment, errors that are reported in one line keep their traceback.
"""

import argparse
import importlib
import importlib.metadata
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ltkernels
from ltkernels._names import did_you_mean, plain
from ltkernels._settings import comma_list
from ltkernels.commands import experiment, features, parts, predict

# The trainer is imported inside the functions: `ltkernels doctor` must work where scikit-learn and faiss do not.

_FIRST = parts.examples(
    "ltkernels run --out runs/first                                            on digits that scikit-learn brings",
    "ltkernels train --data folder:PICTURES --image-size 64 --out runs/mine    CLASS/*.jpg, with or without train/ and test/",
    "ltkernels predict runs/mine NEW_PICTURES --out predictions.csv",
    "ltkernels report runs/mine --png charts",
    "ltkernels train --help                                                    its settings by heading; so for every command",
)
_TRAININGS = (
    "ltkernels train --data folder:PICTURES --image-size 64 --out runs/mine     CLASS/*.jpg, with or without train/ and test/",
    "ltkernels train --data csv:TABLE.csv --val-split 0.1                       a column `label`, the others numbers, or a column `path`",
    "ltkernels train --data list:ImageNet_LT_train.txt --data-dir IMAGES --image-size 224",
    "ltkernels train --data my.module:function --model my.module:Backbone --loss ldam --schedule drw",
    "ltkernels train --data folder:PICTURES --image-size 64 --init runs/mine --epochs 20 --out runs/more     20 epochs more",
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        # An abbreviated flag would change its meaning when a flag with the same beginning is added.
        fixed = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{**kwargs, **fixed})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Commands and flags in any capitals, and flags with - or _."""
        given = list(sys.argv[1:] if args is None else args)
        commands = {plain(c): c for action in self._actions for c in action.choices or () if action.dest == "command"}
        flags = {plain(flag): flag for flag in self._option_string_actions if flag.startswith("--")}
        if given:
            given[0] = commands.get(plain(given[0]), given[0])
        for i, (flag, equals, value) in enumerate(text.partition("=") for text in given):
            if flag.startswith("--"):
                given[i] = f"{flags.get(plain(flag), flag)}{equals}{value}"
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        # argparse prints the usage first; the promise is one line.
        self.exit(2, f"ltkernels: error: {message}{self._hint(message)}\n")

    def _hint(self, message: str) -> str:
        """What a misspelt flag, command or choice may have been meant to be."""
        if message.endswith("required: COMMAND"):
            commands = (c for action in self._actions if action.dest == "command" for c in action.choices or ())
            return f" ({', '.join(commands)}; --help says what they do)"
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            return did_you_mean(choice[1], re.findall(r"[^', ]+", choice[2]))
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        parsers = [p for action in self._actions if isinstance(action.choices, dict) for p in action.choices.values()]
        return did_you_mean(flag[1], {f for p in (self, *parsers) for f in p._option_string_actions}) if flag else ""


def _parser() -> argparse.ArgumentParser:
    what = "Long-tailed recognition: train, select augmented data, report."
    parser = _Parser(prog="ltkernels", description=what, epilog=_FIRST)
    parser.add_argument("--version", action="version", version=f"ltkernels {ltkernels.__version__}")
    from ltkernels.train import presets

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    whole = "the whole pipeline: two trainings, FDG selection, retraining, report"
    for name, text in (("run", whole), ("train", "one training")):
        command = parts.add_command(commands, name, _job, text, *_TRAININGS, usage=parts.usage_of(name))
        parts.add_settings(command, None)
        parts.add_output(command, None, resumes=True)
        text = f"a published recipe: {', '.join(presets.names())}; --config and flags win"
        command.add_argument("--preset", help=text)
        text = "several seeds, as 0,1,2: one run each, means and deviations"
        command.add_argument("--seeds", type=comma_list(int), help=text)
    text = "evaluate a run's checkpoints again"
    parts.add_run(parts.add_command(commands, "evaluate", _evaluate, text, "ltkernels evaluate runs/mine"))
    text = "build a run's report.html again"
    command = parts.add_command(commands, "report", _report, text, "ltkernels report runs/mine --png charts")
    parts.add_run(command)
    command.add_argument("--png", type=Path, metavar="DIR", help="also write the charts as PNG files to this folder")
    for module in (predict, features, experiment):
        module.add_parsers(commands)
    text = "time the kernels against their peers"
    command = parts.add_command(commands, "bench", _bench, text, "ltkernels bench losses --help")
    families = ("losses", "heads", "contrast", "multi_label", "neighbors", "proco", "selection", "soft_targets")
    command.add_argument("family", choices=families)
    command.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own flags; try --help")
    parts.add_command(commands, "doctor", _doctor, "which back ends and optional packages are there, and why")
    return parser


def _job(arguments: argparse.Namespace) -> None:
    from ltkernels import train
    from ltkernels.train.config import to_toml

    config = parts.config_of(arguments)
    if arguments.seeds and hasattr(arguments, "seed"):
        raise ValueError("--seed and --seeds exclude each other")
    seeds = f"seed{config.seed}" if not arguments.seeds else f"seeds{','.join(map(str, arguments.seeds))}"
    out = arguments.out or Path("runs") / f"{arguments.command}-{config.data.partition(':')[0]}-{config.loss}-{seeds}"
    quiet = arguments.quiet or not parts.is_first()

    said: list[str] = []

    def on_notes(notes: Sequence[str]) -> None:
        for note in notes:
            if note not in said:
                print(f"note: {_plain(note)}")
                said.append(note)

    job = train.run if arguments.command == "run" else train.train
    if arguments.seeds:
        job = partial(train.run_seeds, arguments.command, seeds=arguments.seeds)
    given: dict[str, Any] = {"out": out, "force": arguments.force, "resume": arguments.resume}
    if not quiet:
        given |= {"on_config": lambda resolved: print(to_toml(resolved)), "on_notes": on_notes}
    with parts.Progress(quiet) as progress:
        summary = job(config, progress=progress, **given)
    if not quiet:
        on_notes(summary.get("notes", ()))  # what turned up on the way too
        _print_variants(summary["variants"])
        print(f"\n{summary['seconds']:.1f} s; results in {out}, open {out / 'report.html'}")


def _print_variants(variants: list[dict[str, Any]]) -> None:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    # Of what was completed with features alone.
    measured = any(v.get("fdg_tail") is not None for v in variants)
    print(
        f"{'variant':<24}{'balanced':>10}{'top-1':>8}{'many':>8}{'medium':>8}{'few':>8}{'FDG tail' if measured else '':>10}".rstrip()
    )
    for v in variants:
        fdg = "" if not measured else "-" if v.get("fdg_tail") is None else f"{v['fdg_tail']:.3f}"
        groups = "".join(f"{percent(v['groups'][name]['accuracy']):>8}" for name in ("many", "medium", "few"))
        print(
            f"{_plain(v['name']):<24}{percent(v['balanced_accuracy']):>10}{percent(v['top1']):>8}{groups}{fdg:>10}".rstrip()
        )


def _evaluate(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    results = train.evaluate(arguments.run_dir)
    _print_variants(results)
    changed = [r["name"] for r in results if abs(r["balanced_accuracy"] - r["recorded_balanced_accuracy"]) > 1e-12]
    print(f"differs from summary.json: {', '.join(changed)}" if changed else "equal to summary.json")


def _report(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    print(train.rebuild_report(arguments.run_dir, arguments.png))
    if arguments.png:
        print(f"charts in {arguments.png}")


def _bench(arguments: argparse.Namespace) -> None:
    benchmark = importlib.import_module(f"ltkernels.benchmarks.{arguments.family}")
    if benchmark.main(arguments.rest) != 0:
        raise ValueError(f"an answer of the {arguments.family} benchmark disagrees with float64")


def _doctor(_: argparse.Namespace) -> None:
    from ltkernels import doctor_report

    rows = {"ltkernels": ltkernels.__version__, **dict(doctor_report())}
    for package in ("numpy", "faiss-cpu", "scikit-learn"):
        # Metadata, not an import: a broken optional package must not break the doctor.
        try:
            rows.setdefault(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            rows.setdefault(package, "not installed")
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse's own exits are SystemExit with code 0 or 2)."""
    try:
        arguments = _parser().parse_args(argv)
        importlib.import_module("ltkernels.losses")  # before all that builds on it
        arguments.carry_out(arguments)
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
