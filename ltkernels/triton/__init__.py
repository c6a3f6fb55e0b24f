"""Triton twins of the compiled kernels, for GPUs without the CUDA part of the build (and for AMD's, through Triton).

Importing this package does not import Triton; its modules do:

    adjusted_ce.py         the losses: loss and gradient in one read of the logits, every form of csrc/cpu/adjusted_ce.h
    linear_adjusted_ce.py  classifier and loss without the B x C logits
    row_logsumexp.py       contrast between its matrix products: kernel, list and launcher
    soft_targets.py, experts.py, sigmoid.py   class probabilities and teachers, coupled experts, the general sigmoid: each file has a
                           kernel, its tiles and its launcher, and _second.py what the launchers share
    _row.py                what both do to a row, as device functions: the twin of csrc/cpu/adjusted_ce.inl
    _configs.py            tile shapes with their reasons, and the list of every specialisation that can be launched
    _autotune.py           timing instead of the table, behind an environment variable
    compile_all.py         ``python -m ltkernels.triton.compile_all``: compiles that list to machine code, without a GPU

A kernel more is a file like those three, its name in `compile_all.OF_THEIR_OWN`, and the call in the function that it serves.

What can be proved without a GPU is: the values, under Triton's interpreter (tests/test_triton.py), and that every
specialisation compiles for compute capability 8.0, 9.0 and 10.0 without spilling (compile_all). Only a
GPU can prove: that the machine code computes what the interpreter computes (the approximate exp2 and division, the
order inside a reduction, tensor-core products), that a wave of programs has no race the interpreter's single thread
hides (in-place gradients; the accumulation of linear_adjusted_ce.py), that nothing is read out of bounds, and speed:
the tile shapes are reasoned and not measured.
"""

from __future__ import annotations

import functools
import os

_OLDEST = (3, 6)  # what torch 2.10 brings; older ones have not been tried


@functools.cache
def _triton() -> str:
    """Why Triton cannot be used; empty where it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install 'ltkernels[triton]'"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    return ""


def available() -> tuple[bool, str]:
    """Whether the Triton kernels can serve CUDA (or ROCm) tensors here, and why (not)."""
    reason = _triton()
    if reason:
        return False, reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton's interpreter (TRITON_INTERPRET=1): slow, for tests"
    import torch

    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    import triton

    return True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"
