"""Parameter builders: from integer class counts to the per-class vectors of a loss.

Tables are computed on the host in float64 and stored in float32, or in float64 on request (``table_dtype``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .losses import LOSSES, Adjustment
from .losses.acsl import acsl
from .losses.ala import ala
from .losses.arcface import arcface
from .losses.class_balanced import class_balanced
from .losses.class_prior_sigmoid import balanced_bce, ecm
from .losses.cross_entropy import cross_entropy, focal
from .losses.eql_v2 import eql_v2
from .losses.gcl import gcl
from .losses.kps import kps, kps_ga
from .losses.label_smoothing import label_aware_smoothing, los
from .losses.logit_adjustment import balanced_softmax, logit_adjusted_adaptive_margin, logit_adjustment
from .losses.margins import cosface, ldam
from .losses.proco import vmf
from .losses.seesaw import seesaw
from .losses.sigmoid import class_balanced_focal, class_balanced_sigmoid, eql
from .losses.softmax_equalization import softmax_equalization
from .losses.vector_scaling import cdt, vector_scaling

__all__ = [
    "Adjustment",
    "acsl",
    "ala",
    "arcface",
    "balanced_bce",
    "balanced_softmax",
    "cdt",
    "class_balanced",
    "class_balanced_focal",
    "class_balanced_sigmoid",
    "cosface",
    "cross_entropy",
    "ecm",
    "eql",
    "eql_v2",
    "focal",
    "gcl",
    "kps",
    "kps_ga",
    "label_aware_smoothing",
    "ldam",
    "logit_adjusted_adaptive_margin",
    "logit_adjustment",
    "los",
    "seesaw",
    "softmax_equalization",
    "vector_scaling",
    "vmf",
]


if not TYPE_CHECKING:  # losses that have no line above: of other packages, or defined by the user

    def __getattr__(name: str) -> object:
        for loss in LOSSES.values():
            if loss.build.__name__ == name:
                return loss.build
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
