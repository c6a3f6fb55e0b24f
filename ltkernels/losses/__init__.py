"""Every loss, one file each. Adding a loss is adding a file here: a parameter builder and its record in ``LOSSES``.

The functional form, the Module, the entry in `ltkernels.adjustments`, the command line name and the tests come from the record.

Losses of other packages join them through the entry-point group ``ltkernels.losses``; an entry point is one `Loss` or a sequence of them:

    [project.entry-points."ltkernels.losses"]
    my_loss = "my_package.my_module:LOSSES"
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import warnings

from ._core import adjusted_cross_entropy
from ._record import Adjustment, Loss

LOSSES: dict[str, Loss] = {}


def _add(loss: Loss) -> None:
    if not isinstance(loss, Loss):
        raise TypeError(f"{loss!r} is no ltkernels.losses.Loss")
    for attribute in ("name", "function", "class_name"):
        if any(getattr(loss, attribute) == getattr(other, attribute) for other in LOSSES.values()):
            raise ValueError(f"two losses have the {attribute} {getattr(loss, attribute)!r}")
    LOSSES[loss.name] = loss


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")):
    for _loss in importlib.import_module(f"{__name__}.{_module}").LOSSES:
        _add(_loss)

for _entry in importlib.metadata.entry_points(group="ltkernels.losses"):
    try:
        _found = _entry.load()
        for _loss in (_found,) if isinstance(_found, Loss) else _found:
            _add(_loss)
    except Exception as error:  # another package's fault: everything else must go on working
        warnings.warn(f"ltkernels: the losses of entry point {_entry.value!r} are left out: {error}", stacklevel=2)

__all__ = ["LOSSES", "Adjustment", "Loss", "adjusted_cross_entropy"]
