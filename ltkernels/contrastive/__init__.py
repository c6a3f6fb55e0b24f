"""Contrastive losses without a matrix of similarities; README.md has a section for each."""

from __future__ import annotations

from ._contrastive import contrastive
from ._logsumexp import linear_logsumexp
from .balanced import BalancedContrastive, PrototypeContrastive
from .paco import GPaCo, PaCo
from .queued import GML, KCL, MoCo
from .supcon import NTXent, SupCon

__all__ = [
    "GML",
    "KCL",
    "BalancedContrastive",
    "GPaCo",
    "MoCo",
    "NTXent",
    "PaCo",
    "PrototypeContrastive",
    "SupCon",
    "contrastive",
    "linear_logsumexp",
]
