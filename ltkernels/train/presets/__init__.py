"""Presets: published recipes as tables of settings, one TOML file each. A setting that is given wins over its preset."""

from pathlib import Path
from typing import Any

from ltkernels._names import did_you_mean
from ltkernels._settings import spelled
from ltkernels.train.config import read_toml

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str) -> dict[str, Any]:
    """The settings of a preset, for `Config(**load(name))`. Raises ValueError listing the known names."""
    name = spelled(name, names())
    if name not in names():
        raise ValueError(f"unknown preset {name!r}{did_you_mean(name, names())}; known: {', '.join(names())}")
    return read_toml(_FOLDER / f"{name}.toml")
