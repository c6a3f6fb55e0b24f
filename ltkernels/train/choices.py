"""The names that settings choose from, for the command line, which lists them before torch is there. tests/test_cli.py compares
them with what they name."""

import re
from pathlib import Path

DATA_SETS = (
    *("digits-lt", "fashion-mnist-lt", "cifar10-lt", "cifar100-lt"),
    *("folder:PATH", "npz:PATH", "list:PATH", "csv:PATH", "hf:PATH"),
)
PROFILES = ("exp", "step")
SAMPLERS = ("instance", "balanced", "sqrt", "effective", "progressive")
SCHEDULES = ("none", "drw", "drs", "ga", "tla_adrw")
MIXERS = ("mixup", "remix", "cutmix", "cmo")
STAGES = ("crt", "lws", "tau-norm", "ncm", "ofa", "fdc")
# Read off the classes' sources: adding a loss stays one file.
LOSSES = tuple(
    sorted(
        name
        for file in (Path(__file__).parents[1] / "losses").glob("[!_]*.py")
        for name in re.findall(r'^    name = "(\w+)"$', file.read_text(encoding="utf-8"), re.MULTILINE)
    )
)
POLICIES = ("randaugment", "autoaugment", "trivialaugment")
VIEWS = ("none", "flip", "crops")
LOGS = ("tensorboard", "wandb", "mlflow")
