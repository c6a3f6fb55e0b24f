"""`npz:PATH`: the user's own arrays `x_train`, `y_train`, `x_test`, `y_test` (and optionally `class_names`).

Images are (n, height, width) or (n, channels, height, width), vectors (n, features); labels are integers 0..C-1. The
training set is used as it is unless an imbalance factor is given, which thins it as for the other data sets.
"""

import zipfile
from pathlib import Path

import numpy as np

from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._longtail import make_long_tailed

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_arrays(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read the named arrays of an .npz file; pickled objects are refused.

    Raises FileNotFoundError, or ValueError naming the file and what is missing or unreadable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive]
            if missing:
                raise ValueError(
                    f"lacks the array {', '.join(missing)} (it holds {', '.join(archive.files) or 'none'})"
                )
            return {key: archive[key] for key in (*required, *optional) if key in archive}
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a usable .npz file: {error}") from error


def load(request: DataRequest) -> Dataset:
    """Load npz:PATH. Raises FileNotFoundError or ValueError naming the file and the array."""
    path = Path(request.argument)
    arrays = read_arrays(path, _KEYS, ("class_names",))
    x_train, y_train = arrays["x_train"], arrays["y_train"]
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    data = Dataset.from_arrays(
        x_train, y_train, arrays["x_test"], arrays["y_test"], class_names=names, name=f"npz:{path.name}"
    )
    if request.imbalance is None:
        return data
    kept = make_long_tailed(y_train, request.imbalance, request.profile, request.seed)
    return Dataset.from_arrays(
        x_train[kept], y_train[kept], arrays["x_test"], arrays["y_test"], class_names=names, name=data.name
    )
