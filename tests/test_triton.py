"""Promise: the Triton kernels compute what the oracle says, and compile for every GPU generation, on a machine without a GPU.

What only a GPU can prove is listed in `ltkernels.triton`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE,  # in the checkout's top folder, Python would take the package without its compiled module
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout


def test_import_needs_no_triton(tmp_path) -> None:
    """Neither ltkernels nor ltkernels.triton imports Triton, and `available` says why it cannot be had."""
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton here')")
    code = (
        "import ltkernels, ltkernels.triton as t; ok, reason = t.available(); assert not ok; "
        "assert 'not installed (no Triton here)' in reason and 'ltkernels[triton]' in reason, reason"
    )
    run("-c", code, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("name", ["triton_interpreted.py", "triton_second.py", "triton_contrast.py"])
def test_kernels_under_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    # Its own process: TRITON_INTERPRET is read when a kernel is defined.
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name), TRITON_INTERPRET="1")
    assert " passed" in out
    assert "skipped" not in out


def test_a_sample_compiles_without_spilling() -> None:
    """One of each kernel and dtype for one capability; CI compiles all for three (`python -m ltkernels.triton.compile_all`)."""
    pytest.importorskip("triton")
    out = run("-m", "ltkernels.triton.compile_all", "--sample", "--capability", "90", TRITON_INTERPRET="0")
    assert ", 0 failures," in out
