"""Memory that is not there, and more of it than 32-bit indices reach."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from _draw import Draw
from _part import Part, Tally

import ltkernels as ltk
from ltkernels import diversity, selection
from ltkernels.losses import _two_phase

F = ltk.functional
MIB = 1 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h


def _used() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Work:
    """A call that needs memory: `run` makes it, `state` is everything that a failed call must leave as it was."""

    def __init__(self, run: Callable[[], object], state: Callable[[], list[torch.Tensor]]) -> None:
        self.run, self.state = run, state


def loss_work(draw: Draw) -> Work:
    z = draw.normal(2048, 1000).to(draw.choice([torch.float32, torch.float64])).requires_grad_()
    y, module = (
        draw.integers(0, 1000, 2048),
        ltk.nn.LogitAdjustedCrossEntropy(draw.counts(1000), reduction=draw.choice(["mean", "none"])),
    )

    def run() -> object:
        return torch.autograd.grad(module(z, y).sum(), z)

    return Work(run, lambda: [z.detach(), y, *module.buffers()])


def seesaw_work(draw: Draw) -> Work:
    z, y, module = draw.normal(4096, 500).float().requires_grad_(), draw.integers(0, 500, 4096), ltk.nn.Seesaw(500)

    return Work(
        lambda: module(z, y), lambda: [z.detach(), module.seen]
    )  # counts in forward, which computes the gradient too


def inplace_work(draw: Draw) -> Work:
    kept = draw.normal(1000, 2048).float()
    z, y = kept.t(), draw.integers(0, 1000, 2048)  # the gradient has to be made beside it first

    def run() -> object:
        kept.copy_(start)
        return F.adjusted_cross_entropy(z, y, inplace=True)

    start = kept.clone()
    return Work(run, lambda: [start])


def head_work(draw: Draw) -> Work:
    x, w = draw.normal(512, 128).float().requires_grad_(), draw.normal(20000, 128).float().requires_grad_()
    y, normalize = draw.integers(0, 20000, 512), draw.chance(0.5)

    def run() -> object:
        return torch.autograd.grad(F.linear_adjusted_cross_entropy(x, w, y, normalize=normalize), (x, w))

    return Work(run, lambda: [x.detach(), w.detach(), y])


def statistics_work(draw: Draw) -> Work:
    made, rows = diversity.FeatureStatistics(512), draw.normal(8192, 512).float()
    made.update(rows[:600])

    def run() -> object:
        other = diversity.FeatureStatistics(512).merge(made)
        return other.update(rows).diversity()

    return Work(run, lambda: [made.mean, made.scatter, rows])


def select_work(draw: Draw) -> Work:
    z, x = draw.normal(100, 64), draw.normal(20000, 64)
    engine = draw.choice(["full", "lazy"])

    def run() -> object:
        return selection.select_subsets(z, x, list(range(0, 20001, 10)), m=3, engine=engine, memory_budget=1 << 34)

    return Work(run, lambda: [z, x])


WORK = (loss_work, seesaw_work, inplace_work, head_work, statistics_work, select_work)
# What torch, numpy, C++ and this library say.
SAYS = re.compile(r"alloc|memory|bytes", re.I)


def memory_limits(seed: int, cases: int) -> Tally:
    tally = Tally()
    torch.set_num_threads(1)  # a limit on the address space would also refuse a thread its stack
    # Every array of its own from the system and back to it: otherwise a call would find what the last one freed.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for case in range(cases):
        draw = Draw(seed, case)
        make = WORK[case % len(WORK)]
        work = make(draw)
        work.run()  # whatever is loaded or cached by a first call
        before = [value.clone() for value in work.state()]
        headroom = draw.choice([draw.randint(0, 2 * MIB), draw.randint(0, 24 * MIB)])
        said = f"seed {seed} case {case}: {make.__name__}, {headroom / MIB:.1f} MiB"
        resource.setrlimit(resource.RLIMIT_AS, (_used() + headroom, hard))
        error: BaseException | None = None
        try:
            work.run()
        except (MemoryError, RuntimeError, ValueError) as caught:
            error = caught
        except Exception as caught:
            tally.failures.append(f"{said}: {type(caught).__name__}: {str(caught)[:200]}")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        tally.cases += 1
        if error is not None:
            tally.faults += 1
            if not isinstance(error, MemoryError) and not SAYS.search(str(error)):
                tally.failures.append(
                    f"{said}: the error does not speak of memory: {type(error).__name__}: {str(error)[:200]}"
                )
            if not all(torch.equal(one, other) for one, other in zip(work.state(), before, strict=True)):
                tally.failures.append(f"{said}: the failed call changed its inputs or its state")
        try:
            work.run()
        except Exception as caught:
            tally.failures.append(f"{said}: the next call failed: {type(caught).__name__}: {str(caught)[:200]}")
    return tally


# ---- 2^31 elements and more ------------------------------------------------------------------------------------------


def _free() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def repeated(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, classes) bfloat16 logits whose rows are all the same but for the last, and labels, the same but for the last."""
    generator = torch.Generator().manual_seed(classes)
    row = (torch.randn(classes, generator=generator) * 3).bfloat16()
    z = torch.empty(rows, classes, dtype=torch.bfloat16)
    z[:] = row
    z[-1] = row.flip(0)
    y = torch.zeros(rows, dtype=torch.int64)
    y[-1] = classes - 1
    return z, y


