"""Losses as Modules, and the cosine head that the margin losses expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .contrastive import (
    GML,
    KCL,
    LADE,
    BalancedContrastive,
    GPaCo,
    MoCo,
    NTXent,
    PaCo,
    PrototypeContrastive,
    SupCon,
)
from .heads import CosineLinear
from .losses import LOSSES, AdjustedCrossEntropy
from .losses.ala import ALA
from .losses.arcface import ArcFace
from .losses.class_balanced import ClassBalanced
from .losses.cross_entropy import CrossEntropy, Focal
from .losses.hinge import LDAMHinge
from .losses.influence_balanced import InfluenceBalanced
from .losses.kps import KPS, KPSGradientAdjusted
from .losses.label_smoothing import LOS, LabelAwareSmoothing
from .losses.logit_adjustment import BalancedSoftmax, LogitAdjustedAdaptiveMargin, LogitAdjustedCrossEntropy
from .losses.margins import LDAM, CosFace
from .losses.seesaw import Seesaw
from .losses.sigmoid import EQL, ClassBalancedFocal, ClassBalancedSigmoid
from .losses.softmax_equalization import SoftmaxEqualization
from .losses.vector_scaling import CDT, VectorScaling

__all__ = [
    "ALA",
    "CDT",
    "EQL",
    "GML",
    "KCL",
    "KPS",
    "LADE",
    "LDAM",
    "LOS",
    "AdjustedCrossEntropy",
    "ArcFace",
    "BalancedContrastive",
    "BalancedSoftmax",
    "ClassBalanced",
    "ClassBalancedFocal",
    "ClassBalancedSigmoid",
    "CosFace",
    "CosineLinear",
    "CrossEntropy",
    "Focal",
    "GPaCo",
    "InfluenceBalanced",
    "KPSGradientAdjusted",
    "LDAMHinge",
    "LabelAwareSmoothing",
    "LogitAdjustedAdaptiveMargin",
    "LogitAdjustedCrossEntropy",
    "MoCo",
    "NTXent",
    "PaCo",
    "PrototypeContrastive",
    "Seesaw",
    "SoftmaxEqualization",
    "SupCon",
    "VectorScaling",
]


if not TYPE_CHECKING:  # losses that have no line above: of other packages, or defined by the user

    def __getattr__(name: str) -> object:
        for loss in LOSSES.values():
            if loss.__name__ == name:
                return loss
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
