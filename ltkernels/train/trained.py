"""What a training gives, and where a job leaves it: plain records that the stages pass on."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ltkernels.losses import Loss
from ltkernels.train import rundir
from ltkernels.train.backbones import BackboneSpec, build_backbone, spec_of
from ltkernels.train.checkpoint import dump, undump, write_bytes
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset
from ltkernels.train.data._dataset import MAX_VALUES, Preprocessing
from ltkernels.train.engine import Fit
from ltkernels.train.models import Classifier, HeadSpec
from ltkernels.train.schedules import loss_record, parse_options

FORMAT = 4
"""Of the checkpoints of finished models: another number where a key comes or goes."""


@dataclass
class Trained:
    """One trained model with what its training recorded; `note` is what its entry of the summary says beside, or instead of, the rest.

    `prior_power` p: the model's scores are log p(x|y) + p log(n_y / N), up to a constant; None where that is not known.
    """

    name: str
    record: Loss
    model: Classifier
    fit: Fit
    note: dict[str, Any] = field(default_factory=dict)
    prior_power: float | None = None

    @property
    def title(self) -> str:
        """For the report: the loss's title, and what the name adds to the loss's name."""
        return " ".join([self.record.title, self.name.removeprefix(self.record.name).replace("-", " + ")]).strip()


def options_of(config: Config, record: Loss) -> str:
    """The loss_options of a training with this loss: those of the settings are of the loss that they name."""
    return config.loss_options if record.name == config.loss else ""


def prior_power(record: Loss, options: str) -> float | None:
    """What power of the training prior is in the scores of a model that `record` trained on samples as they come
    (see `Trained`): plain cross-entropy 1, logit adjustment 1 - tau (Menon et al. 2021, equation 10)."""
    if record.name == "logit_adjusted":
        return 1.0 - parse_options(options).get("tau", 1.0)
    return {"ce": 1.0, "balanced_softmax": 0.0}.get(record.name)


def logit_scale(record: Loss, head: HeadSpec, options: str) -> float:
    """What logits are multiplied by before softmax makes probabilities of them: the loss' own scale s of bare cosines."""
    default = record.own_options["s"].default if "s" in record.own_options else 1.0
    bare = head.kind == "cosine" and head.logits == "cosine"
    return float(parse_options(options).get("s", default)) if bare else 1.0


def save_checkpoint(folder: Path, trained: Trained, config: Config, data: Dataset, class_counts: list[int]) -> str:
    """Write `NAME.pt`: all that it takes to predict with the model, as plain tensors, numbers and strings, so that
    torch.load(weights_only=True) reads them. `class_counts` are those of what was trained on. Returns its SHA-256."""
    record, options = trained.record, options_of(config, trained.record)
    head, preprocessing = HeadSpec.of(trained.model.head), data.preprocessing
    content = dump(
        {
            "format": FORMAT,
            "loss": record.name,
            "loss_options": options,
            "logit_scale": logit_scale(record, head, options),
            "prior_power": trained.prior_power,
            "backbone": dataclasses.asdict(spec_of(trained.model.backbone, config.model)),
            "head": dataclasses.asdict(head),
            "class_names": list(data.class_names),
            "class_counts": class_counts,
            "preprocessing": dataclasses.asdict(preprocessing) | {"input_shape": list(preprocessing.input_shape)},
            "state": {key: value.cpu() for key, value in trained.model.state_dict().items()},
        }
    )
    write_bytes(folder / f"{trained.name}.pt", content)
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint of a finished model holds, checked, and the model; see `predictor.Model`."""

    classifier: Classifier
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    class_counts: list[int]
    loss: str
    logit_scale: float
    prior_power: float | None


def load_saved(run: Path, variant: str | None = None, device: str = "cpu") -> Saved:
    """What `predictor.load` loads, see there."""
    if run.is_file():
        if variant is not None:
            raise ValueError(f"{run}: a checkpoint is one variant; name a result folder to choose {variant!r}")
        return load_checkpoint(run, None, device)
    summary = rundir.read_summary(run)
    if "seeds" in summary:
        raise ValueError(f"{run} holds several seeds; use one of them, as {run / 'seed-'}{summary['seeds'][0]}")
    names = [entry["name"] for entry in summary["variants"]]
    variant = summary["chosen"] if variant is None else variant
    if variant not in names:
        raise ValueError(f"{run}: no variant {variant!r}; it has {', '.join(names)}")
    with rundir.judged(run / rundir.SUMMARY):
        checksum = str(summary["checkpoints"][variant])
    return load_checkpoint(run / rundir.CHECKPOINTS / f"{variant}.pt", checksum, device)


def load_checkpoint(path: Path, sha256: str | None, device: str = "cpu") -> Saved:
    """The model of a checkpoint; `sha256` is what its run says that the file has (None: not compared).

    A model by import path is imported, as when it was trained. Raises FileNotFoundError or ValueError naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: damaged: it is not the file that the run wrote (checksum in {rundir.SUMMARY})")
    saved = undump(content, path, device)
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not the checkpoint of a finished model (format {saved.get('format')!r:.80}, not {FORMAT})"
        )
    try:
        return _built(saved, device)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a checkpoint of a run: {str(error).splitlines()[0][:200]}") from error


def _built(saved: dict[str, Any], device: str) -> Saved:
    given = saved["preprocessing"]
    shape = tuple(int(size) for size in given["input_shape"])
    if len(shape) not in (1, 3) or min(shape) < 1 or torch.Size(shape).numel() > MAX_VALUES:
        raise ValueError(f"samples of shape {shape}")
    size = given["image_size"]
    preprocessing = Preprocessing(
        shape, given["mean"].double().cpu(), given["std"].double().cpu(), size and int(size), bool(given["pictures"])
    )
    names = tuple(str(name) for name in saved["class_names"])
    counts = [int(count) for count in saved["class_counts"]]
    if len(names) < 1 or len(counts) != len(names) or min(counts) < 0:
        raise ValueError("class_names and class_counts do not agree")
    backbone, width = build_backbone(BackboneSpec(**saved["backbone"]), shape, 0)
    classifier = Classifier(backbone, HeadSpec(**saved["head"]).build(width, len(names), 0))
    classifier.load_state_dict(saved["state"])
    power = saved["prior_power"]
    return Saved(
        classifier.eval().to(device),
        preprocessing,
        names,
        counts,
        loss_record(saved["loss"]).name,
        float(saved["logit_scale"]),
        None if power is None else float(power),
    )
