"""The reference trainer. Needs the extra: pip install "ltkernels[train]".

import ltkernels.train as train
summary = train.run(train.Config(loss="ldam", epochs=20), out="results")
"""

from ltkernels.train import data
from ltkernels.train.config import Config
from ltkernels.train.jobs import evaluate, rebuild_report, run, train
from ltkernels.train.select import select_features

__all__ = ["Config", "data", "evaluate", "rebuild_report", "run", "select_features", "train"]
