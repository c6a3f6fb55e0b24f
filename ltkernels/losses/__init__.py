"""Every loss, one file each. Adding a loss is adding a file here: a builder from class counts to tables, and the class that uses it.

A class that sets `name` and `build` joins `LOSSES`, and with it the command line and the tests that go over every loss; `ltkernels.nn`
and `ltkernels.adjustments` have class and builder under their own names (a line there is for readers and type checkers).

Losses of other packages join them through the entry-point group ``ltkernels.losses``; an entry point is one class or a sequence of them:

    [project.entry-points."ltkernels.losses"]
    my_loss = "my_package.my_module:MyLoss"
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import warnings
from typing import TypeAlias

from ._adjustment import Adjustment, Smoothed, rounded
from ._core import adjusted_cross_entropy
from ._module import LOSSES, AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term

Loss: TypeAlias = type[AdjustedCrossEntropy]
"""What a loss is: a class with `name`, `title`, `logits`, `predict` and `build`."""

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")):
    importlib.import_module(f"{__name__}.{_module}")


def _join(entry: importlib.metadata.EntryPoint) -> None:
    """Loads the losses of another package: its classes join `LOSSES` as they are defined."""
    before = dict(LOSSES)
    try:
        found = entry.load()
        for loss in (found,) if isinstance(found, type) else found:
            if not (isinstance(loss, type) and issubclass(loss, AdjustedCrossEntropy) and loss in LOSSES.values()):
                raise TypeError(
                    f"{loss!r} is no ltkernels.losses.Loss: no subclass of AdjustedCrossEntropy with a name"
                )
    except Exception as error:  # another package's fault: everything else must go on working
        LOSSES.clear()
        LOSSES.update(before)
        warnings.warn(f"ltkernels: the losses of entry point {entry.value!r} are left out: {error}", stacklevel=2)


for _entry in importlib.metadata.entry_points(group="ltkernels.losses"):
    _join(_entry)

__all__ = [
    "LOSSES",
    "AdjustedCrossEntropy",
    "Adjustment",
    "ClosedForm",
    "Common",
    "Loss",
    "Smoothed",
    "Term",
    "adjusted_cross_entropy",
    "rounded",
]
