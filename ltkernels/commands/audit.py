"""`ltkernels audit`: what a labelled set of features holds."""

import argparse
from pathlib import Path
from typing import Any

from ltkernels.commands.parts import examples


def add_parser(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="counts, diversity, suspected label errors and drift of your features",
        epilog=examples("ltkernels audit FEATURES.npz --against LAST_MONTH.npz --out audit.html"),
    )
    audit.set_defaults(carry_out=run)
    audit.add_argument("features", type=Path, metavar="FEATURES.npz", help="arrays features (n, d) and labels (n,)")
    audit.add_argument("--against", type=Path, metavar="OTHER.npz", help="a second set, to look for drift")
    audit.add_argument("--out", type=Path, default=Path("audit.html"), help="the page (default: audit.html)")
    audit.add_argument("--force", action="store_true", help="replace an existing --out")


def run(arguments: argparse.Namespace) -> None:
    from ltkernels.train import distributed
    from ltkernels.train.report import audit_file

    distributed.refuse("an audit")
    result = audit_file(arguments.features, out=arguments.out, other=arguments.against, force=arguments.force)
    counts, errors = result["class_counts"], result["label_errors"]
    print(f"{sum(counts)} samples in {len(counts)} classes, {max(counts)} to {min(counts)} a class")
    found = "" if errors is None else f"{len(errors)}; "
    print(f"suspected label errors: {found}{result['label_errors_note']}")
    print(f"results in {arguments.out}")
