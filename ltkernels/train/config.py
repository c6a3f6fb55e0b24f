"""The trainer's settings: one frozen dataclass is the list of flags, of TOML keys and of what config.toml stores."""

import dataclasses
import importlib
import math
import reprlib
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ltkernels._names import did_you_mean, plain
from ltkernels.train.batching import MIXERS
from ltkernels.train.data import PROFILES, names
from ltkernels.train.logs import parse_logs
from ltkernels.train.recipe import parse_lr_schedule
from ltkernels.train.samplers import SAMPLERS
from ltkernels.train.schedules import SCHEDULES, loss_name, parse_options

_MAX_TEXT = 4096  # characters of a setting: the longest path
# Headings of --help, by the first setting under each.
HEADINGS = {
    "data": "data", "model": "model and loss", "sampler": "batches and schedules", "pretrain": "stages", "epochs": "optimisation",
    "seed": "machine", "select": "selection and retraining",
}  # fmt: skip
# What may follow the first stage; `stage2.py` holds their functions.
STAGES = ("crt", "lws", "tau-norm", "ncm", "ofa", "fdc")


def _setting(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help text; `positive`, `at_least`, `at_most` and `choices` are checked in `Config`."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run. None means "what suits the data set (or the loss)".

    Raises ValueError or TypeError naming the setting and the value on construction.
    """

    data: str = _setting("digits-lt", f"data set: {', '.join(names())} or a registered name")
    data_dir: str | None = _setting(None, "folder that holds the data set's files")
    image_size: int | None = _setting(None, "side in pixels that image files are brought to", at_least=1)
    imbalance: float | None = _setting(None, "imbalance factor n_max / n_min (default: the data set's)", at_least=1)
    profile: str = _setting("exp", "how class sizes fall from n_max to n_min", choices=PROFILES)
    data_seed: int = _setting(0, "which images the long-tailed set keeps; apart from --seed on purpose", at_least=0)
    test_split: float = _setting(
        0.2, "share of each class that becomes the test set where the data has none", positive=True, at_most=0.5
    )
    val_split: float | None = _setting(
        None, "share of each class held out of training for the numbers of each epoch (the test set is then read once)",
        positive=True, at_most=0.5,
    )  # fmt: skip
    model: str | None = _setting(
        None,
        "cnn, mlp, wide, resnet32 or an import path package.module:Name (default: cnn for images, wide for vectors)",
    )
    weights: str | None = _setting(
        None, "file of pretrained weights for the backbone: .safetensors, or .pt with weights alone"
    )
    freeze: bool = _setting(
        False, "leave the backbone as it is: its features are computed once, epochs train the classifier"
    )
    head_init: str = _setting(
        "random",
        "first rows of a cosine classifier; means: the mean features of the classes",
        choices=("random", "means"),
    )
    head: str | None = _setting(
        None, "classifier (default: the one the loss is defined on)", choices=("linear", "cosine")
    )
    loss: str = _setting("logit_adjusted", "the loss to compare with plain cross-entropy")
    loss_options: str = _setting("", "options of the loss, as tau=1.25,gamma=0.15")
    sampler: str = _setting("instance", "class frequencies of the batches", choices=tuple(SAMPLERS))
    schedule: str = _setting(
        "none",
        "what changes late: drw class-balanced weights, drs class-balanced sampling, ga KPS gradient adjustment, "
        "tla_adrw truncated logit adjustment",
        choices=tuple(SCHEDULES),
    )
    schedule_start: int | None = _setting(
        None, "its first epoch, from 0 (default: 0.8 of the epochs, ga: 0.6)", at_least=0
    )
    schedule_nu: float = _setting(1.0, "tla_adrw: exponent of the weights", at_least=0)
    mix: str = _setting("none", "mixing of images in a batch", choices=("none", *MIXERS))
    mix_alpha: float = _setting(1.0, "mixing: shares are drawn from Beta(alpha, alpha)", positive=True)
    mix_prob: float | None = _setting(
        None, "mixing: probability a batch (default: 1; cutmix and cmo: 0.5)", at_least=0, at_most=1
    )
    crop: int | None = _setting(
        None, "random crop after padding by so many pixels (default: the data set's, or 0)", at_least=0
    )
    flip: bool | None = _setting(None, "random horizontal flip (default: the data set's, or off)")
    pretrain: str = _setting("none", "self-supervised pre-training of the backbone", choices=("none", "rotation"))
    pretrain_epochs: int | None = _setting(None, "its epochs (default: --epochs)", at_least=1)
    stage2: str = _setting("none", "what follows on frozen features", choices=("none", *STAGES))
    post_hoc: str = _setting(
        "none", "tau: post-hoc logit adjustment, tau tuned on held-out data", choices=("none", "tau")
    )
    holdout: float = _setting(
        0.1, "share of each class held out of training where tau is tuned", positive=True, at_most=0.5
    )
    relative: bool = _setting(False, "train: also relative accuracy, by a second run on as many samples spread evenly")
    epochs: int | None = _setting(None, "passes over the training set (default: the data set's)", at_least=1)
    batch_size: int | None = _setting(None, "samples a step (default: the data set's)", at_least=1)
    accumulate: int = _setting(1, "parts in which a step's samples are computed, to save memory", at_least=1)
    optimizer: str = _setting(
        "sgd", "adamw decays matrices alone: no biases, norms or cosine classifiers", choices=("sgd", "adamw")
    )
    lr: float | None = _setting(None, "peak learning rate (default: the data set's; adamw: 0.001)", positive=True)
    lr_backbone: float | None = _setting(None, "peak learning rate of the backbone (default: --lr)", positive=True)
    clip: float | None = _setting(None, "largest norm of a step's gradient (default: any)", positive=True)
    lr_schedule: str = _setting("cosine", "cosine, or step:160=0.01,180=0.0001 (factors of lr from an epoch on)")
    warmup: float | None = _setting(
        None, "epochs of linear warm-up (default: 5 % of the steps; step: none)", at_least=0
    )
    momentum: float = _setting(0.9, "momentum of sgd", at_least=0, at_most=1)
    weight_decay: float = _setting(5e-4, "L2 penalty of sgd; decay of adamw", at_least=0)
    seed: int = _setting(0, "initialisation, batch order, synthesis and clustering", at_least=0)
    device: str = _setting("cpu", "torch device: cpu, cuda, cuda:1")
    threads: int | None = _setting(None, "torch's CPU threads (default: the data set's, or torch's)", at_least=1)
    precision: str = _setting("fp32", "autocast of the forward pass", choices=("fp32", "bf16", "fp16"))
    channels_last: bool = _setting(True, "memory layout of images and convolutions")
    compile: str = _setting(
        "off", "torch.compile; reduce-overhead uses CUDA graphs", choices=("off", "default", "reduce-overhead")
    )
    checkpoint_seconds: float = _setting(30.0, "time between the checkpoints that --resume reads", at_least=0)
    log: str = _setting("", "further logs besides metrics.jsonl: csv, tensorboard, or csv,tensorboard")
    select: str = _setting(
        "mean",
        "which augmented samples complete the tail. mean: at random, but with the mean of the real samples; match: also with at "
        "most the FDG that real ones of a head class bring; match:X: with that FDG; random. The paper's max, min and quantile:Q, "
        "and target:X, pick by FDG alone: max was measured to be worse than random",
    )
    share: float = _setting(
        0.5,
        "most that synthetic samples make up of a completed class; real ones are repeated for the rest",
        positive=True,
        at_most=1,
    )
    features_from: str = _setting("ce", "which training gives features", choices=("ce", "loss"))
    head_ratio: float = _setting(0.9, "head classes hold more than this share of the samples", positive=True, at_most=1)
    pool_factor: float = _setting(4.0, "size of an augmented pool, in units of what the class needs", at_least=1)
    subset_size: int | None = _setting(
        None, "samples that are picked together (default: 10 for max and min, 1 for target and quantile)", at_least=1
    )
    similarity: str = _setting("euclidean", "FDC: how the head class is chosen", choices=("euclidean", "cosine"))
    shrinkage: float = _setting(0.1, "FDC: covariance shrunk to its mean variance by this share", at_least=0, at_most=1)
    random_repeats: int = _setting(5, "random selections to compare with (their spread is reported)", at_least=1)
    retrain_epochs: int = _setting(20, "passes of the classifier's retraining", at_least=1)
    retrain_lr: float = _setting(0.1, "peak learning rate of the classifier's retraining", positive=True)

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", loss_name(self.loss))
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        parse_select(self.select)
        parse_lr_schedule(self.lr_schedule)
        parse_options(self.loss_options)
        parse_logs(self.log)

    def replace(self, **changes: Any) -> "Config":
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; unset ones are None."""
        return dataclasses.asdict(self)


def kind_of(item: dataclasses.Field) -> type:
    """str, int, float or bool: what a setting holds where it is not None."""
    return next(kind for kind in (str, int, float, bool) if kind in (item.type, *typing.get_args(item.type)))


def spelled(value: str, choices: Sequence[str]) -> str:
    """`value` as `choices` spell it: `TLA-ADRW` is `tla_adrw`, `tau_norm` is `tau-norm`."""
    return next((c for c in choices if plain(c) == plain(value)), value)


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """The value in the field's own type; ValueError or TypeError name the setting."""
    if value is None and item.default is None:
        return None
    kind = kind_of(item)
    number = kind is float and isinstance(value, int)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"{item.name} must have 64 bits at most, got an integer of {value.bit_length()}")
    if isinstance(value, bool) is not (kind is bool) or not (isinstance(value, kind) or number):
        raise TypeError(f"{item.name} must be {kind.__name__}, got {reprlib.repr(value)}")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise ValueError(f"{item.name} must have {_MAX_TEXT} characters at most, got {len(value)}")
    value = kind(value)
    rule = item.metadata
    if "choices" in rule:
        value = spelled(value, rule["choices"])
    if "choices" in rule and value not in rule["choices"]:
        hint = did_you_mean(value, rule["choices"])
        raise ValueError(f"{item.name} must be one of {', '.join(rule['choices'])}, got {value!r}{hint}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{item.name} must be finite, got {value}")
    if rule.get("positive") and value <= 0:
        raise ValueError(f"{item.name} must be positive, got {value}")
    if "at_least" in rule and value < rule["at_least"]:
        raise ValueError(f"{item.name} must be at least {rule['at_least']}, got {value}")
    if "at_most" in rule and value > rule["at_most"]:
        raise ValueError(f"{item.name} must be at most {rule['at_most']}, got {value}")
    return value


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
