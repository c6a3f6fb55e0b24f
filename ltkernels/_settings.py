"""Settings declared once: a frozen dataclass whose fields carry help and bounds is the list of flags, of TOML keys and of checks.

    @dataclass(frozen=True)
    class Config:
        epochs: int | None = setting(None, "passes over the training set", at_least=1)

        def __post_init__(self) -> None:
            check(self)

Fields are str, int, float, bool, None beside one of them, or tuples of one, which are written with commas on the command line.
"""

import argparse
import math
import reprlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from functools import partial
from typing import Any

from ltkernels._names import did_you_mean, plain

_MAX_TEXT = 4096  # characters of a setting: the longest path


def setting(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help text; `positive`, `at_least`, `at_most` and `choices` are checked by `check`."""
    return field(default=default, metadata={"help": text, **metadata})


def _kind(item: "Field[Any]") -> type:
    """str, int, float or bool: what a setting holds where it is not None."""
    return next(kind for kind in (str, int, float, bool) if kind in (item.type, *typing.get_args(item.type)))


def _is_tuple(item: "Field[Any]") -> bool:
    return typing.get_origin(item.type) is tuple


def spelled(value: str, choices: Sequence[str]) -> str:
    """`value` as `choices` spell it: `TLA-ADRW` is `tla_adrw`, `tau_norm` is `tau-norm`."""
    return next((c for c in choices if plain(c) == plain(value)), value)


def check(settings: Any) -> None:
    """Bring every field of a declared dataclass to its own type; ValueError or TypeError name the setting and the value."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if value is None and item.default is None:
            continue
        found = tuple(_checked(item, part) for part in value) if _is_tuple(item) else _checked(item, value)
        object.__setattr__(settings, item.name, found)


def _checked(item: "Field[Any]", value: Any) -> Any:
    kind = _kind(item)
    number = kind is float and isinstance(value, int)
    # Before anything shows the number: one of thousands of digits has no text.
    bits = max(63, int(item.metadata.get("at_most", 0)).bit_length())
    if isinstance(value, int) and value.bit_length() > bits:
        raise ValueError(f"{item.name} must have {bits} bits at most, got an integer of {value.bit_length()}")
    if isinstance(value, bool) is not (kind is bool) or not (isinstance(value, kind) or number):
        raise TypeError(f"{item.name} must be {kind.__name__}, got {reprlib.repr(value)}")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise ValueError(f"{item.name} must have {_MAX_TEXT} characters at most, got {len(value)}")
    value, rule = kind(value), item.metadata
    if "choices" in rule:
        value = spelled(value, rule["choices"])
        if value not in rule["choices"]:
            hint = did_you_mean(value, rule["choices"])
            raise ValueError(f"{item.name} must be one of {', '.join(rule['choices'])}, got {value!r}{hint}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{item.name} must be finite, got {value}")
    if rule.get("positive") and value <= 0:
        raise ValueError(f"{item.name} must be positive, got {value}")
    if "at_least" in rule and value < rule["at_least"]:
        raise ValueError(f"{item.name} must be at least {rule['at_least']}, got {value}")
    if "at_most" in rule and value > rule["at_most"]:
        raise ValueError(f"{item.name} must be at most {rule['at_most']}, got {value}")
    return value


def add_flags(
    parser: argparse.ArgumentParser,
    declared: type,
    only: Sequence[str] | None = None,
    headings: Mapping[str, str] | None = None,
) -> None:
    """A flag per setting, under the heading that its name or one before it has; one that is not given stays out of the namespace."""
    group: Any = parser
    heading = title = ""
    for item in fields(declared):
        heading = (headings or {}).get(item.name, heading)
        if only is not None and item.name not in only:
            continue
        if heading != title:
            group, title = parser.add_argument_group(heading), heading
        text = item.metadata["help"]
        default: Any = item.default
        if _is_tuple(item):
            default = ",".join(map(str, default))
        if default not in (None, ""):
            text += f" (default: {default})"
        flag = f"--{item.name.replace('_', '-')}"
        shared = {"dest": item.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        kind, choices = _kind(item), item.metadata.get("choices")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif _is_tuple(item):
            group.add_argument(flag, type=comma_list(kind), metavar=item.name.upper(), **shared)
        elif choices:
            group.add_argument(flag, type=partial(spelled, choices=choices), choices=choices, **shared)
        else:
            group.add_argument(flag, type=kind, metavar=item.name.upper(), **shared)


def comma_list(kind: type) -> Any:
    """A type for argparse: values of `kind` with commas between them."""

    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    read.__name__ = f"list of {kind.__name__}"  # argparse says it
    return read


def given(arguments: argparse.Namespace, declared: type) -> dict[str, Any]:
    """The settings whose flags were given."""
    return {item.name: getattr(arguments, item.name) for item in fields(declared) if hasattr(arguments, item.name)}
