"""Promise: a program that uses the library type-checks under mypy --strict, its mistakes are found, and so are ours."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ltkernels as ltk
from ltkernels.losses import _core

ROOT = Path(__file__).parent.parent


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(ltk.__file__).with_name("py.typed").is_file()


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 has other types")
def test_package_and_program_type_check() -> None:
    """Both in one run, by pyproject.toml's settings: reading torch takes most of the time."""
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "ltkernels", "tests/typed_program.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_program_runs() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "typed_program.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_public_functions_beside_autograd_functions_are_annotated() -> None:
    """pyproject.toml lets mypy pass by the methods of torch.autograd.Function, and so by whole files."""
    distributed = [getattr(ltk.distributed, name) for name in ltk.distributed.__all__]
    public = [_core.adjusted_cross_entropy, _core.explain, ltk.functional.linear_adjusted_cross_entropy, *distributed]
    for function in public:
        signature = inspect.signature(function)
        bare = [name for name, parameter in signature.parameters.items() if parameter.annotation is parameter.empty]
        assert not bare, f"{function.__name__}: {bare}"
        made = inspect.isclass(function)  # what a class returns when called is no question
        assert made or signature.return_annotation is not signature.empty, function.__name__
