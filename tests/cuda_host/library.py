"""Builds csrc/cuda with g++ and the emulation, and looks like the part of the compiled module that `ltkernels._backends.cuda` calls."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ltkernels._backends import cuda as _cuda

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-DLTK_CUDA_HOST",
    f"-I{HERE}",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]
_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "const char*": ctypes.c_char_p}


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends `ltkernels._backends.cuda` to the emulation. Skips where there is no compiler for it."""
    if shutil.which("g++") is None:
        pytest.skip("the emulation is compiled by g++, which is not on PATH")
    monkeypatch.setattr(_cuda, "library", emulated())
    monkeypatch.setattr(_cuda, "current_stream", lambda device: (0, 0))


@functools.cache
def _built() -> bytes:
    """The shared library; several seconds of compilation, once a process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        command = ["g++", *FLAGS, "-O1", "-shared", "-fPIC", str(CUDA / "entry.cu"), "-o", str(path)]
        subprocess.run(command, check=True)
        return path.read_bytes()


@functools.cache
def emulated(code: int = 90) -> SimpleNamespace:
    """The entry points of csrc/cuda/entry.h under their names without ``ltk_``, as compiled for sm_`code`; each with statics of its own."""
    with tempfile.NamedTemporaryFile(suffix=f"_{code}.so") as file:
        file.write(_built())
        file.flush()
        native = ctypes.CDLL(file.name)  # which outlives its file
    native.ltk_emulation_code(code)
    header = (CUDA / "entry.h").read_text()
    records = _records(header)
    found = SimpleNamespace(**{f"Cuda{name}": record for name, record in records.items()})
    # Argument types come from the header: a changed signature cannot be called with the old one.
    for result, name, arguments in re.findall(r"^(const char\*|int64_t) ltk_(\w+)\(([^)]*)\);", header, flags=re.M):
        function = getattr(native, f"ltk_{name}")
        function.restype = _TYPES[result]
        function.argtypes = [
            ctypes.POINTER(records[named[1]])
            if (named := re.search(r"(\w+)\*", argument))
            else _TYPES[argument.split()[0]]
            for argument in arguments.split(",")
        ]
        setattr(found, name, _decoded(function) if result == "const char*" else function)
    return found


def _records(header: str) -> dict[str, type[ctypes.Structure]]:
    """entry.h's records of calls; as of the compiled module's, no other field can be set."""
    found = {}
    for record, body in re.findall(r"^struct (\w+) \{(.*?)^\};", header, flags=re.M | re.S):
        fields = [
            (name.strip(), _TYPES[kind])
            for kind, names in re.findall(r"(\w+) ([\w, ]+);", body)
            for name in names.split(",")
        ]
        found[record] = type(f"Cuda{record}", (ctypes.Structure,), {"__slots__": (), "_fields_": fields})
    return found


def _decoded(function):
    def call(*arguments):
        error = function(*arguments)
        return None if error is None else error.decode()

    return call
