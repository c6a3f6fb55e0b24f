"""What several subcommands share: settings as flags, the progress line, who speaks under torchrun."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ltkernels._settings import add_flags, given

# The trainer is imported inside the functions: `ltkernels doctor` must work where scikit-learn and faiss do not.


def examples(*lines: str) -> str:
    """The end of a --help."""
    return "\n  ".join(["examples:", *lines])


def usage_of(command: str) -> str:
    """The first line of the --help of a command with more flags than anybody reads in a row."""
    return f"ltkernels {command} [--SETTING VALUE ...] [--out OUT]"


def add_command(
    commands: Any, name: str, carry_out: Callable[..., None], text: str, *lines: str, **more: Any
) -> argparse.ArgumentParser:
    """A subcommand, its line of the list of commands, and its examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, epilog=examples(*lines) if lines else None, **more
    )
    parser.set_defaults(carry_out=carry_out)
    return parser


def add_run(parser: argparse.ArgumentParser, text: str = "result folder") -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help=text)


def add_file_out(parser: argparse.ArgumentParser, default: str | None, text: str) -> None:
    """Where the one file that a command writes goes."""
    text += f" (default: {default})" if default else ""
    parser.add_argument("--out", type=Path, default=Path(default) if default else None, metavar="FILE", help=text)
    parser.add_argument("--force", action="store_true", help="replace an existing --out")


def is_first() -> bool:
    """Whether this process speaks: torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"


def add_settings(parser: argparse.ArgumentParser, only: Sequence[str] | None) -> None:
    """A flag per setting of `Config`, or of `only` these."""
    from ltkernels.train.config import HEADINGS, Config

    add_flags(parser, Config, only, HEADINGS)


def add_output(parser: argparse.ArgumentParser, out: Path | None, *, resumes: bool) -> None:
    """Where results go, and what a job may do there."""
    parser.add_argument("--out", type=Path, default=out, help="result folder")
    parser.add_argument("--force", action="store_true", help="replace the results in an existing --out")
    parser.add_argument("--config", type=Path, help="TOML file of settings; flags win")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    if resumes:
        text = "auto: continue the unfinished run in --out, to the same numbers; start where there is none"
        parser.add_argument("--resume", choices=("never", "auto"), default="never", help=text)


def config_of(arguments: argparse.Namespace) -> Any:
    """The `Config` that preset, file and flags give together."""
    from ltkernels.train.config import Config, from_mapping, read_toml
    from ltkernels.train.presets import load

    values = load(arguments.preset) if getattr(arguments, "preset", None) else {}
    if arguments.config:
        own = read_toml(arguments.config)
        from_mapping(own, str(arguments.config))  # its own faults, before flags hide them
        values |= own
    return Config(**{**values, **given(arguments, Config)})


class Progress:
    """Where a job is and how long it takes: on a terminal one line of stderr that is written over, elsewhere a line an epoch."""

    _PAUSE = 0.2  # seconds between two looks of a terminal's line
    _LONG = 30.0  # seconds without a line elsewhere

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.terminal = quiet, sys.stderr.isatty()
        self.phase, self.began, self.first = "", time.monotonic(), 0.0
        self.shown, self.last = self.began, ""

    def __call__(self, phase: str, done: int, total: int, record: dict[str, Any]) -> None:
        """`done` of `total` epochs, or of what else the phase counts; `record` is the epoch's line of metrics.jsonl, or {}."""
        loss, measured = record.get("train_loss"), [name for name in record if "_balanced_" in name]
        parts = [] if loss is None else [f"loss {loss:.4g}"]
        parts += [f"{name.partition('_')[2].replace('_', ' ')} {100 * record[name]:.1f} %" for name in measured]
        parts += [f"rate {record['lr']:.3g}"] if "lr" in record else []
        self.last = "  ".join(parts)
        # A resumed phase begins in the middle; its first epoch took what has passed since the phase before it.
        self._show(phase, done, total, f"{done}/{total}", done - 1 if record else 0, bool(record) or done == total)

    def step(self, phase: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """`step` of `steps` of the epoch after `epoch` of them."""
        if self.terminal or time.monotonic() - self.shown > self._LONG:
            done, first = epoch + step / steps, epoch + (step - 1) / steps
            self._show(phase, done, epochs, f"{epoch + 1}/{epochs}, step {step}/{steps}", first, False)

    def _show(self, phase: str, done: float, total: int, count: str, first: float, lasts: bool) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.first, self.last = phase, first, self.last if lasts else ""
        here = done - self.first
        wait = self._PAUSE if self.terminal else self._LONG
        if self.quiet or not (lasts or now - self.shown > wait):
            return
        each = (now - self.began) / here if here > 0 else 0.0
        timing = f"{_seconds(each)} each, {_seconds(each * (total - done))} left" if here > 0 and done < total else ""
        parts = [f"{phase:<28}", count, *(part for part in (self.last, timing) if part)]
        self.shown = now
        if done >= total:
            self.began = now
        if self.terminal:
            self._write("  ".join(parts))
        else:
            print("  ".join(parts), file=sys.stderr, flush=True)

    def _write(self, line: str) -> None:
        # A line that wraps would not be written over.
        columns = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:columns]:<{columns}}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.phase and not self.quiet:
            self._write("")
            print("\r", end="", file=sys.stderr, flush=True)


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
