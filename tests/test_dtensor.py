"""Promise: DTensor logits, in whatever placement, have the loss and the gradient of the whole ones, and nothing else is taken for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_processes(tmp_path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("dtensor_program.py"))]
    running = [
        subprocess.Popen(
            [*program, str(rank), "2", str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    for process, output in zip(running, outputs):
        assert process.returncode == 0, output[-4000:]
        assert output.strip().endswith("ok")
