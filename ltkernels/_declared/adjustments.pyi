# Written by `python -m ltkernels._declared` from the records of ltkernels.losses; do not edit.

from ..losses.arcface import arcface as arcface
from ..losses.class_balanced import class_balanced as class_balanced
from ..losses.cross_entropy import cross_entropy as cross_entropy
from ..losses.cross_entropy import focal as focal
from ..losses.kps import kps as kps
from ..losses.kps import kps_ga as kps_ga
from ..losses.logit_adjustment import balanced_softmax as balanced_softmax
from ..losses.logit_adjustment import logit_adjusted_adaptive_margin as logit_adjusted_adaptive_margin
from ..losses.logit_adjustment import logit_adjustment as logit_adjustment
from ..losses.margins import cosface as cosface
from ..losses.margins import ldam as ldam
from ..losses.seesaw import seesaw as seesaw
from ..losses.sigmoid import class_balanced_focal as class_balanced_focal
from ..losses.sigmoid import class_balanced_sigmoid as class_balanced_sigmoid
from ..losses.sigmoid import eql as eql
from ..losses.softmax_equalization import softmax_equalization as softmax_equalization
from ..losses.vector_scaling import cdt as cdt
from ..losses.vector_scaling import vector_scaling as vector_scaling
