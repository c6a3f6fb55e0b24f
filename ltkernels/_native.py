"""The compiled module, which every file takes from here: it is loaded once torch's OpenMP runtime is there for it to use."""

from __future__ import annotations

from importlib.util import find_spec

import torch  # noqa: F401  first: its OpenMP runtime is the one that the compiled module uses

from . import _openmp

if find_spec("ltkernels._C") is None:
    raise ImportError(
        "ltkernels has no compiled module. This is probably the source folder of a checkout: run Python from another folder, "
        "or install it in place with `pip install -e .`"
    )
_openmp.make_visible()

from . import _C  # noqa: E402

__all__ = ["_C"]
