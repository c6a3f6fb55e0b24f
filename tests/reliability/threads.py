"""Kernels and selection from eight threads at once, in forked and spawned processes, and in DataLoader workers: the bits of the serial
answer, and no deadlock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from _draw import Draw
from _part import Part, Tally

import ltkernels as ltk
from ltkernels import selection

# Seconds for work that takes milliseconds.
PATIENCE = 60.0


Job = Callable[[], list[torch.Tensor]]


# Each draws its inputs at once and gives the work on them.


def loss(draw: Draw) -> Job:
    rows, classes = draw.randint(1, 300), draw.randint(2, 1500)
    record = draw.choice(
        [one for one in ltk.LOSSES.values() if one.name != "seesaw"]
    )  # its table is torch's own parallel logarithm
    counts = draw.counts(classes)
    module = record.make(counts, seed=3) if "seed" in record.own_options else record.make(counts)
    logits, y = (
        draw.normal(rows, classes).to(draw.choice([torch.float32, torch.bfloat16])),
        draw.integers(0, classes, rows),
    )

    def work() -> list[torch.Tensor]:
        z = logits.detach().requires_grad_()
        value = module.eval()(z, y)
        value.backward()
        return [value.detach(), z.grad]

    return work


def head(draw: Draw) -> Job:
    classes = draw.randint(200, 2000)
    features, weight, y = draw.normal(128, 16).float(), draw.normal(classes, 16).float(), draw.integers(0, classes, 128)
    normalize = draw.chance(0.5)

    def work() -> list[torch.Tensor]:
        x, w = features.detach().requires_grad_(), weight.detach().requires_grad_()
        value = ltk.functional.linear_adjusted_cross_entropy(x, w, y, normalize=normalize, chunk_rows=40)
        value.backward()
        return [value.detach(), x.grad, w.grad]

    return work


def select(draw: Draw) -> Job:
    z, x, offsets = draw.normal(30, 16), draw.normal(200, 16), list(range(0, 201, 4))
    options = {"m": 8, "mode": draw.choice(["max", "min"]), "engine": draw.choice(["auto", "lazy", "full"])}

    def work() -> list[torch.Tensor]:
        found = selection.select_subsets(z, x, offsets, **options)
        return [found.picked, found.fdg, selection.subset_gains(z, x, offsets)]

    return work


def cluster(draw: Draw) -> Job:
    x = draw.normal(400, 8)

    def work() -> list[torch.Tensor]:
        found = selection.kmeans_subsets(x, 20, balanced=True, niter=4, seed=1)
        return [found.order, found.offsets]

    return work


JOBS = (loss, loss, head, select, cluster)


def job(seed: int, case: int) -> Job:
    return JOBS[case % len(JOBS)](Draw(seed, case))


def answer(seed: int, case: int) -> list[torch.Tensor]:
    return job(seed, case)()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit; by bytes, because torch.equal of a large tensor is parallel and would hang in a forked child."""
    return [bytes_of(value) for value in a] == [bytes_of(value) for value in b]


def bytes_of(value: torch.Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.double().numpy().tobytes()


def eight_threads(seed: int, cases: int) -> Tally:
    torch.set_num_threads(2)
    tally, expected = Tally(), [answer(seed, case) for case in range(cases)]
    with ThreadPoolExecutor(8) as pool:
        for case, found in enumerate(pool.map(lambda case: answer(seed, case), range(cases))):
            tally.cases += 1
            if not same(found, expected[case]):
                tally.failures.append(
                    f"seed {seed} case {case}: {JOBS[case % len(JOBS)].__name__} differs beside seven other threads"
                )
    return tally


# ---- fork ------------------------------------------------------------------------------------------------------------


def in_fork(work: Callable[[], bool], depth: int = 1, patience: float = PATIENCE) -> str:
    """Runs `work` in a forked child (of a child, for depth 2); why that failed, or nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of fork with threads; that is what is tried here
        pid = os.fork()
    if pid == 0:
        code = 3
        try:
            code = (0 if work() else 1) if depth == 1 else 0 if not in_fork(work, depth - 1, patience / 2) else 1
        finally:
            os._exit(code)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "", 1: "another answer", 3: "an exception"}.get(code, f"exit code {code}")
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"no end within {patience:g} s"


def forks(seed: int, cases: int) -> Tally:
    """Use, fork, use in the child and in the parent; also while other threads are inside kernels."""
    torch.set_num_threads(2)
    tally = Tally()
    for case in range(cases):
        draw = Draw(seed, 10**6 + case)
        work, serial = job(seed, case), JOBS[case % len(JOBS)] is not loss
        torch.set_num_threads(1 if serial else 2)
        expected = work()
        torch.set_num_threads(2)
        _ = work()  # on the pool that the child does not get
        busy = ThreadPoolExecutor(2) if draw.chance(0.3) else None
        running = [busy.submit(answer, seed, 5 * k) for k in range(2)] if busy else []
        depth = draw.randint(1, 2)

        def child(serial: bool = serial, work: Job = work, expected: list[torch.Tensor] = expected) -> bool:
            # A loss runs our threads alone. The others run torch's and BLAS's too, which do not survive fork: DataLoader's workers take one
            # thread for that reason.
            if serial:
                torch.set_num_threads(1)
            return same(work(), expected)

        why = in_fork(child, depth)
        for one in running:
            one.result()
        if busy:
            busy.shutdown()
        torch.set_num_threads(1 if serial else 2)
        if not why and not same(work(), expected):
            why = "another answer in the parent afterwards"
        tally.cases += 1
        if why:
            tally.failures.append(
                f"seed {seed} case {case}: {JOBS[case % len(JOBS)].__name__} in a forked child of depth {depth}: {why}"
            )
    return tally


# ---- DataLoader workers, spawn ---------------------------------------------------------------------------------------


class Answers(torch.utils.data.Dataset):
    def __init__(self, seed: int, cases: int) -> None:
        self.seed, self.cases = seed, cases

    def __len__(self) -> int:
        return self.cases

    def __getitem__(self, case: int) -> tuple[int, list[bytes]]:
        return case, [bytes_of(value) for value in answer(self.seed, case)]


def first(batch: list[Any]) -> Any:
    return batch[0]


def loaders(seed: int, cases: int) -> Tally:
    tally = Tally()
    torch.set_num_threads(1)  # as workers do
    data = Answers(seed, cases)
    expected = [data[case][1] for case in range(cases)]
    torch.set_num_threads(2)
    _ = [data[case] for case in range(min(cases, len(JOBS)))]  # the pools that a fork does not copy
    for method in ("fork", "spawn"):
        count = cases if method == "fork" else min(cases, 3 * len(JOBS))
        context = multiprocessing.get_context(method)
        options = {"num_workers": 2, "collate_fn": first, "timeout": PATIENCE, "multiprocessing_context": context}
        loader = torch.utils.data.DataLoader(Answers(seed, count), batch_size=1, **options)
        try:
            for case, found in loader:
                tally.cases += 1
                if found != expected[case]:
                    tally.failures.append(
                        f"seed {seed} case {case}: {JOBS[case % len(JOBS)].__name__} differs in a worker ({method})"
                    )
        except RuntimeError as error:
            tally.failures.append(f"seed {seed}, workers by {method}: {error}")
    return tally


PARTS = (
    Part(
        "eight threads",
        "losses, heads, selection and k-means from eight Python threads: the bits of one thread",
        60,
        eight_threads,
    ),
    Part("fork", "use, fork, use in child, grandchild and parent, also while other threads compute", 30, forks),
    Part("DataLoader workers", "the same work in forked and spawned workers", 15, loaders),
)
