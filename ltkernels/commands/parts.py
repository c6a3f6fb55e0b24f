"""What several subcommands share: settings as flags, the progress line, who speaks under torchrun."""

import argparse
import os
import sys
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
    """One line on stderr that is written over; silent where stderr is not a terminal."""

    def __init__(self, quiet: bool) -> None:
        self.active = not quiet and sys.stderr.isatty()
        self.width = 0

    def __call__(self, phase: str, done: int, total: int, record: dict[str, Any]) -> None:
        if not self.active:
            return
        filled = 24 * done // max(total, 1)
        accuracy = record.get("test_balanced_accuracy", record.get("val_balanced_accuracy"))
        tail = "" if accuracy is None else f"  balanced accuracy {100 * accuracy:.1f} %"
        line = f"{phase:<28} [{'#' * filled}{'.' * (24 - filled)}] {done}/{total}{tail}"
        self.width = max(self.width, len(line))
        print(f"\r{line:<{self.width}}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active and self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)
