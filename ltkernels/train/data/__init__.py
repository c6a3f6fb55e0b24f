"""Data sets by name. One file per data set; adding one is writing that file and naming its function in `_LOADERS`.

Custom data takes two lines of Python:

    import ltkernels.train as train
    train.data.register("mine", lambda request: train.data.Dataset.from_arrays(x, y, x_test, y_test))

after which `train.run(train.Config(data="mine"))` works, and so does passing a `Dataset` itself to `train.run`. A function of
your own module is a data set as it is: `--data package.module:function` calls it with the `DataRequest`; it returns a `Dataset`, a
torch `Dataset` or a pair of them (training, test).
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ltkernels._names import did_you_mean
from ltkernels.train.data import cifar, digits, fashion_mnist, folder, lists, npz
from ltkernels.train.data._dataset import DataRequest, Dataset
from ltkernels.train.data._derive import k_fold, mix_categories, with_counts
from ltkernels.train.data._longtail import PROFILES, class_sizes, make_long_tailed
from ltkernels.train.data._objects import from_huggingface, from_torch, load_by_import, load_huggingface

__all__ = [
    "PROFILES",
    "DataRequest",
    "Dataset",
    "class_sizes",
    "from_huggingface",
    "from_torch",
    "k_fold",
    "load",
    "make_long_tailed",
    "mix_categories",
    "names",
    "register",
    "with_counts",
]

Loader = Callable[[DataRequest], Dataset]

# A key that ends in ":" takes an argument: `npz:PATH` calls the loader with request.argument == "PATH".
_LOADERS: dict[str, Loader] = {
    "digits-lt": digits.load,
    "fashion-mnist-lt": fashion_mnist.load,
    "cifar10-lt": partial(cifar.load, cifar.CIFAR10),
    "cifar100-lt": partial(cifar.load, cifar.CIFAR100),
    "folder:": folder.load,
    "npz:": npz.load,
    "list:": lists.load_list,
    "csv:": lists.load_csv,
    "hf:": load_huggingface,
}
# Their images have the size they have: an image_size that changed nothing would be a setting that lies.
_FIXED_SIZE = ("digits-lt", "fashion-mnist-lt", "cifar10-lt", "cifar100-lt", "npz:")


def names() -> list[str]:
    """Known data set names, those that take a path with the word PATH: `['digits-lt', ..., 'npz:PATH']`."""
    return [f"{key}PATH" if key.endswith(":") else key for key in _LOADERS]


def register(name: str, loader: Loader) -> None:
    """Make `loader(request) -> Dataset` available as `--data name`.

    A name that ends in ":" takes an argument, which arrives as `request.argument`. Raises ValueError where the name
    is taken: replacing a built-in silently would change what an old config file means.
    """
    if name in _LOADERS:
        raise ValueError(f"data set {name!r} is registered already")
    _LOADERS[name] = loader


def load(name: str, request: DataRequest | None = None) -> Dataset:
    """Load a data set by name.

    Raises ValueError for an unknown name (listing the known) or a setting that the data set has no use for, and
    FileNotFoundError where files are missing (saying where to put them).
    """
    request = request or DataRequest()
    prefix, colon, argument = name.partition(":")
    loader = _LOADERS.get(prefix + colon)
    if (loader is None and not (colon and argument.isidentifier())) or (colon and not argument):
        hint = _of_path(name) or did_you_mean(prefix + colon if colon else name, _LOADERS)
        raise ValueError(f"unknown data set {name!r}{hint}; known: {', '.join(names())}, or package.module:function")
    if request.image_size is not None and prefix + colon in _FIXED_SIZE:
        raise ValueError(
            f"image_size is {request.image_size}: the samples of data set {name!r} have a size of their own"
        )
    given = replace(request, argument=argument)
    dataset = load_by_import(name, given) if loader is None else loader(given)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"the loader of data set {name!r} returned {type(dataset).__name__}, not a Dataset")
    return dataset


def _of_path(name: str) -> str:
    """A hint where what is named is a file or a folder, without the word that says how to read it."""
    suffix = os.path.splitext(name)[1].lower()
    kind = {".csv": "csv", ".npz": "npz", ".txt": "list"}.get(suffix) if os.path.isfile(name) else None
    # Not a Path's is_dir, which raises for a name that no file system takes.
    kind = "folder" if os.path.isdir(name) else kind
    return f" (did you mean {kind}:{name}?)" if kind else ""
