"""Promise: what the README shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ltkernels as ltk

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_every_loss_is_listed() -> None:
    for loss in ltk.LOSSES.values():
        assert f"| `{loss.name}` | `{loss.__name__}` | {loss.logits} |" in README, loss.name


def test_quick_start_has_exactly_two_commands() -> None:
    section = README.split("## Quick start")[1].split("\n## ")[0]
    assert len(re.findall(r"^python3 ", section, flags=re.M)) == 2


@pytest.mark.parametrize("example", [text for text in EXAMPLES if "build = staticmethod" not in text])
def test_example_runs(example: str) -> None:
    exec(compile(example, "README", "exec"), {"torch": torch, "ltk": ltk})


def test_a_loss_in_one_file() -> None:
    (example,) = [text for text in EXAMPLES if "build = staticmethod" in text]
    scope = {"__name__": "ltkernels.losses.square_root", "__package__": "ltkernels.losses"}
    exec(compile(example, "README", "exec"), scope)
    try:
        loss = ltk.LOSSES["square_root"]
        assert loss is ltk.nn.SquareRoot
        assert ltk.adjustments.square_root([4, 1, 25]).weight.tolist() == pytest.approx([0.5, 1.0, 0.2])
        assert loss([4, 1, 25])(torch.randn(2, 3), torch.tensor([0, 1])).isfinite()
    finally:
        del ltk.LOSSES["square_root"]
