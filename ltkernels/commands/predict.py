"""`ltkernels predict`, `features` and `export`: a finished run's model in use."""

import argparse
from pathlib import Path
from typing import Any

from ltkernels._names import did_you_mean
from ltkernels.commands import parts

_ONE = "result folder, or one of its checkpoints/*.pt"


def add_parsers(commands: Any) -> None:
    predict = parts.add_command(
        *(commands, "predict", _predict, "classes and probabilities of new files, from a run's model"),
        "ltkernels predict runs/mine NEW_PICTURES --out new.csv --prior uniform",
    )
    parts.add_run(predict, _ONE)
    what = "image files, folders of them, or one .npz, .npy or .csv"
    predict.add_argument("files", type=Path, nargs="+", metavar="FILE", help=what)
    parts.add_file_out(predict, "predictions.csv", "a .csv or .parquet file")
    predict.add_argument("--logits", action="store_true", help="also every class's logit")
    what = "class shares to expect: uniform, train or P,P,... (default: no correction)"
    predict.add_argument("--prior", type=_prior, help=what)

    features = parts.add_command(
        *(commands, "features", _features, "features of a run's data, or of new files, for select, audit, statistics"),
        "ltkernels features runs/mine --split test --out TEST.npz",
    )
    parts.add_run(features)
    what = "as for predict (default: the run's own data)"
    features.add_argument("files", type=Path, nargs="*", metavar="FILE", help=what)
    parts.add_file_out(features, "features.npz", "an .npz file")
    what = "of the run's data (default: train)"
    features.add_argument("--split", choices=("train", "test"), default="train", help=what)

    export = parts.add_command(
        *(commands, "export", _export, "a run's model as one file: torch.export, ONNX or weights"),
        "ltkernels export runs/mine --out mine.onnx",
    )
    parts.add_run(export, _ONE)
    what = ".pt2 (torch.export), .onnx, .safetensors or .pt (weights); a .json beside says what goes in and out"
    parts.add_file_out(export, "model.pt2", what)
    for command in (predict, features, export):
        command.add_argument("--variant", help="which model of the run (default: the chosen one)")
    for command in (predict, features):
        command.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def _prior(text: str) -> str | list[float]:
    if text in ("uniform", "train"):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be uniform, train or one number a class (P,P,...), got {text!r}{did_you_mean(text, ('uniform', 'train'))}"
        ) from None


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("out", "variant", "force", *names)}


def _predict(arguments: argparse.Namespace) -> None:
    from ltkernels.train import predictor

    given = _given(arguments, "device", "prior", "logits")
    with parts.Progress(quiet=False) as progress:
        count = predictor.predict_files(arguments.run_dir, arguments.files, progress=progress, **given)
    print(f"{count} predictions in {arguments.out}")


def _features(arguments: argparse.Namespace) -> None:
    from ltkernels.train import predictor

    given = _given(arguments, "device", "split")
    with parts.Progress(quiet=False) as progress:
        count = predictor.write_features(arguments.run_dir, arguments.files, progress=progress, **given)
    print(f"{count} samples' features in {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from ltkernels.train.export import export

    beside = export(arguments.run_dir, **_given(arguments))
    print(f"model in {arguments.out}, described in {beside}")
