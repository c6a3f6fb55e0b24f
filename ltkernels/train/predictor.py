"""A trained model for use: raw samples or image files in, classes, probabilities, logits or features out.

    model = ltkernels.train.load("runs/first")
    model.predict(["a.jpg", "b.jpg"])

`model.module` is a torch Module from raw samples to logits, with the standardisation inside: its state dict, `torch.export` of
it and the like need nothing of this package's trainer.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltkernels._features import check_reals
from ltkernels._files import replacing
from ltkernels._npz import array_names, map_npy, read_arrays, write_npz
from ltkernels.train import rundir
from ltkernels.train.config import from_mapping, read_toml
from ltkernels.train.data._dataset import Array
from ltkernels.train.data._images import SUFFIXES, decode, of_file
from ltkernels.train.data._lazy import Samples
from ltkernels.train.data.folder import walk
from ltkernels.train.data.lists import read_numbers, read_table
from ltkernels.train.engine import Progress, apply
from ltkernels.train.models import Classifier
from ltkernels.train.tables import write_csv
from ltkernels.train.trained import Saved, load_saved

# Files decoded together: a folder of any size is predicted in bounded memory.
_TOGETHER = 1024
_ARRAYS = (".npz", ".npy", ".csv")
_SAMPLES = ("x_test", "x", "features", "x_train")  # of an .npz file, the first that is there


class _Standardised(nn.Module):
    """A classifier of raw samples: (n, *input_shape) of any real dtype to logits."""

    def __init__(self, classifier: Classifier, mean: Tensor, std: Tensor, axes: int) -> None:
        super().__init__()
        self.classifier = classifier
        shape = (1, -1, *[1] * (axes - 1))
        self.register_buffer("mean", mean.view(shape))
        self.register_buffer("std", std.view(shape))

    def forward(self, raw: Tensor) -> Tensor:
        return self.classifier(((raw.double() - self.mean) / self.std).float())


class Model(Saved):
    """A trained classifier with its own preprocessing; `load` makes it.

    Samples are an array or tensor of raw samples (as the training data had them, before standardisation), or a sequence of paths
    of image files where the model was trained on such. Every method raises ValueError in words for samples that do not fit.

    Attributes:
        class_names: C names, in the order of the outputs. class_counts: training samples of each. loss: the loss's name.
        preprocessing: what makes samples of raw ones. classifier: the Module that takes them.
    """

    @cached_property
    def module(self) -> nn.Module:
        """Raw samples to logits, standardisation included."""
        mean, std = (value.to(self._device) for value in (self.preprocessing.mean, self.preprocessing.std))
        return _Standardised(self.classifier, mean, std, len(self.preprocessing.input_shape)).eval()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.classifier.parameters())).device

    def __call__(self, samples: Array | Sequence[str | Path]) -> Tensor:
        """(n, C) logits."""
        return apply(self.classifier, self._inputs(samples))

    def features(self, samples: Array | Sequence[str | Path]) -> Tensor:
        """(n, d) features, which the head classifies."""
        return apply(self.classifier.backbone, self._inputs(samples))

    def log_probabilities(
        self, samples: Array | Sequence[str | Path], prior: str | Sequence[float] | None = None
    ) -> Tensor:
        """(n, C) float64. `prior` is how often the classes will occur where the model is used: "uniform", "train" (as in
        training) or C numbers; None leaves the scores as they are, which is how the run was evaluated."""
        return torch.log_softmax(self.scores(self(samples), prior), 1)

    def predict(self, samples: Array | Sequence[str | Path], prior: str | Sequence[float] | None = None) -> Tensor:
        """(n,) int64 class indices; `prior` as in `log_probabilities`."""
        return self.scores(self(samples), prior).argmax(1)

    def scores(self, logits: Tensor, prior: str | Sequence[float] | None = None) -> Tensor:
        """(n, C) float64 whose softmax are the probabilities, from logits; for losses on cosines, times the loss' own scale.

        With p the power of the training prior that the loss leaves in the scores (1 for cross-entropy, 1 - tau for logit
        adjustment), another prior q adds log q - p log(n / N). ValueError for losses and recipes where p is not known.
        """
        scores = self.logit_scale * logits.double()
        if prior is None:
            return scores
        power, counts = self.prior_power, torch.tensor(self.class_counts, dtype=torch.float64)
        if power is None:
            raise ValueError(
                f"prior: what prior is in the scores of a model of loss {self.loss} (and its recipe) is not known"
            )
        wanted = self._prior(prior, counts)
        return scores + (wanted.log() - power * (counts / counts.sum()).log()).to(scores.device)

    def _prior(self, prior: str | Sequence[float], counts: Tensor) -> Tensor:
        classes = len(self.class_names)
        if isinstance(prior, str):  # an array compared with a word would be an array
            if prior == "uniform":
                return torch.full((classes,), 1 / classes, dtype=torch.float64)
            if prior == "train":
                return counts / counts.sum()
            raise ValueError(f"prior must be uniform, train or {classes} numbers, got {prior!r}")
        wanted = check_reals(prior, "prior").cpu()
        if wanted.shape != (classes,) or not bool((torch.isfinite(wanted) & (wanted > 0)).all()):
            raise ValueError(f"prior must hold {classes} positive numbers, one a class")
        return wanted / wanted.sum()

    def _inputs(self, samples: Array | Sequence[str | Path]) -> Tensor:
        if not isinstance(samples, np.ndarray | Tensor) and all(isinstance(item, str | Path) for item in samples):
            samples = self._decoded([Path(item) for item in samples])
        return self._placed(self.preprocessing(samples))

    def _placed(self, x: Samples) -> Samples:
        layout = torch.channels_last if x.dim() == 4 else torch.preserve_format
        return x.to(self._device, memory_format=layout)

    def _decoded(self, paths: Sequence[Path]) -> np.ndarray:
        prepared = self.preprocessing
        if not prepared.pictures:
            raise ValueError(
                f"the model was trained on arrays of shape {prepared.input_shape}, not on image files: give an .npz, .npy or .csv file"
            )
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{missing}: no such file")
        out = np.empty((len(paths), *prepared.input_shape), np.uint8)
        return decode([of_file(path) for path in paths], prepared.image_size, out=out)


def load(run: str | Path, variant: str | None = None, device: str = "cpu") -> Model:
    """The model of a result folder: `variant` of its summary.json, the chosen one where None; or that of a single .pt file.

    Raises FileNotFoundError or ValueError naming the file.
    """
    return Model(**vars(load_saved(Path(run), variant, device)))


def _pieces(inputs: Sequence[str | Path], progress: Progress | None = None) -> Iterator[tuple[list[str], Any]]:
    """(names of samples, samples for `Model`) of files and folders, in pieces that fit into memory."""
    samples: Any = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(Path(file.name) for file in walk(given))
            if not found:
                raise ValueError(f"{given}: no image files in it ({', '.join(SUFFIXES)})")
            samples += found
        elif given.suffix.lower() not in _ARRAYS:
            samples.append(given)
        elif len(inputs) > 1:
            raise ValueError(f"{given}: a file of arrays is predicted alone")
        else:
            samples = _array(given)
    for first in range(0, len(samples), _TOGETHER):
        piece = samples[first : first + _TOGETHER]
        names = range(first, first + len(piece)) if isinstance(samples, np.ndarray) else piece
        yield [str(name) for name in names], piece
        if progress and len(samples) > _TOGETHER:
            progress("predicting", first + len(piece), len(samples), {})


@contextmanager
def _named(inputs: Sequence[str | Path]) -> Iterator[None]:
    """Names the file in what a model says of its samples; of pictures, each is named by who reads it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if len(inputs) > 1 or Path(inputs[0]).suffix.lower() not in _ARRAYS:
            raise
        raise ValueError(f"{inputs[0]}: {error}") from error


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return map_npy(path)
    if path.suffix.lower() == ".csv":
        return read_numbers(path, *read_table(path))
    names = array_names(path)
    name = next((name for name in _SAMPLES if name in names), _SAMPLES[1])
    return read_arrays(path, (name,))[name]


