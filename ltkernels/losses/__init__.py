"""Every loss, one file each. Adding a loss is adding a file here: a parameter builder and its record in ``LOSSES``.

The functional form, the Module, the entry in `ltkernels.adjustments`, the command line name and the tests come from the record.
"""

from __future__ import annotations

import importlib
import pkgutil

from ._core import adjusted_cross_entropy
from ._record import Adjustment, Loss

LOSSES: dict[str, Loss] = {}
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")):
    for _loss in importlib.import_module(f"{__name__}.{_module}").LOSSES:
        for _attribute in ("name", "function", "class_name"):
            if any(getattr(_loss, _attribute) == getattr(_other, _attribute) for _other in LOSSES.values()):
                raise ImportError(f"two losses have the {_attribute} {getattr(_loss, _attribute)!r}")
        LOSSES[_loss.name] = _loss

__all__ = ["LOSSES", "Adjustment", "Loss", "adjusted_cross_entropy"]
