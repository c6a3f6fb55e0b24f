"""Holds every CUDA kernel to its registers: ``budget.py BUDGET PTXAS_OUTPUT ARCHITECTURE...``; what ``ptxas -v`` said is in the second.

Fails for a kernel over its budget of registers or spilled bytes, a kernel without a row in the table, a row without a kernel,
and an architecture that was not compiled.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def read_budget(text: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes of spill) that a kernel may use."""
    rows = (line.split() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {row[0]: (int(row[1]), int(row[2])) for row in rows}


def row_of(budget: dict, kernel: str) -> str:
    """The row that speaks for a kernel: of its very instance, of its element type, of its name."""
    name, _, arguments = kernel.replace(" ", "").partition("<")
    candidates = (f"{name}<{arguments}", f"{name}<{arguments.rstrip('>').split(',')[0]}>", name)
    return next((each for each in candidates if each in budget), name)


def read_kernels(text: str) -> list[tuple[str, str, int, int]]:
    """(architecture, kernel, registers, bytes of spill) of every entry function."""
    found: list[tuple[str, str, int, int]] = []
    entry, spill = None, 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(sm_\d+)", line):
            entry, spill = match.groups(), 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = max(spill, int(match[1]), int(match[2]))
        elif (match := re.search(r"Used (\d+) registers", line)) and entry:
            found.append((entry[1], entry[0], int(match[1]), spill))
            entry = None
    names = subprocess.run(
        ["c++filt"], input="\n".join(row[1] for row in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # adjusted_ce_rows<float, (ltk::cuda::Tables)1>(ltk::cuda::RowsJob) becomes adjusted_ce_rows<float, 1>
    short = [re.sub(r"\(ltk::cuda::Tables\)|ltk::cuda::|^void |\([^()]*\)$", "", name) for name in names]
    return [(row[0], name, row[2], row[3]) for row, name in zip(found, short)]


def failures(
    budget: dict[str, tuple[int, int]], kernels: list[tuple[str, str, int, int]], architectures: list[str]
) -> list[str]:
    wrong, used = [], set()
    for architecture, name, registers, spill in kernels:
        row = row_of(budget, name)
        used.add(row)
        if row not in budget:
            wrong.append(f"{name} has no row in the budget")
            continue
        if registers > budget[row][0]:
            wrong.append(f"{name} on {architecture} uses {registers} registers; its budget is {budget[row][0]}")
        if spill > budget[row][1]:
            wrong.append(f"{name} on {architecture} spills {spill} bytes; its budget is {budget[row][1]}")
    wrong += [f"the budget names {row}, which was not compiled" for row in budget if row not in used]
    wrong += [f"nothing was compiled for {each}" for each in architectures if each not in {k[0] for k in kernels}]
    return wrong


def main(arguments: list[str]) -> int:
    kernels = read_kernels(Path(arguments[1]).read_text())
    wrong = failures(read_budget(Path(arguments[0]).read_text()), kernels, arguments[2:])
    for name in dict.fromkeys(kernel[1] for kernel in kernels):
        uses = "  ".join(f"{row[0]} {row[2]:3}" for row in kernels if row[1] == name)
        print(f"{name:34} {uses}")
    print("\n".join(wrong) if wrong else f"{len(kernels)} kernels within their budget")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
