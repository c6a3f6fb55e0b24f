"""Forward + backward of the losses on the CPU, against eager and compiled torch and the packages that have them.

    python -m benchmarks.losses --out benchmarks/results/losses-cpu.json

A cell is (loss, dtype, B, C). `pct_of_copy` is the bandwidth of the ideal traffic (each logit read once, each gradient written once)
in per cent of the copy bandwidth measured in the same run. `ok` says that the answer agreed with float64 before it was timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import ltkernels as ltk

from . import baselines, harness

SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 8142), (512, 21841), (64, 128256)]
QUICK = [(128, 10), (256, 1000)]


def counts_of(classes: int) -> list[int]:
    return [max(1, int(5000 * 0.01 ** (k / max(1, classes - 1)))) for k in range(classes)]


def inputs(
    rows: int, classes: int, dtype: torch.dtype, cosine: bool, warm: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Enough different batches to leave the second-level cache between two calls, at most eight; or one batch, `warm`."""
    number = 1 if warm else max(2, min(8, (64 << 20) // (rows * classes * 4)))
    batches = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, classes, generator=generator) * (0.3 if cosine else 3.0)
        y = torch.randint(0, classes, (rows,), generator=generator)
        batches.append((z.to(dtype).requires_grad_(), y))
    return batches


def step(loss: baselines.Loss, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    z, y = batch
    z.grad = None
    loss(z, y).backward()


def agrees(loss: baselines.Loss, batch: tuple[torch.Tensor, torch.Tensor], name: str, counts: list[int]) -> bool:
    """Loss and gradient against the eager form in float64."""
    z, y = batch
    exact = z.detach().double().requires_grad_()
    expected = baselines.eager(name, counts)(exact, y)
    expected.backward()
    step(loss, batch)
    value = loss(z, y).detach().double()
    tolerance = 1e-4 if z.dtype == torch.float32 else 2e-2
    close = (z.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()
    return bool(close) and bool((value - expected).abs() <= tolerance * expected.abs())


def cell(
    name: str, rows: int, classes: int, dtype: torch.dtype, bandwidth: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    counts = counts_of(classes)
    batches = inputs(rows, classes, dtype, ltk.LOSSES[name].logits == "cosine", options.warm)
    torch._dynamo.reset()
    wanted = options.peers
    implementations = baselines.peers(name, counts, compile_too=wanted is None or "compiled" in wanted)
    if wanted is not None:
        implementations = {key: loss for key, loss in implementations.items() if key == "ours" or key in wanted}
    ok = {backend: agrees(loss, batches[0], name, counts) for backend, loss in implementations.items()}
    calls = {backend: lambda batch, loss=loss: step(loss, batch) for backend, loss in implementations.items()}
    ideal = 2 * rows * classes * dtype.itemsize
    results = []
    for backend, (p50, p20, p80) in harness.interleaved(calls, batches, options.seconds).items():
        gbps = ideal / (p50 * 1e-3) / 1e9
        results.append(
            {
                "op": name,
                "backend": ltk.explain(implementations["ours"], *batches[0]).backend if backend == "ours" else backend,
                "dtype": str(dtype).removeprefix("torch."),
                "B": rows,
                "C": classes,
                "D": None,
                "mode": "forward+backward, warm" if options.warm else "forward+backward",
                "ms_p50": round(p50, 5),
                "ms_p20": round(p20, 5),
                "ms_p80": round(p80, 5),
                "ideal_gbps": round(gbps, 3),
                "pct_of_copy": round(100 * gbps / bandwidth, 1),
                "peak_mb": None,
                "ok": ok[backend],
            }
        )
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ltkernels bench losses", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--quick", action="store_true", help="two shapes, float32")
    parser.add_argument(
        "--warm", action="store_true", help="one batch again and again, as when the layer before wrote it"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time a cell and implementation")
    parser.add_argument("--losses", nargs="+", default=list(baselines.TIMED), choices=baselines.TIMED)
    parser.add_argument("--peers", nargs="+", help="only these: eager, compiled, or a package")
    options = parser.parse_args(argv)
    bandwidth = harness.copy_gbps()
    rows: list[dict[str, Any]] = []
    print(f"copy {bandwidth:.1f} GB/s, {torch.get_num_threads()} threads")
    for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
        for batch, classes in QUICK if options.quick else SHAPES:
            for name in options.losses:
                found = cell(name, batch, classes, dtype, bandwidth, options)
                ours = found[0]["ms_p50"]
                rows += found
                others = "  ".join(
                    f"{row['backend']} {row['ms_p50'] / ours:.2f}x{'' if row['ok'] else ' DIFFERS'}"
                    for row in found[1:]
                )
                print(f"{name:15} {found[0]['dtype']:9} {batch:5}x{classes:<6} {ours:9.4f} ms   {others}", flush=True)
    if options.out:
        harness.write(options.out, rows, bandwidth)
        print(f"wrote {options.out}")
    return 0 if all(row["ok"] for row in rows if row["backend"].startswith("cpu-")) else 1


if __name__ == "__main__":
    sys.exit(main())
