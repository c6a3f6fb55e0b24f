"""`ltkernels predict` and `ltkernels features`: what a finished run's model says of new samples."""

import argparse
from pathlib import Path
from typing import Any

from ltkernels.commands.parts import examples


def add_parser(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="classes and probabilities of new files, from a run's model",
        epilog=examples("ltkernels predict runs/mine NEW_PICTURES --out new.csv --prior uniform"),
    )
    predict.add_argument("run_dir", type=Path, metavar="RUN", help="result folder, or one of its checkpoints/*.pt")
    predict.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="image files, folders of them, or one .npz, .npy or .csv"
    )
    predict.add_argument(
        "--out", type=Path, default=Path("predictions.csv"), help="a .csv or .parquet file (default: predictions.csv)"
    )
    predict.add_argument("--logits", action="store_true", help="also every class's logit")
    predict.add_argument(
        "--prior", type=_prior, help="class shares to expect: uniform, train or P,P,... (default: no correction)"
    )
    _shared(predict)
    features = commands.add_parser(
        "features",
        help="features of a run's data, or of new files, for select, audit, statistics",
        epilog=examples("ltkernels features runs/mine --split test --out TEST.npz"),
    )
    features.add_argument("run_dir", type=Path, metavar="RUN", help="result folder")
    features.add_argument(
        "files", type=Path, nargs="*", metavar="FILE", help="as for predict (default: the run's own data)"
    )
    features.add_argument("--out", type=Path, default=Path("features.npz"), help="an .npz file (default: features.npz)")
    features.add_argument(
        "--split", choices=("train", "test"), default="train", help="of the run's data (default: train)"
    )
    _shared(features)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(carry_out=run)
    parser.add_argument("--variant", help="which model of the run (default: the chosen one)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")


def _prior(text: str) -> str | list[float]:
    return text if text in ("uniform", "train") else [float(part) for part in text.split(",")]


def run(arguments: argparse.Namespace) -> None:
    from ltkernels.train import predictor

    shared = {name: getattr(arguments, name) for name in ("out", "variant", "device", "force")}
    if arguments.command == "predict":
        given = {"prior": arguments.prior, "logits": arguments.logits}
        count = predictor.predict_files(arguments.run_dir, arguments.files, **given, **shared)
        print(f"{count} predictions in {arguments.out}")
    else:
        count = predictor.write_features(arguments.run_dir, arguments.files, split=arguments.split, **shared)
        print(f"features of {count} samples in {arguments.out}")
