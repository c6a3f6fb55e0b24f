"""`npz:PATH`: the user's own arrays `x_train`, `y_train`, and `x_test`, `y_test`, `x_val`, `y_val`, `class_names` if there are.

Or `features` and `labels` (or `x` and `y`), as `select` and `audit` take them. Images, vectors and labels as in
`Dataset.from_arrays`; without a test set, a share of every class is held out. The training set is used as it is unless an
imbalance factor is given, which thins it as for the other data sets.
"""

from pathlib import Path
from typing import Any

from ltkernels._arrays import class_indices
from ltkernels._npz import array_names, read_arrays
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._longtail import make_long_tailed

_PAIRS = (("x_train", "y_train"), ("features", "labels"), ("x", "y"))
_OPTIONAL = ("x_val", "y_val", "class_names")


def load(request: DataRequest) -> Dataset:
    """Load npz:PATH. Raises FileNotFoundError or ValueError naming the file and the array."""
    path = Path(request.argument)
    names = array_names(path)
    pair = next((pair for pair in _PAIRS if pair[0] in names), _PAIRS[0])
    test = ("x_test", "y_test") if "x_test" in names or "y_test" in names else ()
    arrays = read_arrays(path, (*pair, *test), (*_OPTIONAL, "files"))
    try:
        return _build(request, path, arrays, pair)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _build(request: DataRequest, path: Path, arrays: dict[str, Any], pair: tuple[str, str]) -> Dataset:
    x, y = (arrays[name] for name in pair)
    others = {key: arrays.get(key) for key in ("x_test", "y_test", "x_val", "y_val")}
    others["class_names"] = list(arrays["class_names"].ravel()) if "class_names" in arrays else None
    files = arrays.get("files")
    about = {} if files is None or len(files) != len(x) else {"train_files": tuple(map(str, files))}
    settings = {"name": f"npz:{path.name}", "test_split": request.test_split, "seed": request.seed}
    data = Dataset.from_arrays(x, y, **others, **settings, **about)
    if request.imbalance is None:
        return data
    if others["x_test"] is None:
        raise ValueError("imbalance thins the training set; there must be a test set beside it: x_test and y_test")
    labels = class_indices({"y_train": y, "y_test": others["y_test"]}, others["class_names"])[0]["y_train"]
    kept = make_long_tailed(labels, request.imbalance, request.profile, request.seed)
    if about:
        about["train_files"] = tuple(about["train_files"][i] for i in kept)
    return Dataset.from_arrays(x[kept], y[kept], **others, **settings, **about)
