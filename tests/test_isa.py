"""Promise: every instruction set of this build that this processor has passes the value tests, and a wrong LTKERNELS_ISA is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

from ltkernels._native import _C

HERE = Path(__file__).parent
USABLE = [name for name, state in _C.info()["isas"].items() if state == "usable"]
OTHERS = [name for name in USABLE if name != _C.info()["isa"]]


def python(*args: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LTKERNELS_ISA": isa}
    return subprocess.run(
        [sys.executable, *args],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE,  # not the checkout: its source package has no compiled module
        check=False,
        timeout=600,
    )


@pytest.mark.skipif("LTKERNELS_ISA" in os.environ, reason="already inside such a run")
@pytest.mark.parametrize("isa", OTHERS)
def test_value_tests_pass(isa: str) -> None:
    values = ("loss_values", "truth_table", "simd", "soft_targets", "experts", "contrastive_values", "row_statistics")
    files = [str(HERE / f"test_{name}.py") for name in values]
    result = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not 2_to_the_31", *files, isa=isa)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("isa", USABLE)
def test_override(isa: str) -> None:
    result = python("-c", "import ltkernels; print(ltkernels._C.info()['isa'])", isa=isa)
    assert result.stdout.split() == [isa], result.stderr


def test_the_variable_is_read_at_import_alone() -> None:
    code = (
        "import os, ltkernels; isa = ltkernels._C.info()['isa']; os.environ['LTKERNELS_ISA'] = 'sse9'; "
        "assert ltkernels._C.info()['isa'] == isa"
    )
    result = python("-c", code, isa="")
    assert result.returncode == 0, result.stderr


def test_unknown_isa_is_an_import_error() -> None:
    result = python("-c", "import ltkernels", isa="sse9")
    assert result.returncode != 0
    assert "LTKERNELS_ISA=sse9" in result.stderr.splitlines()[-1]


def test_the_fastest_one_is_chosen() -> None:
    if "LTKERNELS_ISA" not in os.environ:
        assert _C.info()["isa"] == USABLE[-1]
    assert torch.get_num_threads() >= 1


def test_the_source_folder_says_that_it_is_not_built(tmp_path: Path) -> None:
    """Python started in a checkout finds the package without its compiled module."""
    shutil.copytree(HERE.parent / "ltkernels", tmp_path / "ltkernels", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__];"
        f"sys.path.insert(0, {str(tmp_path)!r}); import ltkernels"
    )
    result = python("-c", code, isa="baseline")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("ImportError: ltkernels has no compiled module")


def test_the_emulated_kernels_have_the_tolerances_of_the_oracle() -> None:
    header = (HERE / "cpu_host" / "host.h").read_text(encoding="utf-8")
    table = header.split("kTolerances[kDTypes] = {")[1].split("};")[0]
    rows = [tuple(float(x) for x in row.split(",")) for row in re.findall(r"\{(.+?)\}", table)]
    assert rows == [oracle.TOLERANCES[d] for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
