"""Who looks at a call besides us: tracers, dispatch modes, function transforms, tensor subclasses, saved-tensor hooks.

A kernel gets addresses, and nobody sees what it does with them. That is right only where nobody has to see it and where every tensor is
what it seems to be: `direct` says so. All other calls go through torch's dispatcher, whose operators have shapes for tracing and formulas
for autograd (`ltkernels._ops`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._call import TENSORS, Call
from ._errors import DTypeError

PLAIN = frozenset({Tensor, torch.nn.Parameter})

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transforms = torch._C._are_functorch_transforms_active
_jit_tracing = torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def watched() -> bool:
    """Whether a compiler, tracer, dispatch mode, function transform or dual level is at work."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() != 0
        or _function_transforms()
        or forward_ad._current_level >= 0
        or _jit_tracing() is not None
    )


def direct(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a kernel may be called with these tensors' addresses: nobody watches, and each is what it seems to be, no subclass, no view
    that stands for other numbers."""
    if watched():
        return False
    for tensor in tensors:  # noqa: SIM110  a generator takes twice the time
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg()):
            return False
    return True


def transforms() -> str:
    """Names the derivatives that no kernel has, where somebody is taking them; else empty.

    Forward-mode derivatives and function transforms see through torch's own operations only. Not for code that torch.compile traces,
    where the operators' autograd kernels ask.
    """
    if _function_transforms():
        return "a function transform (torch.func)"
    return "forward-mode derivatives" if forward_ad._current_level >= 0 else ""


def batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for a batch of them in ``torch.autograd.grad(is_grads_batched=True)``, which is no function transform."""
    return not torch.compiler.is_compiling() and _is_batched(tensor)


def wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient with respect to one of them is wanted."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def hooks_active() -> bool:
    """Whether saved tensors are packed by someone else: activation checkpointing, offloading to the CPU."""
    return _saved_tensor_hooks(True) is not None


def is_dtensor(value: object) -> bool:
    # A DTensor exists only where its module, which takes long to import, is there already.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def refuse_dtensors(call: Call) -> None:
    """Raises TypeError for a DTensor beside plain logits: whose part of it would count?"""
    for name, value in zip(Call._fields[:TENSORS], call, strict=False):
        if value is not None and type(value) is not Tensor and is_dtensor(value):
            name = {"target_b": "target[1]", "lam": "target[2] (lam)"}.get(name, name)
            raise DTypeError(f"{name} is a DTensor, logits a plain tensor; give plain tensors, such as its to_local()")


def address(tensor: Tensor | None, name: str) -> int:
    """Where a tensor's first element is; 0 for None and for empty ones alone.

    Raises RuntimeError for one without memory of its own (a freed storage, a zero tensor, a wrapper): as a table, a null address would
    mean that there is none.
    """
    if tensor is None:
        return 0
    found = tensor.data_ptr()
    if found == 0 and tensor.numel() != 0:
        raise RuntimeError(f"{name} is {type(tensor).__name__} of shape {tuple(tensor.shape)} without memory to read")
    return found
