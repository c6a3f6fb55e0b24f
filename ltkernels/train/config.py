"""The trainer's settings: one frozen dataclass is the list of flags, of TOML keys and of what config.toml stores."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ltkernels._names import did_you_mean
from ltkernels._settings import check, setting, spelled
from ltkernels.train.choices import (
    DATA_SETS,
    LOGS,
    LOSSES,
    MIXERS,
    POLICIES,
    PROFILES,
    SAMPLERS,
    SCHEDULES,
    STAGES,
    VIEWS,
)
from ltkernels.train.recipe import parse_adapter, parse_lr_schedule

# Headings of --help, by the first setting under each; their first words are the tables of config.toml.
HEADINGS = {
    "data": "data", "model": "model and loss", "sampler": "batches and schedules", "pretrain": "stages", "epochs": "optimisation",
    "seed": "machine", "select": "selection and retraining",
}  # fmt: skip
_SEED = 2**64 - 1  # the largest, as everywhere in the package


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run. None means "what suits the data set (or the loss)".

    Raises ValueError or TypeError naming the setting and the value on construction.
    """

    data: str = setting("digits-lt", f"data set: {', '.join(DATA_SETS)} or a registered name")
    data_dir: str | None = setting(None, "folder that holds the data set's files")
    image_size: int | None = setting(None, "side in pixels that image files are brought to", at_least=1)
    imbalance: float | None = setting(None, "imbalance factor n_max / n_min (default: the data set's)", at_least=1)
    profile: str = setting("exp", "how class sizes fall from n_max to n_min", choices=PROFILES)
    data_seed: int = setting(
        0, "which images the long-tailed set keeps; apart from --seed on purpose", at_least=0, at_most=_SEED
    )
    test_split: float = setting(
        0.2, "share of each class that becomes the test set where the data has none", positive=True, at_most=0.5
    )
    val_split: float | None = setting(
        None, "share of each class held out of training for the numbers of each epoch (the test set is then read once)",
        positive=True, at_most=0.5,
    )  # fmt: skip
    cache: str | None = setting(None, "folder that keeps pictures decoded, mapped into memory, for this run and others")
    workers: int | None = setting(
        None, "processes that decode images which do not fit into memory (default: the cores, 8 at most)", at_least=0
    )
    model: str | None = setting(
        None,
        "cnn, mlp, wide, resnet32, timm:NAME, hf:NAME or hf:FOLDER, or an import path package.module:Name, also of torchvision.models "
        "(default: cnn for images, wide for vectors)",
    )
    weights: str | None = setting(
        None,
        "pretrained weights of the backbone: a .safetensors file, one of torch.save with weights alone, or random (default of models "
        "of timm, Transformers and torchvision: the file in their own cache; nothing is downloaded)",
    )
    normalize: str = setting(
        "model", "statistics of the pictures that the backbone gets: those of its pretraining where it says them, else the data's",
        choices=("model", "imagenet", "data"),
    )  # fmt: skip
    init: str | None = setting(
        None, "train: a finished run, or one of its .pt files, whose backbone and classifier are trained further"
    )
    freeze: bool = setting(
        False, "leave the backbone as it is: features are computed once, epochs train the classifier"
    )
    adapter: str = setting(
        "none",
        "what is trained inside a transformer that is otherwise left as it is: adaptformer[:WIDTH], lora[:RANK] (package peft)",
    )
    head: str | None = setting(None, "classifier (default: the one of the loss)", choices=("linear", "cosine"))
    head_init: str = setting(
        "random",
        "first rows of the classifier. means: the mean features of the classes, for a cosine one; or a file of a matrix (classes, "
        "features), as text embeddings: .npy, .npz (with class_names, in any order), .safetensors",
    )
    head_scale: float = setting(16.0, "factor of cosines under losses that bring none", positive=True)
    loss: str = setting(
        "logit_adjusted", f"the loss to compare with plain cross-entropy: {', '.join(LOSSES)} or an installed one"
    )
    loss_options: str = setting("", "options of the loss, as tau=1.25,gamma=0.15")
    sampler: str = setting("instance", "class frequencies of the batches", choices=SAMPLERS)
    schedule: str = setting(
        "none",
        "what changes late: drw class-balanced weights, drs class-balanced sampling, ga KPS gradient adjustment, "
        "tla_adrw truncated logit adjustment",
        choices=SCHEDULES,
    )
    schedule_start: int | None = setting(None, "its first epoch (default: 0.8 of the epochs, ga: 0.6)", at_least=0)
    schedule_nu: float = setting(1.0, "tla_adrw: exponent of the weights", at_least=0)
    mix: str = setting("none", "mixing of images in a batch", choices=("none", *MIXERS))
    mix_alpha: float = setting(1.0, "mixing: shares are drawn from Beta(alpha, alpha)", positive=True)
    mix_prob: float | None = setting(
        None, "its probability a batch (default: 1; cutmix, cmo: 0.5)", at_least=0, at_most=1
    )
    crop: int | None = setting(None, "random crop after padding by so many pixels (default: the data's)", at_least=0)
    flip: bool | None = setting(None, "random horizontal flip (default: the data set's, or off)")
    resized_crop: float | None = setting(
        None, "random crop of at least this share of the area, brought back to the size (ImageNet: 0.08)",
        positive=True, at_most=1,
    )  # fmt: skip
    augment: str = setting("none", "policy of torchvision, one draw a picture", choices=("none", *POLICIES))
    test_views: str = setting(
        "none", "the model's features are means over views of a picture: itself and its mirror image, or five crops",
        choices=VIEWS,
    )  # fmt: skip
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
    optimizer: str = setting("sgd", "of torch.optim", choices=("sgd", "adamw"))
    decay: str | None = setting(
        None,
        "what weight_decay shrinks; weights: those of linear and convolution layers, no biases, norms, tables or cosine classifiers "
        "(default: all for sgd, weights for adamw, and for vectors)",
        choices=("all", "weights"),
    )
    lr: float | None = setting(None, "peak learning rate (default: the data set's; adamw: 0.001)", positive=True)
    lr_backbone: float | None = setting(None, "peak learning rate of the backbone (default: --lr)", positive=True)
    layer_decay: float | None = setting(
        None, "factor of the rate from one block of the backbone to the one before it", positive=True, at_most=1
    )
    ema: float | None = setting(
        None, "evaluate and keep a moving average of the weights, of this decay a step", positive=True, at_most=1
    )
    patience: int | None = setting(None, "epochs without a better validation accuracy to stop after", at_least=1)
    keep_best: bool = setting(False, "also keep the epoch that is best on the validation set, as a variant of its own")
    clip: float | None = setting(None, "largest norm of a step's gradient (default: any)", positive=True)
    lr_schedule: str = setting("cosine", "cosine, or step:160=0.01,180=0.0001 (factors of lr from an epoch on)")
    warmup: float | None = setting(None, "epochs of linear warm-up (default: 5 % of the steps; step: none)", at_least=0)
    momentum: float = setting(0.9, "momentum of sgd", at_least=0, at_most=1)
    weight_decay: float | None = setting(
        None, "L2 penalty of sgd; decay of adamw (default: 5e-4; vectors: 1 / samples, if that is more)", at_least=0
    )
    seed: int = setting(0, "initialisation, batch order, synthesis and clustering", at_least=0, at_most=_SEED)
    device: str = setting("cpu", "torch device: cpu, cuda, cuda:1")
    threads: int | None = setting(None, "torch's CPU threads (default: the data set's, or torch's)", at_least=1)
    precision: str = setting("fp32", "autocast of the forward pass", choices=("fp32", "bf16", "fp16"))
    channels_last: bool = setting(True, "memory layout of images and convolutions")
    compile: str = setting(
        "off", "torch.compile; reduce-overhead uses CUDA graphs", choices=("off", "default", "reduce-overhead")
    )
    checkpoint_seconds: float = setting(30.0, "time between the checkpoints that --resume reads", at_least=0)
    log: str = setting("none", "a further log beside metrics.jsonl, offline", choices=("none", *LOGS))
    select: str = setting(
        "mean",
        "which augmented samples complete the tail. mean: at random, but with the mean of the real samples; match: also with at "
        "most the FDG that real ones of a head class bring; match:X: with that FDG; random. The paper's max, min and quantile:Q, and "
        "target:X and target:LOW:HIGH, pick by FDG alone: max was measured to be worse than random",
    )
    share: float = setting(
        0.5, "most of a completed class that is synthetic; real samples repeat for the rest", positive=True, at_most=1
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
        # The registry of losses comes with torch, which --help does without.
        from ltkernels.selection._arms import parse_mode
        from ltkernels.train.schedules import loss_name, parse_options

        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", loss_name(self.loss))
        check(self)
        object.__setattr__(self, "data", _data_name(self.data))
        try:
            parse_mode(self.select)
        except ValueError as error:
            raise ValueError(str(error).replace("mode", "select", 1)) from None
        parse_lr_schedule(self.lr_schedule)
        parse_options(self.loss_options)
        parse_adapter(self.adapter)

    def replace(self, **changes: Any) -> "Config":
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; unset ones are None."""
        return dataclasses.asdict(self)


def _data_name(name: str) -> str:
    """The name of a data set of ours as it is spelled, whatever the capitals: `CIFAR10-LT`, `Folder:Pictures`."""
    kind, colon, path = name.partition(":")
    return f"{spelled(kind, [known.partition(':')[0] for known in DATA_SETS if (':' in known) == bool(colon)])}{colon}{path}"


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


def _tables() -> dict[str, list[str]]:
    """The settings under each heading, which is a table of config.toml by its first word."""
    tables: dict[str, list[str]] = {}
    table = ""
    for item in fields(Config):
        table = HEADINGS.get(item.name, table).split()[0]
        tables.setdefault(table, []).append(item.name)
    return tables


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file by name: at the top of the file or in the table of their heading (`[model]`, `[machine]`).

    Raises FileNotFoundError, or ValueError naming the file for bad syntax, an unknown table or a setting in another's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise ImportError('reading TOML on Python 3.10 needs tomli: pip install "ltkernels[train]"') from error
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a TOML file: {str(error)[:200]}") from error
    tables = _tables()
    settings = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for table, inner in ((key, value) for key, value in values.items() if isinstance(value, dict)):
        if table not in tables:
            hint = did_you_mean(table, tables)
            raise ValueError(f"{path}: unknown table [{table[:80]}]{hint}; known: {', '.join(tables)}")
        for name, value in inner.items():
            home = next((t for t, names in tables.items() if name in names), table)
            if home != table or name in settings:
                where = f"belongs in [{home}], not in [{table}]" if home != table else "stands there twice"
                raise ValueError(f"{path}: {name} {where}")
            settings[name] = value
    return settings


def to_toml(config: Config) -> str:
    """The settings as TOML, a table for each heading of --help, that `read_toml` and `from_mapping` turn back into an equal Config.

    TOML has no null: unset settings are left out.
    """
    parts = []
    for table, names in _tables().items():
        given = [(name, getattr(config, name)) for name in names if getattr(config, name) is not None]
        # A JSON string is a TOML string, but for one letter.
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f") for name, value in given
        ]
        parts.append("".join([f"[{table}]\n", *lines]))
    return "\n".join(parts)
