"""`npz:PATH`: the user's own arrays `x_train`, `y_train`, and `x_test`, `y_test`, `x_val`, `y_val`, `class_names` if there are.

Or `features` and `labels` (or `x` and `y`), as `select` and `audit` take them, with `files` if there are. Images, vectors and labels as
in `Dataset.from_arrays`; without a test set, a share of every class is held out. The training set is used as it is unless an
imbalance factor is given, which thins it as for the other data sets.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltkernels._npz import array_names, read_arrays
from ltkernels.train.data._dataset import DataRequest, Dataset, naming

_PAIRS = (("x_train", "y_train"), ("features", "labels"), ("x", "y"))


def load(request: DataRequest) -> Dataset:
    """Load npz:PATH. Raises FileNotFoundError or ValueError naming the file and the array."""
    path = Path(request.argument)
    names = array_names(path)
    pair = next((pair for pair in _PAIRS if pair[0] in names), None)
    if pair is None:
        wanted = ", or ".join(" and ".join(each) for each in _PAIRS)
        raise ValueError(f"{path}: not a usable .npz file: it needs the arrays {wanted} (it holds {', '.join(names)})")
    test = ("x_test", "y_test") if "x_test" in names or "y_test" in names else ()
    arrays = read_arrays(path, (*pair, *test), ("x_val", "y_val", "class_names", "files"))
    x, y = (arrays.pop(name) for name in pair)
    files, class_names = arrays.pop("files", ()), arrays.pop("class_names", None)
    with naming(path), _as_in_the_file(pair):
        return Dataset.from_arrays(
            x,
            y,
            **arrays,
            class_names=None if class_names is None else class_names.ravel().tolist(),
            train_files=tuple(map(str, files)) if len(files) == len(x) else (),
            name=f"npz:{path.name}",
            **request.division(),
        )


@contextmanager
def _as_in_the_file(pair: tuple[str, str]) -> Iterator[None]:
    """Errors name the arrays as the file has them, not as `Dataset.from_arrays` does."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = re.sub(r"\b[xy]_train\b", lambda found: pair["xy".index(found[0][0])], str(error))
        raise (ValueError if isinstance(error, ValueError) else TypeError)(text) from error
