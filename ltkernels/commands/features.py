"""`ltkernels select`, `audit` and `statistics`: what becomes of a file of features and labels."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ltkernels.commands import parts

_SETTINGS = (
    "seed", "select", "head_ratio", "pool_factor", "subset_size", "share", "similarity", "shrinkage", "random_repeats",
)  # fmt: skip


def add_parsers(commands: Any) -> None:
    command = parts.add_command(
        *(commands, "select", _select, "select synthetic tail features for features of your own"),
        "ltkernels select FEATURES.npz --out selection                   the tail, from pools of the file or made for it",
        "ltkernels select FEATURES.npz --classes 7 9 --select match --share 0.3",
        "ltkernels select FEATURES.npy --labels LABELS.npy --sets 50     50 sets of uniformly spaced FDG",
        usage=parts.usage_of("select FEATURES.npz"),
    )
    _add_features(
        command,
        "features (n, d) and labels (n,); pool, pool_labels and pool_files if you have them; or features as .npy",
    )
    command.add_argument("--classes", type=int, nargs="+", metavar="C", help="complete these (default: the tail)")
    command.add_argument("--m", type=int, help="subsets to pick per class (default: up to the largest class)")
    command.add_argument("--sets", type=int, default=0, help="also this many sets of uniformly spaced FDG (default: 0)")
    parts.add_settings(command, _SETTINGS)
    parts.add_output(command, Path("selection"), resumes=False)

    command = parts.add_command(
        *(commands, "audit", _audit, "counts, diversity, suspected label errors and drift of your features"),
        "ltkernels audit FEATURES.npz --against LAST_MONTH.npz --out audit.html",
    )
    command.add_argument("features", type=Path, metavar="FEATURES.npz", help="arrays features (n, d) and labels (n,)")
    command.add_argument("--against", type=Path, metavar="OTHER.npz", help="a second set, to look for drift")
    parts.add_file_out(command, "audit.html", "the page")

    what = "count, mean and scatter of every class to a file, and such files merged: no samples change hands"
    command = parts.add_command(
        *(commands, "statistics", _statistics, what),
        "ltkernels statistics FEATURES.npz --out ours.npz",
        "ltkernels statistics --merge ours.npz theirs.npz --out both.npz",
        description="Writes count, mean and scatter of every class of your features to a file, or merges such files of several\n"
        "parties, and prints the diversity V of every class. The file holds no samples, but exact means and covariances: it\n"
        "is not private in the sense of differential privacy, and a class of one sample is its mean.",
    )
    _add_features(command, "features (n, d), labels (n,) and class_names if you have them; or features as .npy", "?")
    merge = "merge these files of statistics, classes by name"
    command.add_argument("--merge", type=Path, nargs="+", metavar="PARTY.npz", help=merge)
    parts.add_file_out(command, None, "write the statistics here (default: print only)")


def _add_features(command: argparse.ArgumentParser, arrays: str, nargs: str | None = None) -> None:
    command.add_argument("features", type=Path, nargs=nargs, metavar="FEATURES.npz", help=f"arrays {arrays}")
    command.add_argument("--labels", type=Path, metavar="LABELS.npy", help="the labels of an .npy file of features")


def _select(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    quiet = arguments.quiet or not parts.is_first()
    with parts.Progress(quiet) as progress:
        result = train.select_features(
            arguments.features,
            parts.config_of(arguments),
            out=arguments.out,
            labels=arguments.labels,
            classes=arguments.classes,
            m=arguments.m,
            n_sets=arguments.sets,
            force=arguments.force,
            progress=progress,
        )
    if quiet:
        return
    for note in result["notes"]:
        print(f"note: {note}")
    names = result["class_names"]
    numbers = range(len(result["class_counts"]))
    said = [f"class {c}" if names is None else f"class {c} ({names[c]})" for c in numbers]
    for entry in result["classes"]:
        name, arm, random = said[entry["label"]], entry["arms"][result["selected"]], entry["arms"]["random-0"]
        head = entry["similar_head"]
        print(
            f"{name}: {entry['need']} added {'from its pool' if head is None else f'in the spread of {said[head]}'}, "
            f"FDG {arm['fdg']:.3f} (at random {random['fdg']:.3f}), "
            f"offset {arm['offset']:.2f} (at random {random['offset']:.2f})"
        )
        if arm["far"]:
            print(f"{name}: the added samples lie far from the real ones (offset above 3); FDG does not see this")
        if not entry["reached"] or entry["note"]:
            missed = "what was asked for was not reached; this is the nearest set found"
            print(f"{name}: {entry['note'] or missed}")
    if arguments.sets:
        sets = result["sets"]
        print(
            f"{len(sets['kept'])} sets, FDG_Tail {sets['fdg_tail'][0]:.3f} to {sets['fdg_tail'][-1]:.3f}, uniform to "
            f"{sets['spacing_error']:.2f} of the spacing"
        )
    if result["picture"] is None:
        print('no picture: matplotlib is missing (pip install "ltkernels[train]")')
    print(f"{result['seconds']:.1f} s; results in {arguments.out}")


def _audit(arguments: argparse.Namespace) -> None:
    from ltkernels.train import distributed
    from ltkernels.train.report import audit_file

    distributed.refuse("an audit")
    result = audit_file(arguments.features, out=arguments.out, other=arguments.against, force=arguments.force)
    counts, errors = result["class_counts"], result["label_errors"]
    print(f"{sum(counts)} samples in {len(counts)} classes, {max(counts)} to {min(counts)} a class")
    found = "" if errors is None else f"{len(errors)}; "
    print(f"suspected label errors: {found}{result['label_errors_note']}")
    print(f"results in {arguments.out}")


def _statistics(arguments: argparse.Namespace) -> None:
    from ltkernels.train import statistics

    if (arguments.features is None) == (arguments.merge is None):
        raise ValueError("statistics takes either FEATURES.npz or --merge PARTY.npz ...")
    if arguments.merge is not None and arguments.labels:
        raise ValueError("--labels is for an .npy file of features, not for --merge")
    given = {"out": arguments.out, "force": arguments.force}
    if arguments.merge is not None:
        result = statistics.merge_statistics(arguments.merge, **given)
    else:
        result = statistics.write_statistics(arguments.features, labels=arguments.labels, **given)
    if not parts.is_first():
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
