"""What the losses raise: each error is a ValueError or TypeError, and also what `torch.nn.functional.cross_entropy` raises for the same
input, so that a caller's ``except`` clauses go on working when the loss is replaced."""

from __future__ import annotations


class ArgumentError(ValueError, RuntimeError):
    """A shape, device, range or combination that does not fit; torch raises RuntimeError or ValueError."""


class LabelError(ArgumentError, IndexError):
    """A class index outside [0, C); torch raises IndexError."""


class DTypeError(TypeError, RuntimeError):
    """A dtype or type that does not fit; torch raises RuntimeError or TypeError."""
