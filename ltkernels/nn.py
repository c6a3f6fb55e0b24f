"""Losses as Modules, and the cosine head that the margin losses expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .contrastive import (
    GML,
    KCL,
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
from .losses.acsl import ACSL
from .losses.ala import ALA
from .losses.arcface import ArcFace
from .losses.balpoe import BalPoE
from .losses.class_balanced import ClassBalanced
from .losses.class_prior_sigmoid import ECM, BalancedBCE
from .losses.cross_entropy import CrossEntropy, Focal
from .losses.disalign import DisAlign
from .losses.distribution_balanced import DistributionBalanced
from .losses.eql_v2 import EQLv2
from .losses.expert_losses import ExpertsLoss
from .losses.gcl import GCL
from .losses.hinge import LDAMHinge
from .losses.influence_balanced import InfluenceBalanced
from .losses.isda import ClassVariances
from .losses.kps import KPS, KPSGradientAdjusted
from .losses.label_smoothing import LOS, LabelAwareSmoothing
from .losses.lade import LADE
from .losses.logit_adjustment import BalancedSoftmax, LogitAdjustedAdaptiveMargin, LogitAdjustedCrossEntropy
from .losses.margins import LDAM, CosFace
from .losses.mdcs import MDCS
from .losses.ncl import NCL
from .losses.proco import ProCo
from .losses.reslt import ResLT
from .losses.ride import RIDE
from .losses.sade import SADE
from .losses.seesaw import Seesaw
from .losses.sigmoid import EQL, ClassBalancedFocal, ClassBalancedSigmoid
from .losses.softmax_equalization import SoftmaxEqualization
from .losses.vector_scaling import CDT, VectorScaling

__all__ = [
    "ACSL",
    "ALA",
    "CDT",
    "ECM",
    "EQL",
    "GCL",
    "GML",
    "KCL",
    "KPS",
    "LADE",
    "LDAM",
    "LOS",
    "MDCS",
    "NCL",
    "RIDE",
    "SADE",
    "AdjustedCrossEntropy",
    "ArcFace",
    "BalPoE",
    "BalancedBCE",
    "BalancedContrastive",
    "BalancedSoftmax",
    "ClassBalanced",
    "ClassBalancedFocal",
    "ClassBalancedSigmoid",
    "ClassVariances",
    "CosFace",
    "CosineLinear",
    "CrossEntropy",
    "DisAlign",
    "DistributionBalanced",
    "EQLv2",
    "ExpertsLoss",
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
    "ProCo",
    "PrototypeContrastive",
    "ResLT",
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
