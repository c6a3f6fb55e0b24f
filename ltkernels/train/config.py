"""The trainer's settings: one frozen dataclass is the list of flags, of TOML keys and of what config.toml stores."""

import dataclasses
import importlib
import math
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ltkernels.train.data import PROFILES, names


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
    model: str = _setting("cnn", "cnn, mlp, resnet32 or an import path package.module:Name")
    head: str | None = _setting(
        None, "classifier (default: the one the loss is defined on)", choices=("linear", "cosine")
    )
    loss: str = _setting("logit_adjusted", "the loss to compare with plain cross-entropy")
    sampler: str = _setting("instance", "class frequencies of the batches", choices=("instance", "balanced", "sqrt"))
    schedule: str = _setting("none", "drw: class-balanced weights for the last fifth", choices=("none", "drw"))
    epochs: int | None = _setting(None, "passes over the training set (default: the data set's)", at_least=1)
    batch_size: int | None = _setting(None, "samples a step (default: the data set's)", at_least=1)
    lr: float | None = _setting(None, "peak learning rate of SGD (default: the data set's)", positive=True)
    weight_decay: float = _setting(5e-4, "L2 penalty of SGD", at_least=0)
    seed: int = _setting(0, "initialisation, batch order, synthesis and clustering", at_least=0)
    device: str = _setting("cpu", "torch device: cpu, cuda, cuda:1")
    threads: int | None = _setting(None, "torch's CPU threads (default: the data set's, or torch's)", at_least=1)
    select: str = _setting("max", "which augmented subsets complete the tail: max, min, target:X (FDG) or random")
    features_from: str = _setting("ce", "which training gives features", choices=("ce", "loss"))
    head_ratio: float = _setting(0.9, "head classes hold more than this share of the samples", positive=True, at_most=1)
    pool_factor: float = _setting(4.0, "size of an augmented pool, in units of what the class needs", at_least=1)
    subset_size: int = _setting(10, "samples in a subset of the pool", at_least=1)
    similarity: str = _setting("euclidean", "FDC: how the head class is chosen", choices=("euclidean", "cosine"))
    shrinkage: float = _setting(0.1, "FDC: covariance shrunk to its mean variance by this share", at_least=0, at_most=1)
    random_repeats: int = _setting(5, "random selections to compare with (their spread is reported)", at_least=1)
    retrain_epochs: int = _setting(20, "passes of the classifier's retraining", at_least=1)
    retrain_lr: float = _setting(0.1, "peak learning rate of the classifier's retraining", positive=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        parse_select(self.select)

    def replace(self, **changes: Any) -> "Config":
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; unset ones are None."""
        return dataclasses.asdict(self)


def kind_of(item: dataclasses.Field) -> type:
    """str, int or float: what a setting holds where it is not None."""
    return next(kind for kind in (str, int, float) if kind in (item.type, *typing.get_args(item.type)))


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """The value in the field's own type; ValueError or TypeError name the setting."""
    if value is None and item.default is None:
        return None
    kind = kind_of(item)
    number = kind is float and isinstance(value, int)
    if isinstance(value, bool) or not (isinstance(value, kind) or number):
        raise TypeError(f"{item.name} must be {kind.__name__}, got {value!r}")
    value = kind(value)
    rule = item.metadata
    if "choices" in rule and value not in rule["choices"]:
        raise ValueError(f"{item.name} must be one of {', '.join(rule['choices'])}, got {value!r}")
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
    if text in ("max", "min", "random"):
        return text, None
    mode, _, number = text.partition(":")
    if mode == "target":
        try:
            target = float(number)
        except ValueError:
            target = math.nan
        if math.isfinite(target):
            return mode, target
    raise ValueError(f"select must be max, min, random or target:X with a finite number X, got {text!r}")


def from_mapping(values: Mapping[str, Any], source: str) -> Config:
    """A Config from a mapping; ValueError names `source` and every unknown key."""
    known = [item.name for item in fields(Config)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{source}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    return Config(**values)


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
    except ValueError as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error


def to_toml(config: Config) -> str:
    """The settings as a flat TOML table that `read_toml` and `from_mapping` turn back into an equal Config.

    TOML has no null: unset settings are left out.
    """
    lines = [f"{name} = {_toml_value(value)}" for name, value in config.to_dict().items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml_value(value: str | int | float) -> str:
    if not isinstance(value, str):
        return repr(value)
    escapes = {'"': '\\"', "\\": "\\\\"}
    # TOML forbids bare control characters in a basic string.
    text = "".join(escapes.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c) for c in value)
    return f'"{text}"'
