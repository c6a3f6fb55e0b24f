"""`ltkernels select`: complete the tail classes of features of one's own."""

import argparse
from pathlib import Path
from typing import Any

from ltkernels.commands.parts import Progress, add_output, add_settings, config_of, examples, is_first, usage_of

_SETTINGS = (
    "seed", "select", "head_ratio", "pool_factor", "subset_size", "share", "similarity", "shrinkage", "random_repeats",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    select = commands.add_parser(
        "select",
        help="select synthetic tail features for features of your own",
        usage=usage_of("select FEATURES.npz"),
        epilog=examples(
            "ltkernels select FEATURES.npz --out selection                   the tail, from pools of the file or made for it",
            "ltkernels select FEATURES.npz --classes 7 9 --select match --share 0.3",
            "ltkernels select FEATURES.npy --labels LABELS.npy --sets 50     50 sets of uniformly spaced FDG",
        ),
    )
    select.set_defaults(carry_out=run)
    select.add_argument(
        "features",
        type=Path,
        metavar="FEATURES.npz",
        help="arrays features (n, d) and labels (n,); pool, pool_labels and pool_files if you have them; or features as .npy",
    )
    select.add_argument("--labels", type=Path, metavar="LABELS.npy", help="the labels of an .npy file of features")
    select.add_argument("--classes", type=int, nargs="+", metavar="C", help="complete these (default: the tail)")
    select.add_argument("--m", type=int, help="subsets to pick per class (default: up to the largest class)")
    select.add_argument("--sets", type=int, default=0, help="also this many sets of uniformly spaced FDG (default: 0)")
    add_settings(select, _SETTINGS)
    add_output(select, Path("selection"), resumes=False)


def run(arguments: argparse.Namespace) -> None:
    from ltkernels import train

    quiet = arguments.quiet or not is_first()
    with Progress(quiet) as progress:
        result = train.select_features(
            arguments.features,
            config_of(arguments),
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
    for entry in result["classes"]:
        arms = entry["arms"]
        source = entry["similar_head"]
        source = "from its pool" if source is None else f"in the spread of class {source}"
        print(
            f"class {entry['label']}: {entry['need']} added {source}, "
            f"FDG {arms[result['selected']]['fdg']:.3f} (at random {arms['random-0']['fdg']:.3f}), "
            f"offset {arms[result['selected']]['offset']:.2f} (at random {arms['random-0']['offset']:.2f})"
        )
        if arms[result["selected"]]["far"]:
            print(
                f"class {entry['label']}: the added samples lie far from the real ones (offset above 3); FDG does not see this"
            )
        if not entry["reached"] or entry["note"]:
            print(
                f"class {entry['label']}: {entry['note'] or 'what was asked for was not reached; this is the nearest set found'}"
            )
    if arguments.sets:
        sets = result["sets"]
        print(
            f"{len(sets['kept'])} sets, FDG_Tail {sets['fdg_tail'][0]:.3f} to {sets['fdg_tail'][-1]:.3f}, uniform to "
            f"{sets['spacing_error']:.2f} of the spacing"
        )
    if result["picture"] is None:
        print('no picture: matplotlib is missing (pip install "ltkernels[train]")')
    print(f"{result['seconds']:.1f} s; results in {arguments.out}")
