"""`npz:PATH`: the user's own arrays `x_train`, `y_train`, `x_test`, `y_test` (and optionally `class_names`).

Images are (n, height, width) or (n, channels, height, width), vectors (n, features); labels are integers 0..C-1. The
training set is used as it is unless an imbalance factor is given, which thins it as for the other data sets.
"""

from pathlib import Path

from ltkernels._npz import read_arrays
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._longtail import make_long_tailed

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(request: DataRequest) -> Dataset:
    """Load npz:PATH. Raises FileNotFoundError or ValueError naming the file and the array."""
    path = Path(request.argument)
    arrays = read_arrays(path, _KEYS, ("class_names",))
    x_train, y_train = arrays["x_train"], arrays["y_train"]
    try:
        names = [str(name) for name in arrays["class_names"].ravel()] if "class_names" in arrays else None
        data = Dataset.from_arrays(
            x_train, y_train, arrays["x_test"], arrays["y_test"], class_names=names, name=f"npz:{path.name}"
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
    if request.imbalance is None:
        return data
    kept = make_long_tailed(y_train, request.imbalance, request.profile, request.seed)
    return Dataset.from_arrays(
        x_train[kept], y_train[kept], arrays["x_test"], arrays["y_test"], class_names=names, name=data.name
    )
