"""What runs against what on a GPU. An implementation is ``step(z, y, upstream)``: loss, then the gradient of z times upstream, which is
None for 1, else one number in each dtype that a loss may have, ``{dtype: tensor}``.

Peers that are not importable are left out; the result names those that ran.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels import _backends
from ltkernels._call import Call, Out
from ltkernels._checks import real_dtype
from ltkernels.losses import _autograd

LOSSES = ("ce", "logit_adjusted", "ldam", "kps")
# Their size, which decides how they travel. quack-kernels needs nvidia-cutlass-dsl-libs-cu13 besides, of 92 MB: in two parts, or left out.
WHEELS = {
    "liger-kernel": "0.9 MB",
    "cut-cross-entropy": "23 kB",
    "quack-kernels": "0.7 MB, and 92 MB of nvidia-cutlass-dsl-libs-cu13",
}
_MODULES = {"liger-kernel": "liger_kernel", "quack-kernels": "quack"}
Step = Callable[..., Tensor]
Upstream = dict[torch.dtype, Tensor] | None
_TABLES = ("shift", "scale", "margin", "row_scale", "weight")


def optional(name: str) -> ModuleType | None:
    """A peer's module, or None; a peer that breaks at import counts as absent, and says so."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    except Exception as error:
        print(f"# {name} does not import: {type(error).__name__}: {error}", flush=True)
        return None


def installed() -> list[str]:
    """The peers of a loss on logits that are here, not imported: that takes seconds."""
    return [name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None]


def head_names(peers: list[str]) -> list[str]:
    more = ["linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []
    cut = ["cut-cross-entropy"] if importlib.util.find_spec("cut_cross_entropy") is not None else []
    return ["ours", "eager", *more, *(name for name in peers if name == "liger-kernel"), *cut]


def tables_of(name: str, counts: list[int], device: str) -> dict[str, Tensor]:
    found = ltk.LOSSES[name].adjustment(counts)
    return {key: getattr(found, key).to(device) for key in _TABLES if getattr(found, key) is not None}


def eager(name: str, tables: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The textbook form in torch: LDAM and KPS with a mask for the label, as in their authors' code."""
    if name == "ce":
        return F.cross_entropy
    if name == "logit_adjusted":
        return lambda z, y: F.cross_entropy(z + tables["shift"], y)
    margin = tables["margin"]
    scale = tables.get("scale")
    row = float(tables["row_scale"][0]) if "row_scale" in tables else 1.0  # LDAM's s

    def margins(z: Tensor, y: Tensor) -> Tensor:
        index = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
        a = z if scale is None else z * scale
        return F.cross_entropy(row * torch.where(index, a - margin[y].unsqueeze(1).to(a.dtype), a), y)

    return margins


def differentiated(loss: Callable[..., Tensor], announces: bool = False) -> Step:
    """`announces`: `loss` takes the upstream gradient ahead, as ``grad_scale``."""

    def step(z: Tensor, y: Tensor, upstream: Upstream = None) -> Tensor:
        leaf = z.detach().requires_grad_()
        said = {"grad_scale": upstream[real_dtype(z.dtype)]} if announces and upstream is not None else {}
        value = loss(leaf, y, **said)
        return torch.autograd.grad(value, leaf, None if upstream is None else upstream[value.dtype])[0]

    return step


def _kernel(tables: dict[str, Tensor], backend: str) -> Step:
    """The kernel without autograd and dispatch: what a launch costs alone."""
    run = _backends.kernel(backend)

    def step(z: Tensor, y: Tensor, upstream: Upstream = None) -> Tensor:
        loss = torch.empty((), dtype=real_dtype(z.dtype), device=z.device)
        grad = torch.empty_like(z)
        expected = None if upstream is None else upstream[loss.dtype]
        run(z, Call(y, **tables, grad_scale=expected, backend=backend), Out(loss, grad))
        if expected is not None:
            _autograd.multiply_(grad, expected, backend, expected)
        return grad

    return step


def backends(device: str) -> list[str]:
    """Ours that serve tensors of this kind, the best first."""
    if device == "cpu":
        return ["cpu", *([] if _backends.triton_problem("cpu") else ["triton"])]
    problems = {"cuda": _backends.cuda_problem(), "triton": _backends.triton_problem(device)}
    return [name for name, problem in problems.items() if not problem]


def forwards(
    name: str, counts: list[int], device: str, only: str | None = None
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The loss alone, as in evaluation."""
    tables = tables_of(name, counts, device)
    loss = ltk.functional.adjusted_cross_entropy
    found = {b: lambda z, y, b=b: loss(z, y, **tables, backend=b) for b in backends(device)} | {
        "eager": eager(name, tables)
    }
    return {backend: each for backend, each in found.items() if only in (None, backend)}


def steps(name: str, counts: list[int], device: str, compiler: str | None, only: str | None = None) -> dict[str, Step]:
    """Ours first: the public call on each back end that this build has, then the bare kernel of the best; then the peers.
    `compiler`: torch.compile's backend, or None to leave it out. `only` one of them, without importing the others."""
    tables = tables_of(name, counts, device)
    found: dict[str, Step] = {}
    loss = ltk.functional.adjusted_cross_entropy
    ours = backends(device)
    for backend in ours:
        found[backend] = differentiated(
            lambda z, y, b=backend, **said: loss(z, y, **tables, backend=b, **said), announces=True
        )
    if ours:
        found[f"{ours[0]}-kernel"] = _kernel(tables, ours[0])
    plain = eager(name, tables)
    found["eager"] = differentiated(plain)
    if compiler is not None and only in (None, "compiled"):
        found["compiled"] = differentiated(torch.compile(plain, dynamic=False, backend=compiler))
    if name in ("ce", "logit_adjusted") and only in (None, *_MODULES):
        shift = tables.get("shift")

        def adjusted(z: Tensor) -> Tensor:
            return z if shift is None else z + shift

        liger = None if only == "quack-kernels" else optional("liger_kernel.transformers.functional")
        if liger is not None:
            # It writes the gradient over the logits that it is given, and gets no copy to be timed with: the batches are its process' own.
            found["liger-kernel"] = differentiated(lambda z, y: liger.liger_cross_entropy(adjusted(z), y))
        if only != "liger-kernel" and (quack := optional("quack.cross_entropy")) is not None:
            found["quack-kernels"] = differentiated(lambda z, y: quack.cross_entropy(adjusted(z), y, reduction="mean"))
    return {backend: step for backend, step in found.items() if only in (None, backend)}


def heads(only: str | None = None) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """name: (features (B, D), weight (C, D), target) -> mean cross-entropy."""
    found: dict[str, Callable[..., Any]] = {"ours": ltk.functional.linear_adjusted_cross_entropy}
    found["eager"] = lambda f, w, y: F.cross_entropy(F.linear(f, w), y)
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = lambda f, w, y: F.linear_cross_entropy(f, w, y)
    if only in (None, "liger-kernel") and (liger := optional("liger_kernel.transformers.functional")) is not None:
        found["liger-kernel"] = lambda f, w, y: liger.liger_fused_linear_cross_entropy(f, w, y)
    if only in (None, "cut-cross-entropy") and (cut := optional("cut_cross_entropy")) is not None:
        found["cut-cross-entropy"] = lambda f, w, y: cut.linear_cross_entropy(f, w, y)
    return {backend: each for backend, each in found.items() if only in (None, backend)}
