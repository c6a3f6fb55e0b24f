"""Promise: Python threads, forked children and DataLoader workers get right answers and never hang."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import ltkernels as ltk

LOSS = ltk.nn.LogitAdjustedCrossEntropy(list(range(1, 1001)))


def value(seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(300, 1000, generator=generator, requires_grad=True)
    loss = LOSS(z, torch.randint(0, 1000, (300,), generator=generator))
    loss.backward()
    return loss.item(), z.grad.norm().item()


def test_eight_python_threads() -> None:
    expected = [value(seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(value, range(24))) == expected


def test_forked_child() -> None:
    """The parent's OpenMP pool does not survive fork(): a parallel region in the child would hang."""
    code = """
import os, sys
os.chdir("/")
import torch, ltkernels as ltk
loss = ltk.nn.CrossEntropy()
z, y = torch.randn(300, 1000), torch.randint(0, 1000, (300,))
expected = loss(z, y)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(loss(z, y), expected) else 1)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False, env=dict(os.environ))
    assert result.returncode == 0


def test_dataloader_workers() -> None:
    class Losses(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> float:
            return value(index)[0]

    expected = [value(index)[0] for index in range(4)]
    loader = torch.utils.data.DataLoader(Losses(), batch_size=1, num_workers=2)
    assert [batch.item() for batch in loader] == expected
