"""Lets the compiled module use the OpenMP runtime that torch has loaded.

Torch's builds name the file differently: libgomp.so.1, libgomp-a34b3233.so.1, libomp.so. A module linked to one of the names loads a
second runtime, with a second pool of threads, where torch has another, and cannot be imported where the system has none of that name. So
ours is linked to none (CMakeLists.txt), and its calls bind to what is globally visible when it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys

import torch

_RUNTIME = re.compile(r"/lib(?:gomp|omp|iomp5)[-.][^/]*$")


def make_visible() -> None:
    """Makes the symbols of torch's OpenMP runtime global; the system's libgomp.so.1 serves a torch that has loaded none.

    Other packages load runtimes of their own under other names: those do not count while there is one in torch's folder.

    Raises:
        ImportError: there is neither.
    """
    if sys.platform != "linux":
        return
    folder = os.path.join(os.path.dirname(os.path.realpath(torch.__file__)), "")
    found = loaded_runtimes()
    path = next((path for path in found if path.startswith(folder)), found[0] if found else "libgomp.so.1")
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"ltkernels needs an OpenMP runtime; torch has loaded none, and {error}") from error


def loaded_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process."""
    try:
        with open("/proc/self/maps") as file:
            paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if line.count("/") > 0}
    except OSError:  # no /proc
        return []
    return sorted(path for path in paths if _RUNTIME.search(path))
