"""What several subcommands share: settings as flags, the progress line, who speaks under torchrun."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltkernels._settings import add_flags, given

# The trainer is imported inside the functions: `ltkernels doctor` must work where scikit-learn and faiss do not.


def examples(*lines: str) -> str:
    """The end of a command's --help."""
    return "\n  ".join(["examples:", *lines])


def usage_of(command: str) -> str:
    """The first line of the --help of a command with more flags than anybody reads in a row."""
    return f"ltkernels {command} [--SETTING VALUE ...] [--out OUT]"


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

    values = {}
    if getattr(arguments, "preset", None):
        from ltkernels.train import presets

        values = presets.load(arguments.preset)
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
        self.width = 0
        self.phase, self.began, self.first = "", time.monotonic(), 0.0
        self.shown, self.last = self.began, ""

    def __call__(self, phase: str, done: int, total: int, record: dict[str, Any]) -> None:
        """`done` of `total` epochs, or of what else the phase counts; `record` is the epoch's line of metrics.jsonl, or {}."""
        values = {name.partition("_")[2].replace("_", " "): v for name, v in record.items() if "_balanced_" in name}
        parts = [f"{name} {100 * v:.1f} %" for name, v in values.items()]
        if record.get("train_loss") is not None:
            parts.insert(0, f"loss {record['train_loss']:.4g}")
        if "lr" in record:
            parts.append(f"rate {record['lr']:.3g}")
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
        line = "  ".join(parts)
        if not self.terminal:
            print(line, file=sys.stderr, flush=True)
            return
        # A line that wraps would not be written over.
        line = line[: shutil.get_terminal_size().columns - 1]
        self.width = max(self.width, len(line))
        print(f"\r{line:<{self.width}}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
