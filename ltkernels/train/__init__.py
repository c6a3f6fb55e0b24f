"""The reference trainer. Needs the extra: pip install "ltkernels[train]".

    import ltkernels.train as train
    summary = train.run(train.Config(loss="ldam", epochs=20), out="results")

Data of your own: two lines, then its name is a data set like any other.

    train.data.register("mine", lambda request: train.data.Dataset.from_arrays(x, y, x_test, y_test))
    summary = train.train(train.Config(data="mine"), out="results")

On the command line it is one flag: `ltkernels train --data npz:FILE` with arrays x_train, y_train, x_test, y_test.

What was trained is used by `load("results").predict(samples)`, or by `ltkernels predict results FILES`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltkernels.train import data, presets
    from ltkernels.train.config import Config
    from ltkernels.train.jobs import evaluate, rebuild_report, run, train
    from ltkernels.train.logs import Callback
    from ltkernels.train.predictor import Model, load
    from ltkernels.train.seeds import cross_validate, run_seeds
    from ltkernels.train.select import select_features

# The module of each name, imported on first use: the command line knows its flags before torch is there.
_HOMES = {
    "Callback": "logs", "Config": "config", "Model": "predictor", "cross_validate": "seeds", "data": "data", "evaluate": "jobs",
    "load": "predictor", "presets": "presets", "rebuild_report": "jobs", "run": "jobs", "run_seeds": "seeds",
    "select_features": "select", "train": "jobs",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return module if name == _HOMES[name] else getattr(module, name)


__all__ = [
    "Callback", "Config", "Model", "cross_validate", "data", "evaluate", "load", "presets", "rebuild_report", "run", "run_seeds",
    "select_features", "train",
]  # fmt: skip
