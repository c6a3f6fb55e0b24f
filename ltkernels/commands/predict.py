"""`ltkernels predict`, `features` and `export`: a finished run's model in use."""

import argparse
from pathlib import Path
from typing import Any

from ltkernels.commands.parts import Progress, examples


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
    export = commands.add_parser(
        "export",
        help="a run's model as one file: torch.export, ONNX or weights",
        epilog=examples("ltkernels export runs/mine --out mine.onnx"),
    )
    export.set_defaults(carry_out=run)
    export.add_argument("run_dir", type=Path, metavar="RUN", help="result folder, or one of its checkpoints/*.pt")
    export.add_argument(
        "--out", type=Path, default=Path("model.pt2"),
        help=".pt2 (torch.export), .onnx, .safetensors or .pt (weights); a .json beside says what goes in and out (default: model.pt2)",
    )  # fmt: skip
    export.add_argument("--variant", help="which model of the run (default: the chosen one)")
    export.add_argument("--force", action="store_true", help="replace an existing --out")


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(carry_out=run)
    parser.add_argument("--variant", help="which model of the run (default: the chosen one)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")


def _prior(text: str) -> str | list[float]:
    return text if text in ("uniform", "train") else [float(part) for part in text.split(",")]


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "export":
        from ltkernels.train.export import export

        given = {"variant": arguments.variant, "force": arguments.force}
        beside = export(arguments.run_dir, arguments.out, **given)
        print(f"model in {arguments.out}, described in {beside}")
        return
    from ltkernels.train import predictor

    shared = {name: getattr(arguments, name) for name in ("out", "variant", "device", "force")}
    with Progress(quiet=False) as progress:
        if arguments.command == "predict":
            given = {"prior": arguments.prior, "logits": arguments.logits, "progress": progress}
            count = predictor.predict_files(arguments.run_dir, arguments.files, **given, **shared)
        else:
            given = {"split": arguments.split, "progress": progress}
            count = predictor.write_features(arguments.run_dir, arguments.files, **given, **shared)
    what = "predictions" if arguments.command == "predict" else "samples' features"
    print(f"{count} {what} in {arguments.out}")
