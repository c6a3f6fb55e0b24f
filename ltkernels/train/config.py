"""The trainer's settings: one frozen dataclass is the list of flags, of TOML keys and of what config.toml stores."""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ltkernels._names import did_you_mean
from ltkernels._settings import check, setting
from ltkernels.train.batching import MIXERS
from ltkernels.train.data import PROFILES, names
from ltkernels.train.recipe import parse_lr_schedule
from ltkernels.train.samplers import SAMPLERS
from ltkernels.train.schedules import SCHEDULES, loss_name, parse_options

# Headings of --help, by the first setting under each.
HEADINGS = {
    "data": "data", "model": "model and loss", "sampler": "batches and schedules", "pretrain": "stages", "epochs": "optimisation",
    "seed": "machine", "select": "selection and retraining",
}  # fmt: skip
# What may follow the first stage; `stage2.py` holds their functions.
STAGES = ("crt", "lws", "tau-norm", "ncm", "ofa", "fdc")


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run. None means "what suits the data set (or the loss)".

    Raises ValueError or TypeError naming the setting and the value on construction.
    """

    data: str = setting("digits-lt", f"data set: {', '.join(names())} or a registered name")
    data_dir: str | None = setting(None, "folder that holds the data set's files")
    image_size: int | None = setting(None, "side in pixels that image files are brought to", at_least=1)
    imbalance: float | None = setting(None, "imbalance factor n_max / n_min (default: the data set's)", at_least=1)
    profile: str = setting("exp", "how class sizes fall from n_max to n_min", choices=PROFILES)
    data_seed: int = setting(0, "which images the long-tailed set keeps; apart from --seed on purpose", at_least=0)
    test_split: float = setting(
        0.2, "share of each class that becomes the test set where the data has none", positive=True, at_most=0.5
    )
    val_split: float | None = setting(
        None, "share of each class held out of training for the numbers of each epoch (the test set is then read once)",
        positive=True, at_most=0.5,
    )  # fmt: skip
    model: str | None = setting(
        None,
        "cnn, mlp, wide, resnet32 or an import path package.module:Name (default: cnn for images, wide for vectors)",
    )
    weights: str | None = setting(
        None, "file of pretrained weights for the backbone: .safetensors, or .pt with weights alone"
    )
    init: str | None = setting(
        None,
        "train: a finished run, or one of its .pt files, to go on from: more epochs on its backbone and classifier",
    )
    freeze: bool = setting(
        False, "leave the backbone as it is: its features are computed once, epochs train the classifier"
    )
    head_init: str = setting(
        "random",
        "first rows of a cosine classifier; means: the mean features of the classes",
        choices=("random", "means"),
    )
    head: str | None = setting(
        None, "classifier (default: the one the loss is defined on)", choices=("linear", "cosine")
    )
    loss: str = setting("logit_adjusted", "the loss to compare with plain cross-entropy")
    loss_options: str = setting("", "options of the loss, as tau=1.25,gamma=0.15")
    sampler: str = setting("instance", "class frequencies of the batches", choices=tuple(SAMPLERS))
    schedule: str = setting(
        "none",
        "what changes late: drw class-balanced weights, drs class-balanced sampling, ga KPS gradient adjustment, "
        "tla_adrw truncated logit adjustment",
        choices=tuple(SCHEDULES),
    )
    schedule_start: int | None = setting(
        None, "its first epoch, from 0 (default: 0.8 of the epochs, ga: 0.6)", at_least=0
    )
    schedule_nu: float = setting(1.0, "tla_adrw: exponent of the weights", at_least=0)
    mix: str = setting("none", "mixing of images in a batch", choices=("none", *MIXERS))
    mix_alpha: float = setting(1.0, "mixing: shares are drawn from Beta(alpha, alpha)", positive=True)
    mix_prob: float | None = setting(
        None, "mixing: probability a batch (default: 1; cutmix and cmo: 0.5)", at_least=0, at_most=1
    )
    crop: int | None = setting(
        None, "random crop after padding by so many pixels (default: the data set's, or 0)", at_least=0
    )
    flip: bool | None = setting(None, "random horizontal flip (default: the data set's, or off)")
    pretrain: str = setting("none", "self-supervised pre-training of the backbone", choices=("none", "rotation"))
    pretrain_epochs: int | None = setting(None, "its epochs (default: --epochs)", at_least=1)
    stage2: str = setting("none", "what follows on frozen features", choices=("none", *STAGES))
    post_hoc: str = setting(
        "none", "tau: post-hoc logit adjustment, tau tuned on held-out data", choices=("none", "tau")
    )
    holdout: float = setting(
        0.1, "share of each class held out of training where tau is tuned", positive=True, at_most=0.5
    )
    relative: bool = setting(False, "train: also relative accuracy, by a second run on as many samples spread evenly")
    epochs: int | None = setting(None, "passes over the training set (default: the data set's)", at_least=1)
    batch_size: int | None = setting(None, "samples a step (default: the data set's)", at_least=1)
    accumulate: int = setting(1, "parts in which a step's samples are computed, to save memory", at_least=1)
    optimizer: str = setting(
        "sgd", "adamw decays matrices alone: no biases, norms or cosine classifiers", choices=("sgd", "adamw")
    )
    lr: float | None = setting(None, "peak learning rate (default: the data set's; adamw: 0.001)", positive=True)
    lr_backbone: float | None = setting(None, "peak learning rate of the backbone (default: --lr)", positive=True)
    clip: float | None = setting(None, "largest norm of a step's gradient (default: any)", positive=True)
    lr_schedule: str = setting("cosine", "cosine, or step:160=0.01,180=0.0001 (factors of lr from an epoch on)")
    warmup: float | None = setting(None, "epochs of linear warm-up (default: 5 % of the steps; step: none)", at_least=0)
    momentum: float = setting(0.9, "momentum of sgd", at_least=0, at_most=1)
    weight_decay: float | None = setting(
        None,
        "L2 penalty of sgd; decay of adamw (default: 5e-4; vectors: one over the samples, if that is more)",
        at_least=0,
    )
    seed: int = setting(0, "initialisation, batch order, synthesis and clustering", at_least=0)
    device: str = setting("cpu", "torch device: cpu, cuda, cuda:1")
    threads: int | None = setting(None, "torch's CPU threads (default: the data set's, or torch's)", at_least=1)
    precision: str = setting("fp32", "autocast of the forward pass", choices=("fp32", "bf16", "fp16"))
    channels_last: bool = setting(True, "memory layout of images and convolutions")
    compile: str = setting(
        "off", "torch.compile; reduce-overhead uses CUDA graphs", choices=("off", "default", "reduce-overhead")
    )
    checkpoint_seconds: float = setting(30.0, "time between the checkpoints that --resume reads", at_least=0)
    log: str = setting("none", "a further log beside metrics.jsonl", choices=("none", "tensorboard"))
    select: str = setting(
        "mean",
        "which augmented samples complete the tail. mean: at random, but with the mean of the real samples; match: also with at "
        "most the FDG that real ones of a head class bring; match:X: with that FDG; random. The paper's max, min and quantile:Q, "
        "and target:X, pick by FDG alone: max was measured to be worse than random",
    )
    share: float = setting(
        0.5,
        "most that synthetic samples make up of a completed class; real ones are repeated for the rest",
        positive=True,
        at_most=1,
    )
    features_from: str = setting("ce", "which training gives features", choices=("ce", "loss"))
    head_ratio: float = setting(0.9, "head classes hold more than this share of the samples", positive=True, at_most=1)
    pool_factor: float = setting(4.0, "size of an augmented pool, in units of what the class needs", at_least=1)
    subset_size: int | None = setting(
        None, "samples that are picked together (default: 10 for max and min, 1 for target and quantile)", at_least=1
    )
    similarity: str = setting("euclidean", "FDC: how the head class is chosen", choices=("euclidean", "cosine"))
    shrinkage: float = setting(0.1, "FDC: covariance shrunk to its mean variance by this share", at_least=0, at_most=1)
    random_repeats: int = setting(
        5, "random draws to compare with, and in run as many of the chosen selection and of max", at_least=1
    )
    retrain_epochs: int = setting(20, "passes of the classifier's retraining", at_least=1)
    retrain_lr: float = setting(0.1, "peak learning rate of the classifier's retraining", positive=True)

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", loss_name(self.loss))
        check(self)
        parse_select(self.select)
        parse_lr_schedule(self.lr_schedule)
        parse_options(self.loss_options)

    def replace(self, **changes: Any) -> "Config":
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; unset ones are None."""
        return dataclasses.asdict(self)


