"""What one part of the campaign is: a name, a number of cases at 1x, and a function that runs them from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What a part did. `failures` holds one text a failure, each with the seed and case that reproduce it."""

    cases: int = 0
    faults: int = 0  # faults injected
    failures: list[str] = field(default_factory=list)
    skipped: str = ""  # why nothing ran


@dataclass(frozen=True)
class Part:
    """`run(seed, cases)` is called in a process of its own; a crash or a hang of that process is a failure."""

    name: str
    what: str
    cases: int  # at 1x
    run: Callable[[int, int], Tally]
