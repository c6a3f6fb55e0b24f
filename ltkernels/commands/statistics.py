"""`ltkernels statistics`: what two parties need to compare and join the diversity of their classes without a sample leaving
either."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ltkernels.commands.parts import examples, is_first


def add_parser(commands: Any) -> None:
    statistics = commands.add_parser(
        "statistics",
        help="count, mean and scatter of every class to a file, and such files merged: no samples change hands",
        description="Writes count, mean and scatter of every class of your features to a file, or merges such files of several\n"
        "parties, and prints the diversity V of every class. The file holds no samples, but exact means and covariances: it\n"
        "is not private in the sense of differential privacy, and a class of one sample is its mean.",
        epilog=examples(
            "ltkernels statistics FEATURES.npz --out ours.npz",
            "ltkernels statistics --merge ours.npz theirs.npz --out both.npz",
        ),
    )
    statistics.set_defaults(carry_out=run)
    statistics.add_argument(
        "features",
        type=Path,
        nargs="?",
        metavar="FEATURES.npz",
        help="arrays features (n, d), labels (n,) and class_names if you have them; or features as .npy",
    )
    statistics.add_argument("--labels", type=Path, metavar="LABELS.npy", help="the labels of an .npy file of features")
    statistics.add_argument(
        "--merge", type=Path, nargs="+", metavar="PARTY.npz", help="merge these files of statistics, classes by name"
    )
    statistics.add_argument(
        "--out", type=Path, metavar="OUT.npz", help="write the statistics here (default: print only)"
    )
    statistics.add_argument("--force", action="store_true", help="replace an existing --out")


def run(arguments: argparse.Namespace) -> None:
    from ltkernels.train import statistics

    if (arguments.features is None) == (arguments.merge is None):
        raise ValueError("statistics takes either FEATURES.npz or --merge PARTY.npz ...")
    if arguments.merge is not None:
        if arguments.labels:
            raise ValueError("--labels is for an .npy file of features, not for --merge")
        result = statistics.merge_statistics(arguments.merge, out=arguments.out, force=arguments.force)
    else:
        result = statistics.write_statistics(
            arguments.features, out=arguments.out, labels=arguments.labels, force=arguments.force
        )
    if not is_first():
        return
    parties = result["parties"]
    for note in result.get("notes", ()):
        print(f"note: {note}", file=sys.stderr)
    wide = max(5, *map(len, result["names"]))
    titles = [f"FDG over {Path(party['file']).name}" for party in parties]
    print(f"{'class':<{wide}}{'samples':>10}{'V':>10}" + "".join(f"  {title:>10}" for title in titles))
    for c, name in enumerate(result["names"]):
        cells = [_cell(party["gain"][c], len(title)) for party, title in zip(parties, titles)]
        print(f"{name:<{wide}}{result['counts'][c]:>10}{_cell(result['diversity'][c], 8)}" + "".join(cells))
    if arguments.out:
        print(f"statistics in {arguments.out}")


def _cell(value: float | None, width: int) -> str:
    return f"  {'-' if value is None else format(value, '.4f'):>{max(width, 8)}}"
