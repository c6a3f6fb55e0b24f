"""Files of numbers that a training starts from: weights of a backbone, rows of a classifier."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltkernels._arrays import text
from ltkernels._npz import map_npy, read_arrays
from ltkernels.train.checkpoint import undump
from ltkernels.train.data._split import listed


def load_weights(backbone: nn.Module, path: Path) -> None:
    """Load pretrained weights of `backbone` from a .safetensors file or one of `torch.save` (weights alone are read; a
    `state_dict`, `model` or `state` inside it is found). What belongs to a classifier beyond the backbone is left out.

    Raises FileNotFoundError or ValueError naming the file: it lacks a parameter, or holds one of another shape.
    """
    state: dict[str, Any] = _tensors(path, "weights")
    state = next((state[key] for key in ("state_dict", "model", "state") if isinstance(state.get(key), dict)), state)
    own = backbone.state_dict()
    for prefix in ("module.", "backbone.", "model."):
        if not set(own) & set(state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counters]
    if missing:
        raise ValueError(f"weights {path}: lacks {len(missing)} of the backbone's {len(own)} tensors, as {missing[0]}")
    try:
        backbone.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"weights {path}: do not fit the backbone: {reason}") from error


def _tensors(path: Path, what: str) -> dict[str, Any]:
    """What a .safetensors file or one of `torch.save` (weights alone) holds. FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    if path.suffix != ".safetensors":
        return undump(path.read_bytes(), f"{what} {path}")
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("a .safetensors file needs the package: pip install safetensors") from error
    try:
        return load_file(str(path))
    except Exception as error:  # SafetensorError, and whatever a forged header makes it raise
        raise ValueError(f"{what} {path}: not a .safetensors file: {str(error)[:200]}") from error


def read_matrix(path: Path, class_names: tuple[str, ...]) -> Tensor:
    """(C, d) float64: a row a class, from an .npy file, the array `features` of an .npz file, or the one tensor of a .safetensors
    file; in the order of `class_names`, by which an .npz file with its own class_names is sorted.

    Raises FileNotFoundError or ValueError naming the file.
    """
    names = None
    if path.suffix == ".npy":
        rows = torch.from_numpy(map_npy(path).astype("f8"))
    elif path.suffix == ".npz":
        found = read_arrays(path, ("features",), ("class_names",))
        rows, names = torch.from_numpy(found["features"].astype("f8")), found.get("class_names")
    else:
        tensors = [value for value in _tensors(path, "head_init").values() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise ValueError(
                f"head_init {path} must hold one matrix (classes, features), it holds {len(tensors)} tensors"
            )
        rows = tensors[0].double()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"head_init {path} holds NaN or infinite values")
    if names is None:
        return rows
    place = {text(name): i for i, name in enumerate(names.tolist())}
    missing = [name for name in class_names if name not in place]
    if missing:
        raise ValueError(f"head_init {path}: its class_names lack {listed(missing)}")
    return rows[[place[name] for name in class_names]]
