"""Holds the machine code of the main kernels to a budget: ``sass.py BUDGET DISASSEMBLY``; the second is what ``nvdisasm -c`` printed.

The kernels have no loop over a row, or a short one (the sigmoid loss), so that what a thread executes for it can be read from the code as
it stands: between its first 16-byte load of logits and its last 16-byte store of the gradient, instructions, exponentials and double
precision; in all of it, barriers, fences and local memory. Fails where a kernel has over a tenth more instructions than its budget, or more
of anything else; where logits are read or written in fewer 16-byte accesses; for a kernel of the table that is not in the code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

SLACK = 1.1  # of instructions: the rest of the counts is exact


class Counts(NamedTuple):
    """Of one kernel: 16-byte loads and stores of streamed data; instructions, exponentials and doubles between the first of those loads
    and the last of those stores; barriers and fences, and accesses to local memory (spills, arrays), anywhere."""

    loads: int
    stores: int
    instructions: int
    exponentials: int
    doubles: int
    barriers: int
    local: int


def kernels(disassembly: str) -> dict[str, list[str]]:
    """The instructions, ``OPCODE.MODIFIERS ...``, of every kernel by its mangled name."""
    found: dict[str, list[str]] = {}
    name = None
    for line in disassembly.splitlines():
        if match := re.match(r"\.section\s+\.text\.(\w+)", line.strip()):
            name = found.setdefault(match[1], [])
        elif name is not None and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line)):
            name.append(match[1].strip())
    return found


def counts(code: list[str]) -> Counts:
    loads = [k for k, line in enumerate(code) if line.startswith("LDG.E.EF.128")]
    stores = [k for k, line in enumerate(code) if line.startswith("STG.E.128")]
    if not loads or not stores:
        return Counts(len(loads), len(stores), len(code), 0, 0, 0, 0)
    hot = code[loads[0] : stores[-1] + 1]
    return Counts(
        len(loads),
        len(stores),
        len(hot),
        sum(line.startswith("MUFU.EX2") for line in hot),
        sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", line)) for line in hot),
        sum(line.startswith(("BAR.", "MEMBAR", "UCGABAR_WAIT")) for line in code),
        sum(line.startswith(("LDL", "STL")) for line in code),
    )


def read_budget(text: str) -> dict[str, Counts]:
    rows = (line.split() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {row[0]: Counts(*map(int, row[1:])) for row in rows}


def failures(budget: dict[str, Counts], found: dict[str, Counts]) -> list[str]:
    wrong = []
    for name, allowed in budget.items():
        if name not in found:
            wrong.append(f"the budget names {name}, which is not in the code")
            continue
        for field, limit, is_now in zip(Counts._fields, allowed, found[name], strict=True):
            if field in ("loads", "stores"):
                if is_now < limit:
                    wrong.append(f"{name} has {is_now} 16-byte {field} of logits; it had {limit}")
            elif is_now > limit * (SLACK if field == "instructions" else 1):
                wrong.append(f"{name} has {is_now} {field.replace('_', ' ')}; its budget is {limit}")
    return wrong


def main(arguments: list[str]) -> int:
    budget = read_budget(Path(arguments[0]).read_text())
    found = {name: counts(code) for name, code in kernels(Path(arguments[1]).read_text()).items()}
    found = {name: found[name] for name in found if name in budget or "adjusted_ce_rowsI" in name}
    for name, row in found.items():
        print(name, *row)
    wrong = failures(budget, found)
    print("\n".join(wrong) if wrong else f"{len(budget)} kernels within their budget of machine code")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
