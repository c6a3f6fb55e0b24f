"""Writes the stubs of this folder from the records of `ltkernels.losses`."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

from .. import functional, nn
from ..losses import LOSSES, Loss, adjusted_cross_entropy

_HEAD = "# Written by `python -m ltkernels._declared` from the records of ltkernels.losses; do not edit.\n\n"
_TYPES = "from collections.abc import Sequence\n"
# Losses of other packages join LOSSES at run time; they are not this package's to declare.
_OWN = [loss for loss in LOSSES.values() if loss.build.__module__.startswith("ltkernels.losses.")]
# The arguments that all losses share have their types from what takes them in the end.
_SHARED = {
    name: str(parameter.annotation)
    for taker in (nn.AdjustedCrossEntropy, adjusted_cross_entropy)
    for name, parameter in inspect.signature(taker).parameters.items()
}


def stubs() -> dict[str, str]:
    """The text of each stub, by file name."""
    return {"adjustments.pyi": _adjustments(), "functional.pyi": _functional(), "nn.pyi": _nn()}


def _adjustments() -> str:
    by_module: dict[str, list[str]] = {}
    for loss in _OWN:
        by_module.setdefault(loss.build.__module__.rpartition(".")[2], []).append(loss.build.__name__)
    lines = []
    for module, names in sorted(by_module.items()):
        lines += [f"from ..losses.{module} import {name} as {name}\n" for name in sorted(names)]
    return _HEAD + "".join(lines)


def _functional() -> str:
    imports = f"{_TYPES}\nfrom torch import Tensor\n\nfrom ..losses._core import Target\n"
    return _HEAD + imports + "".join(_function(loss) for loss in _OWN)


def _function(loss: Loss) -> str:
    function = getattr(functional, loss.function)
    return f"\n{_signature('def', loss.function, inspect.signature(function), 'Tensor')}\n{_docstring(function)}"


def _nn() -> str:
    imports = f"{_TYPES}\nfrom torch import Tensor\n\nfrom ..nn import AdjustedCrossEntropy\n"
    made = [loss for loss in _OWN if "<locals>" in getattr(nn, loss.class_name).__init__.__qualname__]
    return _HEAD + imports + "".join(_class(loss) for loss in made)


def _class(loss: Loss) -> str:
    module = getattr(nn, loss.class_name)
    init = textwrap.indent(_signature("def", "__init__", inspect.signature(module.__init__), "None") + " ...\n", "    ")
    return f"\nclass {loss.class_name}(AdjustedCrossEntropy):\n{_docstring(module)}\n{init}"


def _signature(keyword: str, name: str, signature: inspect.Signature, returns: str) -> str:
    lines = [f"{keyword} {name}(\n"]
    keywords_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords_only:
            keywords_only = True
            lines.append("    *,\n")
        lines.append(f"    {_parameter(parameter)},\n")
    return "".join([*lines, f") -> {returns}:"])


def _parameter(parameter: inspect.Parameter) -> str:
    own = parameter.annotation
    if parameter.name == "self":
        return "self"
    if parameter.name == "class_counts":
        kind = "Sequence[int] | Tensor"
    else:
        kind = _SHARED[parameter.name] if own is inspect.Parameter.empty else str(own)
    if parameter.default is inspect.Parameter.empty:
        return f"{parameter.name}: {kind}"
    default = f'"{parameter.default}"' if isinstance(parameter.default, str) else repr(parameter.default)
    return f"{parameter.name}: {kind} = {default}"


def _docstring(of: object) -> str:
    lines = [line.rstrip() for line in (inspect.getdoc(of) or "").rstrip().split("\n")]
    raw = "r" if any("\\" in line for line in lines) else ""
    return textwrap.indent("\n".join([f'{raw}"""{lines[0]}', *lines[1:], '"""\n']), "    ")


def outdated(folder: Path) -> list[str]:
    """Names of the files in the folder that are not what the records say."""

    def text_of(name: str) -> str:
        file = folder / name
        return file.read_text() if file.is_file() else ""

    return [name for name, text in stubs().items() if text_of(name) != text]


if __name__ == "__main__":
    for name, text in stubs().items():
        (Path(__file__).parent / name).write_text(text)
