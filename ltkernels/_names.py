"""Names that people type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing where no known name is near; capitals and underscores do not count."""
    spelled = {plain(name): name for name in known}
    near = difflib.get_close_matches(plain(given), spelled, n=1, cutoff=0.6)
    return f" (did you mean {spelled[near[0]]}?)" if near else ""


def plain(name: str) -> str:
    """A name without what does not tell two names apart."""
    return name.lower().replace("_", "").replace("-", "")