def parse_select(text: str) -> tuple[str, float | None]:
    """`"max"` -> ("max", None), `"target:0.3"` -> ("target", 0.3). Raises ValueError naming the value."""
    from ltkernels.selection._arms import parse_mode

    try:
        found = parse_mode(text)
        number = next((value for name, value in found.items() if name != "mode"), None)
        if isinstance(number, tuple):
            raise ValueError(text)
    except ValueError:
        raise ValueError(
            "select must be match, match:X, mean, random, max, min, quantile:Q or target:X with a finite number X (Q from 0 to "
            f"1), got {text!r}"
        ) from None
    return found["mode"], number


def from_mapping(values: Mapping[str, Any], source: str) -> Config:
    """A Config from a mapping; ValueError and TypeError name `source`, and every unknown key."""
    known = [item.name for item in fields(Config)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"{source}: unknown key {', '.join(unknown)[:200]}{hint}; known: {', '.join(known)}")
    try:
        return Config(**values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{source}: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file. Raises FileNotFoundError, or ValueError naming the file for bad syntax."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise ImportError('reading TOML on Python 3.10 needs tomli: pip install "ltkernels[train]"') from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a TOML file: {str(error)[:200]}") from error


def to_toml(config: Config) -> str:
    """The settings as a flat TOML table that `read_toml` and `from_mapping` turn back into an equal Config.

    TOML has no null: unset settings are left out.
    """
    lines = [f"{name} = {_toml_value(value)}" for name, value in config.to_dict().items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml_value(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    escapes = {'"': '\\"', "\\": "\\\\"}
    # TOML forbids bare control characters in a basic string.
    text = "".join(escapes.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c) for c in value)
    return f'"{text}"'
