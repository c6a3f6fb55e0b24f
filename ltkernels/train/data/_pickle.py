"""Reading pickles of plain data without trusting them: dict, list, str, bytes, int and arrays of unsigned bytes, nothing else.

A pickle is a program that calls what it names. Here it can name three things, and none of them is the real one: numpy's
array constructor, `numpy.ndarray` and `numpy.dtype` are replaced by classes that only keep what they are given, from which
the array is built and checked afterwards. No code of numpy or of any other package runs while the pickle is read.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

_CONSTRUCTORS = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_MAX_MEMO = 1 << 20  # CIFAR-100's training set has 50 000 file names in it
_BYTE_TYPES = (b"u1", "u1", b"|u1", "|u1", b"B", "B")


def load_plain(content: bytes, source: str) -> Any:
    """The object in a pickle of plain data; Python 2's strings come out as bytes, arrays as uint8 arrays.

    Raises ValueError naming `source` for anything else: other classes or functions, other array types, a damaged file.
    """
    try:
        _scan(content)
        return _Plain(len(content)).of(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except RecursionError as error:
        raise ValueError(f"{source}: nested too deeply") from error
    except Exception as error:  # a forged pickle makes the unpickler raise whatever it likes
        raise ValueError(f"{source}: not a pickle of plain data: {str(error)[:200]}") from error


def _scan(content: bytes) -> None:
    """Reads the instructions without following them; raises for lengths and places that are not in the file.

    The unpickler makes room for whatever a length or the number of a memo says before it looks whether that much is there.
    """
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > _MAX_MEMO:
            raise ValueError(f"its memo has a place {argument}")


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Made anew for each file: a forged pickle could change a class that it is given.
        self._array, self._dtype = type("Array", (_Array,), {}), type("Dtype", (_Dtype,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONSTRUCTORS or (module, name) == ("numpy", "ndarray"):
            return self._array
        if (module, name) == ("numpy", "dtype"):
            return self._dtype
        raise ValueError(f"it asks for {module}.{name}")


class _Dtype:
    """Stands for numpy.dtype(code, ...)."""

    def __init__(self, code: Any, *rest: Any) -> None:
        if code not in _BYTE_TYPES:
            raise ValueError(f"it holds an array of type {code!r}; only unsigned bytes are read")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment: bytes have none."""


class _Array:
    """Stands for the array constructor and for numpy.ndarray; `__setstate__` gets what numpy's would."""

    def __init__(self, *args: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise ValueError("it holds an array that is not one of bytes")
        self.value = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Plain:
    """Replaces the stand-ins by their arrays. A pickle can refer to what it has made: forty lists, each of the one before four
    times, are a few hundred bytes and 4**40 items. No more items come out than the file has bytes."""

    def __init__(self, most: int) -> None:
        self.left = most

    def of(self, value: Any) -> Any:
        """`value` as plain data; TypeError for anything else."""
        self.left -= 1
        if self.left < 0:
            raise ValueError("it holds more than there are bytes in the file")
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if type(value) is dict:
            return {_key(key): self.of(item) for key, item in value.items()}
        if type(value) is list:
            return [self.of(item) for item in value]
        if type(value) in (bytes, str, int):
            return value
        raise TypeError(f"it holds a {type(value).__name__}")


def _key(key: Any) -> Any:
    if type(key) not in (bytes, str, int):
        raise TypeError(f"it holds a key of type {type(key).__name__}")
    return key
