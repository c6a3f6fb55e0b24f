"""The only file that calls ``torch.library``: how an operator of the package is registered.

An operator has a kernel, the same for every device; shapes for tracing; and a formula for autograd, so that no way through the dispatcher
(tracing, export, function transforms, dispatch modes, subclasses) can lose a gradient or a tangent. Operands that belong together travel
as one record, whose fields are the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

_library = torch.library.Library("ltkernels", "DEF")

_DEVICES = ("CPU", "CUDA")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    tuple[float, ...]: "float[]",
}


def operands(record: type[Any]) -> str:
    """The arguments of a schema for the fields of a NamedTuple."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers an operator and returns it.

    Args:
        schema: name and signature, as `torch.library.Library.define` takes it.
        kernel: computes; knows no gradient.
        fake: the outputs' shapes, for tracing.
        autograd: ``(below, *arguments)``: called wherever gradients may be wanted, with ``below(*arguments)``, which is the operator
            without them.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in _DEVICES:
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"ltkernels::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.ltkernels, name).default

    def under_autograd(keyset: Any, *arguments: Any) -> Any:
        def below(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(  # type: ignore[attr-defined]
                    keyset & torch._C._after_autograd_keyset, *arguments
                )

        return autograd(below, *arguments)

    _library.impl(name, under_autograd, "Autograd", with_keyset=True)
    return operator


def spread(rows: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The (K, C) gradients of the K wanted tables as one a table, None where not wanted."""
    wanted = iter(rows.unbind())
    return tuple(next(wanted) if need else None for need in needs)