def predict_files(
    run: str | Path,
    inputs: Sequence[str | Path],
    *,
    out: str | Path,
    variant: str | None = None,
    prior: str | Sequence[float] | None = None,
    logits: bool = False,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> int:
    """Predict image files, folders of them (at any depth), or the samples of one .npz, .npy or .csv file, into a table.

    `out` ends in .csv or .parquet: a row a sample with its name (path or index), class and probability; with `logits` also
    every class's logit. Returns the number of rows. Raises FileExistsError where `out` is there and `force` is not given,
    ValueError, FileNotFoundError or ImportError (parquet without pyarrow) in words; nothing has been written then.
    """
    out = Path(out)
    check_out(out, force, (".csv", ".parquet"))
    model = load(run, variant, device)
    header = ["sample", "class", "probability", *(f"logit:{name}" for name in (model.class_names if logits else ()))]
    rows: list[tuple[Any, ...]] = []
    for names, samples in _pieces(inputs, progress):
        with _named(inputs):
            raw = model(samples)
        scores = torch.log_softmax(model.scores(raw, prior), 1)
        best, label = scores.max(1)
        columns = [names, [model.class_names[i] for i in label.tolist()], [math.exp(v) for v in best.tolist()]]
        rows += zip(*columns, *(raw.T.tolist() if logits else ()))
    if out.suffix == ".parquet":
        _write_parquet(out, header, rows)
    else:
        write_csv(out, header, rows)
    return len(rows)


def check_out(out: Path, force: bool, kinds: tuple[str, ...]) -> None:
    """Raise where `out` is no file to write, in words."""
    if out.suffix not in kinds:
        raise ValueError(f"--out {out}: the name must end in {' or '.join(kinds)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError("a .parquet file needs pyarrow: pip install pyarrow (or name a .csv file)")
    rundir.check_file(out, force)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")


def _write_parquet(out: Path, header: list[str], rows: list[tuple[Any, ...]]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = list(zip(*rows)) or [()] * len(header)
    table = pyarrow.table([pyarrow.array(column) for column in columns], names=header)
    with replacing(out) as file:
        parquet.write_table(table, file)


def write_features(
    run: str | Path,
    inputs: Sequence[str | Path] = (),
    *,
    out: str | Path,
    split: str = "train",
    variant: str | None = None,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> int:
    """Write features of a run's model to an .npz file, as `select`, `audit` and `statistics` read them; returns their number.

    Without `inputs`, those of the run's own data, `split` train or test: arrays features (n, d), labels (n,), class_names and,
    where the samples are files, files. With inputs (as in `predict_files`): features and files, without labels. Raises as
    `predict_files`.
    """
    out = Path(out)
    check_out(out, force, (".npz",))
    model = load(run, variant, device)
    names = np.array(model.class_names)
    if inputs:
        pieces = []
        for files, samples in _pieces(inputs, progress):
            with _named(inputs):
                pieces.append((files, model.features(samples)))
        features = torch.cat([part for _, part in pieces])
        arrays: dict[str, Any] = {"files": np.array([name for files, _ in pieces for name in files])}
    else:
        from ltkernels.train.jobs import load_data

        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {split!r}")
        path = Path(run) / rundir.CONFIG
        if not path.is_file():
            raise ValueError(f"{run}: no {rundir.CONFIG} that says which data the model was trained on; name files")
        data = load_data(from_mapping(read_toml(path), str(path)))
        if data.class_names != model.class_names:
            raise ValueError(f"{path}: its data has other classes today than the model")
        x, y, files = (getattr(data, name) for name in (f"x_{split}", f"y_{split}", f"{split}_files"))
        features = apply(model.classifier.backbone, model._placed(x))
        arrays = {"labels": y.numpy(), **({"files": np.array(files)} if files else {})}
    write_npz(out, features=features.cpu().numpy(), class_names=names, **arrays)
    return len(features)