def big_loss(rows: int, classes: int) -> None:
    """Losses and gradients at both ends against the same two rows alone."""
    z, y = repeated(rows, classes)
    ends = torch.tensor([0, rows - 1])
    small = z[ends].clone().requires_grad_()
    wanted = F.adjusted_cross_entropy(small, y[ends], reduction="none")
    wanted.backward(torch.full((2,), 1.0 / rows))
    loss = F.adjusted_cross_entropy(z.requires_grad_(), y, inplace=True)
    mean = (float(wanted[0].detach()) * (rows - 1) + float(wanted[1].detach())) / rows
    assert abs(float(loss.detach()) - mean) <= 1e-5 * abs(mean), f"loss {float(loss.detach())}, not {mean}"
    gradient = z.detach()  # in the logits' own memory: 4 GiB are not needed twice
    for at, row in ((0, 0), (rows - 1, 1), (rows // 2, 0)):
        assert torch.allclose(gradient[at].float(), small.grad[row].float(), rtol=1e-2, atol=0), (
            f"the gradient of row {at} differs"
        )


def big_phases(rows: int, classes: int) -> None:
    z, y = repeated(rows, classes)
    sigma = torch.ones(rows, dtype=torch.float64)
    statistics = _two_phase.statistics(z, y, sigma)
    ends = torch.tensor([0, rows - 1])
    small = z[ends].clone()
    wanted = _two_phase.statistics(small, y[ends], sigma[:2])
    assert torch.equal(statistics[ends], wanted)
    terms = _two_phase.finish(wanted, y[ends], classes=classes).terms
    every = terms[:1].repeat(rows, 1)
    every[-1] = terms[1]
    _two_phase.gradient(z, y, sigma, every, out=z)
    assert torch.equal(z[ends], _two_phase.gradient(small, y[ends], sigma[:2], terms))


def big_images(rows: int, side: int) -> None:
    """Masks and gathers of more than 2^31 pixels, a byte each."""
    images = torch.zeros(rows, 1, side, side, dtype=torch.uint8)
    images[-1, 0, -1, -1] = 7
    out = ltk.augment.crop_flip(images, padding=0, flip=False)
    assert out.shape == images.shape
    assert int(out[-1, 0, -1, -1]) == 7
    assert int(out[-1].sum()) == 7


# name, work, bytes
BIG: tuple[tuple[str, Callable[[], None], int], ...] = (
    ("loss of 65 537 x 32 768 bfloat16", lambda: big_loss(65_537, 32_768), 5 << 30),
    ("loss of 214 748 365 x 10 bfloat16", lambda: big_loss(214_748_365, 10), 15 << 29),
    ("two phases of 65 537 x 32 768 bfloat16", lambda: big_phases(65_537, 32_768), 5 << 30),
    ("crops of 33 x 8 192 x 8 192 bytes", lambda: big_images(33, 8_192), 6 << 30),
)


def large(seed: int, cases: int) -> Tally:
    """Once each, whatever the effort above 10x; what does not fit the free memory is left out, and the number of cases says so."""
    if float(os.environ.get("LTKERNELS_EFFORT", "1")) < 10:
        return Tally(skipped="takes gigabytes: from effort 10x on")
    torch.set_num_threads(2)
    tally = Tally()
    left_out = []
    for name, work, size in BIG:
        if _free() < size + (1 << 30):
            left_out.append(name)
            continue
        try:
            work()
        except Exception as error:
            tally.failures.append(f"{name}: {type(error).__name__}: {error}")
        tally.cases += 1
    if not tally.cases:
        tally.skipped = f"not enough free memory for {', '.join(left_out)}"
    return tally


PARTS = (
    Part(
        "memory limits",
        "calls in too little address space: an error that speaks of memory, state intact, the next call works",
        30,
        memory_limits,
    ),
    Part("2^31 elements", "losses, two phases and crops of more elements than 32 bits count", 4, large),
)
