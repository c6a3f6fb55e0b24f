"""What several subcommands share: settings as flags, the progress line, who speaks under torchrun."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

# The trainer is imported inside the functions: `ltkernels doctor` must work where scikit-learn and faiss do not.


def is_first() -> bool:
    """Whether this process speaks: torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"


def add_settings(parser: argparse.ArgumentParser, only: Sequence[str] | None) -> None:
    """A flag per setting of `Config`; a flag that is not given stays out of the namespace."""
    from ltkernels.train.config import HEADINGS, Config, kind_of, spelled

    group: Any = parser
    heading = ""
    for item in fields(Config):
        heading = HEADINGS.get(item.name, heading)
        if only is not None and item.name not in only:
            continue
        if group is parser or group.title != heading:
            group = parser.add_argument_group(heading)
        text = item.metadata["help"]
        if item.default not in (None, ""):
            text += f" (default: {item.default})"
        flag = f"--{item.name.replace('_', '-')}"
        shared = {"dest": item.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        choices = item.metadata.get("choices")
        if kind_of(item) is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif choices:
            group.add_argument(flag, type=partial(spelled, choices=choices), choices=choices, **shared)
        else:
            group.add_argument(flag, type=kind_of(item), metavar=item.name.upper(), **shared)


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
    given = {item.name: getattr(arguments, item.name) for item in fields(Config) if hasattr(arguments, item.name)}
    return Config(**{**values, **given})


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

    def clear(self) -> None:
        if self.active and self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)
