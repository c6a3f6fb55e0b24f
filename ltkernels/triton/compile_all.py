"""Compiles every specialisation that the launchers can ask for to machine code, without a GPU:

    python -m ltkernels.triton.compile_all [--neighbours] [--sample] [--capability 90]... [--kernel NAME] [--jobs J] [--report-spills]

and fails where one does not compile, spills more than a few registers, needs more shared memory than a block can have, or is for
aligned rows and does not write 16 bytes at a time. The list
is what `_configs.every` and `every_linear` yield, and `every` of the files that have a kernel and its launcher, for each of three compute
capabilities; `--neighbours` is what autotuning may launch beside it, and `--sample` what the tests compile. With `--report-spills` a
spill is printed and is no failure: the tiles are made for Triton 3.9, of which older ones take more registers.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .._checks import real_dtype
from . import _configs, experts, row_logsumexp, sigmoid, soft_targets
from ._configs import FP_FUSION, Specialisation

CAPABILITIES = (80, 90, 100)
OF_THEIR_OWN = (soft_targets, experts, sigmoid, row_logsumexp)  # files that have a kernel, its launcher and its list
# Bytes a block can have (CUDA programming guide, technical specifications by compute capability), the system's KiB off.
_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes a thread may keep in memory. ptxas puts a few scalars there where that lets another block onto the multiprocessor; a
# tile that does not fit takes 64 and more.
SPILL_BUDGET = 32
# Where the registers are limited so that a second block has room, what does not fit may be this much: with one block alone the same kernel
# waits for its loads longer than the reloads take.
LIMITED_SPILL_BUDGET = 64
# Pointers by name, and *_f64; every other one is in the loss' dtype.
_LOGITS = {"z", "grad", "features", "weight_matrix", "bias", "vectors"}
_OTHERS = {"target": "i64", "target_b": "i64", "seed": "i64", "hot8": "u8", "hot32": "fp32"}
_OTHERS |= dict.fromkeys(("own_begin", "own_end", "absent"), "i64")
_REAL_UNLESS = {"target_rows": "TEACHER"}  # in the logits' dtype where that constant says so


class Usage(NamedTuple):
    """Of one compiled kernel: registers a thread, bytes a thread spills (its stack), bytes of shared memory a block; and whether it is
    for aligned rows and has no store of 16 bytes."""

    registers: int
    spilled: int
    shared: int
    narrow: bool = False


def _signature(specialisation: Specialisation) -> dict[str, str]:
    names = _configs._NAMES
    of_logits, real = names[specialisation.dtype], names[real_dtype(specialisation.dtype)]
    signature, constants = {}, dict(specialisation.constants)
    for parameter in specialisation.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        else:
            narrow = name in _LOGITS or constants.get(_REAL_UNLESS.get(name))
            wide = "fp64" if name.endswith("_f64") else real
            signature[name] = "*" + (of_logits if narrow else _OTHERS.get(name, wide))
    return signature


def compile_one(specialisation: Specialisation, capability: int) -> Usage:
    """Compiles for one compute capability (80 for 8.0) and reads what the machine code uses."""
    source = ASTSource(specialisation.kernel, _signature(specialisation), dict(specialisation.constants))
    options = {**specialisation.options, "enable_fp_fusion": FP_FUSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    narrow = bool(dict(specialisation.constants).get("ALIGNED")) and "st.global.v4.b32" not in compiled.asm["ptx"]
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)._replace(narrow=narrow)


def _usage(cubin: bytes, shared: int) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return Usage(found["REG"], found["STACK"], shared)


def problem(usage: Usage, capability: int, limited: bool = False) -> str:
    """What is wrong with a compiled kernel; empty where nothing is. `limited`: its registers are."""
    if usage.spilled > (LIMITED_SPILL_BUDGET if limited else SPILL_BUDGET):
        return f"spills {usage.spilled} bytes a thread"
    if usage.shared > _SHARED[capability]:
        return f"needs {usage.shared} bytes of shared memory; a block has {_SHARED[capability]}"
    if usage.narrow:
        return "has no 16-byte store, and its rows are aligned"
    return ""


@functools.cache
def everything(neighbours: bool = False) -> tuple[Specialisation, ...]:
    if neighbours:
        return tuple(_configs.every_neighbour())
    return tuple(chain(_configs.every(), _configs.every_linear(), *(module.every() for module in OF_THEIR_OWN)))


def sample() -> list[Specialisation]:
    """One of each kernel and dtype: without a closed form the last listed, which has all switches on."""
    plain = (each for each in everything() if dict(each.constants).get("FORM", 0) == 0)
    chosen = {(each.kernel.__name__, each.dtype): each for each in plain}
    return list(chosen.values())


def _work(index: int, capability: int, neighbours: bool) -> tuple[int, int, Usage | None, str]:
    try:
        usage = compile_one(everything(neighbours)[index], capability)
    except Exception as error:
        return index, capability, None, f"{type(error).__name__}: {error}"
    limited = everything(neighbours)[index].registers is not None
    return index, capability, usage, problem(usage, capability, limited)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES, help="default: all")
    parser.add_argument("--sample", action="store_true", help="one of each kernel and dtype")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--neighbours", action="store_true", help="what autotuning may launch beside the list")
    parser.add_argument("--report-spills", action="store_true", help="a kernel that spills is printed and no failure")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="one line a kernel")
    arguments = parser.parse_args()
    listed = everything(arguments.neighbours)
    few = set(sample()) if arguments.sample else listed
    chosen = [i for i, each in enumerate(listed) if arguments.kernel in each.name and each in few]
    began, failures, most = time.monotonic(), 0, Usage(0, 0, 0)
    jobs = [
        (i, capability, arguments.neighbours) for capability in arguments.capability or CAPABILITIES for i in chosen
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for index, capability, usage, wrong in pool.map(_work, *zip(*jobs)):
            if usage is not None:
                most = Usage(*map(max, most, usage))
            if wrong or arguments.verbose:
                print(f"sm_{capability} {listed[index].name}: {usage} {wrong}", flush=True)
            failures += bool(wrong) and not (arguments.report_spills and wrong.startswith("spills"))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(jobs)} kernels, {failures} failures, {time.monotonic() - began:.0f} s ({spent.ru_utime + spent.ru_stime:.0f} s of "
        f"processor time); at most {most.registers} registers, "
        f"{most.shared} bytes of shared memory"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
