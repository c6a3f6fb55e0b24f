"""Smoke test of a wheel, run by the Python of a bare environment that has it installed, with torch and numpy and nothing else:

    python tests/wheel_smoke.py ltkernels-...-manylinux_..._x86_64.whl

Every check is named after the packaging fault that it catches. It needs no pytest.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import torch

import ltkernels as ltk

WHEEL = Path(sys.argv[1])
NAMES = zipfile.ZipFile(WHEEL).namelist()
INFO = ltk._C.info()
# What every Linux system has beside Python; manylinux promises their versions.
SYSTEM = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+")
KERNEL = """
import sys, torch, ltkernels as ltk
torch.set_num_threads(2)
logits, target = torch.randn(512, 2003, requires_grad=True), torch.arange(512)
loss = ltk.functional.adjusted_cross_entropy(logits, target, shift=torch.linspace(-3, 0, 2003))
loss.backward()
double = logits.detach().double().requires_grad_()
expected = torch.nn.functional.cross_entropy(double + torch.linspace(-3, 0, 2003), target)
expected.backward()
assert abs(loss.item() - expected.item()) < 1e-5 * expected.item(), (loss, expected)
assert (logits.grad - double.grad).abs().max() < 1e-8, "gradient"
"""


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh process, away from the checkout."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def needed() -> list[str]:
    dynamic = subprocess.run(["readelf", "-d", ltk._C.__file__], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)


def the_checkout_is_tested_instead_of_the_wheel() -> None:
    assert Path(ltk.__file__).is_relative_to(sysconfig.get_path("platlib")), ltk.__file__


def linked_to_libtorch_or_cuda_or_openmp() -> None:
    """libtorch ties the wheel to one torch, CUDA libraries to machines that have them, an OpenMP runtime brings a second one."""
    others = [name for name in needed() if not SYSTEM.fullmatch(name)]
    assert not others, others


def a_library_was_grafted_in() -> None:
    """A copy of libgomp under another name is a second runtime in the process, whatever the module is linked to."""
    shared = [name for name in NAMES if ".so" in Path(name).name or ".libs/" in name]
    assert len(shared) == 1, shared


def two_openmp_runtimes() -> None:
    mapped = python(f"{KERNEL}\nprint(open('/proc/self/maps').read())")
    runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[-.]\S*", mapped))
    assert len(runtimes) == 1, runtimes


def needs_a_gpu_driver() -> None:
    code = f"{KERNEL}\nprint('libcuda.so' in open('/proc/self/maps').read())"
    assert python(code, CUDA_VISIBLE_DEVICES="") == "False", "the driver is loaded by a CPU kernel"


def an_instruction_set_is_missing() -> None:
    expected = {"baseline", "avx2", "avx512"} if platform.machine() == "x86_64" else {"baseline"}
    assert set(INFO["isas"]) >= expected, INFO["isas"]
    for name, state in INFO["isas"].items():
        if state == "usable":
            code = f"{KERNEL}\nprint(ltk._C.info()['isa'])"
            assert python(code, LTKERNELS_ISA=name) == name
        else:
            print(f"    ({name}: {state})")


def too_large() -> None:
    limit = 20e6 if INFO["cuda"] else 5e6
    assert WHEEL.stat().st_size < limit, WHEEL.stat().st_size


def holds_what_nobody_needs() -> None:
    unwanted = re.compile(
        r"(^|/)(tests?|csrc|results|examples|\.ci|\.github|build|CMakeLists\.txt)(/|$)|\.(cpp|h|inl|cu|cuh|o|json|md|png|sh)$|/test_"
    )
    found = [name for name in NAMES if ".dist-info/" not in name and unwanted.search(name)]
    assert not found, found


def lacks_a_data_file() -> None:
    """Typing marker and the stub of the compiled module, presets, the licence, the command."""
    wanted = ["ltkernels/py.typed", "ltkernels/_C.pyi", "ltkernels/benchmarks/__init__.py"]
    wanted += [
        f"ltkernels/train/report/templates/{name}" for name in ("page.html", "run.html", "style.css", "tables.js")
    ]
    missing = [name for name in wanted if name not in NAMES]
    assert not missing, missing
    assert sum(name.startswith("ltkernels/train/presets/") and name.endswith(".toml") for name in NAMES) >= 5
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in NAMES)


def a_dependency_is_not_declared() -> None:
    """Everything that needs no extra works beside torch and numpy alone."""
    extras = {"faiss-cpu", "scikit-learn", "matplotlib", "scipy", "pillow", "triton"}
    extras -= {
        re.split(r"\W", line)[0].lower() for line in importlib.metadata.requires("torch") or []
    }  # triton, on GPUs
    installed = {str(found.name).lower() for found in importlib.metadata.distributions()}
    assert not extras & installed, f"the environment is not bare: {sorted(extras & installed)}"
    python(
        "import ltkernels.augment, ltkernels.distributed, ltkernels.diversity, ltkernels.heads, ltkernels.selection, torch\n"
        "x = torch.randn(60, 8)\n"
        "ltkernels.selection.select_subsets(x[:20], x[20:], [0, 10, 20, 40], m=2)"
    )


def the_command_does_not_start() -> None:
    command = Path(sysconfig.get_path("scripts")) / "ltkernels"
    result = subprocess.run([command, "doctor"], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert INFO["isa"] in result.stdout, result.stdout


def versions_differ() -> None:
    assert importlib.metadata.version("ltkernels") == ltk.__version__ == WHEEL.name.split("-")[1]


def wrong_tag() -> None:
    """An index takes no linux_* wheel; one for another Python or processor would not be chosen."""
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    pattern = rf"ltkernels-[^-]+-{python_tag}-{python_tag}-(manylinux_\d+_\d+_{platform.machine()}\.?)+\.whl"
    assert re.fullmatch(pattern, WHEEL.name), WHEEL.name


CHECKS = [
    the_checkout_is_tested_instead_of_the_wheel,
    linked_to_libtorch_or_cuda_or_openmp,
    a_library_was_grafted_in,
    two_openmp_runtimes,
    needs_a_gpu_driver,
    an_instruction_set_is_missing,
    too_large,
    holds_what_nobody_needs,
    lacks_a_data_file,
    a_dependency_is_not_declared,
    the_command_does_not_start,
    versions_differ,
    wrong_tag,
]


def main() -> int:
    print(f"{WHEEL.name}, {WHEEL.stat().st_size / 1e6:.2f} MB, torch {torch.__version__}, {INFO}")
    failed = 0
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            check()
        except AssertionError as error:
            failed += 1
            print(f"FAULT  {name}: {error}")
        else:
            print(f"no     {name}")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
