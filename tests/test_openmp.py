"""Promise: there is one OpenMP runtime, torch's, whatever its file is called and whatever else has been loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from ltkernels import _openmp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the module is linked to its runtime")
FOLDER = os.path.dirname(os.path.realpath(torch.__file__))


def test_a_kernel_brings_no_second_runtime(tmp_path) -> None:
    code = (
        "import torch, ltkernels as ltk\n"
        "from ltkernels import _openmp\n"
        "before = _openmp.loaded_runtimes()\n"
        "torch.set_num_threads(2)\n"
        "z = torch.randn(512, 2000)\n"
        "ltk.functional.adjusted_cross_entropy(z, torch.zeros(512, dtype=torch.int64))\n"
        "assert before == _openmp.loaded_runtimes() and len(before) == 1, (before, _openmp.loaded_runtimes())\n"
    )
    # Not from a checkout, whose sources would be imported without their compiled module.
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def opened(monkeypatch: pytest.MonkeyPatch, loaded: list[str]) -> str:
    """What is made visible in a process with these runtimes."""
    paths: list[str] = []
    monkeypatch.setattr(_openmp, "loaded_runtimes", lambda: loaded)
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: paths.append(path))
    _openmp.make_visible()
    return paths[0]


def test_torchs_own_runtime_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{FOLDER}/lib/libgomp-a34b3233.so.1"
    assert opened(monkeypatch, ["/other/faiss_cpu.libs/libgomp-e985bcbb.so.1", own]) == own
    assert opened(monkeypatch, ["/env/lib/libomp.so"]) == "/env/lib/libomp.so"
    assert opened(monkeypatch, []) == "libgomp.so.1"


def test_without_any_runtime_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, mode: int) -> None:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(_openmp, "loaded_runtimes", list)
    monkeypatch.setattr(ctypes, "CDLL", fail)
    with pytest.raises(ImportError, match=r"OpenMP runtime; torch has loaded none, and libgomp\.so\.1: cannot open"):
        _openmp.make_visible()


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("/x/libgomp.so.1", True),
        ("/x/libgomp-a34b3233.so.1.0.0", True),
        ("/x/libiomp5.so", True),
        ("/x/libomp.so", True),
        ("/x/libompl.so", False),
        ("/x/libtorch_cpu.so", False),
    ],
)
def test_names_of_runtimes(path: str, counts: bool) -> None:
    assert bool(_openmp._RUNTIME.search(path)) == counts
