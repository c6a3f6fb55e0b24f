"""The program of one instruction set: everything that calls a kernel, at random; `guarded` puts its buffers between guard pages.

    python _kernel_cases.py SEED CASES ANSWER [guarded | threads]

`threads` runs what shares work among threads, on four of them. The environment variable LTKERNELS_FROM names the folder of another build.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

if "LTKERNELS_FROM" in os.environ:
    sys.path.insert(0, os.environ["LTKERNELS_FROM"])
    # An editable install redirects its imports before any folder is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]

import _draw  # noqa: E402
import beside  # noqa: E402
import contrast  # noqa: E402
import features  # noqa: E402
import losses  # noqa: E402
import soft_targets  # noqa: E402
import torch  # noqa: E402
from _part import Tally  # noqa: E402

from ltkernels._native import _C  # noqa: E402


class Loud(_draw.Draw):
    """Says its case before it runs: the last one that the log shows is the one that crashed."""

    def __init__(self, seed: int, case: int) -> None:
        super().__init__(seed, case)
        os.write(2, f"seed {seed} case {case}\n".encode())


def direct(draw: _draw.Draw) -> None:
    """Kernels that no public function reaches on every processor."""
    n = draw.size(70)
    x = (draw.normal(n).float() * 30).clamp(max=88)  # what exp_f32 promises
    y = torch.empty(n)
    _C.exp_f32(x.data_ptr(), y.data_ptr(), n)
    assert torch.allclose(y, x.exp(), rtol=1e-5, atol=1e-37)
    batch, size, threads = draw.size(20), draw.size(12), 2
    root = draw.normal(batch, size, size)
    matrices = root @ root.mT + torch.eye(size, dtype=torch.float64)
    out, scratch = (
        torch.empty(batch, dtype=torch.float64),
        torch.empty(threads * _C.logdet_scratch(size), dtype=torch.float64),
    )
    _C.logdet_batch(matrices.data_ptr(), batch, size, scratch.data_ptr(), out.data_ptr(), threads)
    assert torch.allclose(
        out, torch.linalg.cholesky(matrices).diagonal(dim1=1, dim2=2).log().sum(1) * 2, rtol=1e-9, atol=1e-9
    )


def shared(seed: int, cases: int) -> Tally:
    """Shapes of many blocks, so that every thread has work."""
    import threads

    torch.set_num_threads(4)
    tally = Tally()
    for case in range(cases):
        os.write(2, f"seed {seed} case {case}\n".encode())
        work = threads.job(seed, case)
        if not threads.same(work(), work()):
            tally.failures.append(
                f"seed {seed} case {case}: {threads.JOBS[case % len(threads.JOBS)].__name__} gives other bits the second time"
            )
        tally.cases += 1
    return tally


def main(seed: int, cases: int, answer: Path, options: list[str]) -> None:
    faulthandler.enable()
    guarded = "guarded" in options
    if "threads" in options:
        answer.write_text(json.dumps(asdict(shared(seed, cases))))
        os._exit(0)  # ThreadSanitizer has something to say of how torch takes itself down
    _draw.Draw = Loud
    if guarded:
        import _guard_pages

        _guard_pages.install(seed)
    # Shares of the cases; losses have the most ways through a kernel.
    programs = {
        losses.functions: 0.5,
        losses.modules: 0.15,
        losses.heads: 0.1,
        losses.sharded: 0.1,
        features.selections: 0.1,
        soft_targets.soft: 0.2,
        soft_targets.experts: 0.2,
        beside.of_neighbors: 0.1,
        beside.of_losses: 0.1,
        **{part.run: 0.05 for part in contrast.PARTS},
    }
    tallies = [_draw.loop(seed, max(1, cases // 20), direct)]
    tallies += [program(seed + k, max(1, int(cases * share))) for k, (program, share) in enumerate(programs.items(), 1)]
    isa = _C.info()["isa"]
    failures = [f"{isa}: {text}" for tally in tallies for text in tally.failures]
    answer.write_text(json.dumps(asdict(Tally(cases=sum(tally.cases for tally in tallies), failures=failures))))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
