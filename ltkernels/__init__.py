"""Fast, exact kernels for long-tailed recognition: fused losses, feature diversity, subset selection."""

from __future__ import annotations

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

import torch  # noqa: F401  first: its OpenMP runtime is the one that the compiled module uses

from . import _openmp

if _find_spec(f"{__name__}._C") is None:
    raise ImportError(
        "ltkernels has no compiled module. This is probably the source folder of a checkout: run Python from another folder, "
        "or install it in place with `pip install -e .`"
    )
else:
    _openmp.make_visible()  # before anything that loads it

from importlib.metadata import version as _version

from . import adjustments, functional, inference, nn, schedules
from ._backends import doctor_report
from .losses import LOSSES, Adjustment
from .losses._core import explain

__version__ = _version("ltkernels")

_LAZY = (
    "augment",
    "distributed",
    "diversity",
    "neighbors",
    "selection",
    "train",
)  # imported on first use: the losses need torch alone


if TYPE_CHECKING:
    from . import augment, distributed, diversity, neighbors, selection, train
else:  # type checkers would take this for a module that has every name

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            import importlib

            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
