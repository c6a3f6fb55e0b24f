"""`ltkernels experiment fdg`: does the FDG of added tail samples decide the accuracy?"""

import argparse
from pathlib import Path
from typing import Any

from ltkernels._settings import add_flags, given
from ltkernels.commands import parts

# What a study that fixes loss and recipe leaves to choose.
_SETTINGS = (
    "data_dir", "imbalance", "profile", "data_seed", "image_size", "model", "epochs", "batch_size", "lr", "weight_decay", "seed",
    "device", "threads", "holdout", "head_ratio", "pool_factor", "subset_size", "similarity", "shrinkage", "retrain_epochs",
    "retrain_lr", "checkpoint_seconds",
)  # fmt: skip


def add_parsers(commands: Any) -> None:
    from ltkernels.experiments.protocol import Protocol

    what = "fdg: does the FDG of added tail samples decide the accuracy?"
    experiment = parts.add_command(
        *(commands, "experiment", _run, "whole studies in one command: fdg"),
        "ltkernels experiment fdg --data digits-lt,fashion-mnist-lt --sets 10 --out runs/fdg --resume auto",
        usage=parts.usage_of("experiment fdg"),
    )
    experiment.add_argument("name", choices=("fdg",), help=what)
    parts.add_settings(experiment, _SETTINGS)
    experiment.add_argument("--data", default="digits-lt", help="data sets, as digits-lt,fashion-mnist-lt")
    experiment.add_argument(
        "--methods", default="remix,cmo,ofa,fdc", help="remix, cmo, ofa, fdc, smote, mixed (default: the first four)"
    )
    add_flags(experiment, Protocol, headings={"levels": "protocol"})
    experiment.add_argument("--processes", type=int, help="sets worked on side by side (default: by the cores)")
    parts.add_output(experiment, Path("runs/experiment-fdg"), resumes=True)


def _run(arguments: argparse.Namespace) -> None:
    from ltkernels.experiments.fdg import fdg_experiment
    from ltkernels.experiments.protocol import Protocol

    protocol = Protocol(**given(arguments, Protocol))
    names = arguments.data.split(",")
    del arguments.data
    with parts.Progress(arguments.quiet) as progress:
        summary = fdg_experiment(
            parts.config_of(arguments),
            data=names,
            methods=arguments.methods.split(","),
            protocol=protocol,
            processes=arguments.processes,
            out=arguments.out,
            force=arguments.force,
            resume=arguments.resume,
            progress=progress,
        )
    if not arguments.quiet:
        print("\n".join(summary["verdicts"]))
        print(f"\n{summary['seconds']:.1f} s; results in {arguments.out}, see {arguments.out / 'scatter.png'}")
