"""Fast, exact kernels for long-tailed recognition: fused losses, feature diversity, subset selection."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as _version
from typing import TYPE_CHECKING


def _is_command_line() -> bool:
    """Whether this process is `ltkernels ...` or `python -m ltkernels ...`, where `cli.main` loads the rest once a command is to run:
    --help comes without torch."""
    first = sys.argv[0] if getattr(sys, "argv", None) else ""
    # While Python looks for the module of -m, "-m" stands there. Processes that multiprocessing starts are of -c, with our argv.
    named = os.path.basename(first) == "ltkernels" or (first == "-m" and __name__ in sys.orig_argv)
    return named and "-c" not in sys.orig_argv


if TYPE_CHECKING or not _is_command_line():
    from . import adjustments, functional, inference, nn, schedules
    from ._backends import doctor_report
    from .losses import LOSSES, Adjustment
    from .losses._core import explain

__version__ = _version("ltkernels")

# Where names are that are no modules. All are imported on first use on the command line; elsewhere the modules that not all need.
_HOMES = {"LOSSES": "losses", "Adjustment": "losses", "doctor_report": "_backends", "explain": "losses._core"}


if TYPE_CHECKING:
    from . import augment, distributed, diversity, neighbors, selection, train
else:  # type checkers would take this for a module that has every name

    def __getattr__(name: str) -> object:
        import importlib

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
        return getattr(module, name) if name in _HOMES else module


__all__ = [
    "LOSSES",
    "Adjustment",
    "adjustments",
    "augment",
    "distributed",
    "diversity",
    "doctor_report",
    "explain",
    "functional",
    "inference",
    "neighbors",
    "nn",
    "schedules",
    "selection",
    "train",
]
