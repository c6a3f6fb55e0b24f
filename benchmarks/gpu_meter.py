"""What a benchmark asks of the device: times, launches, memory. `Gpu` is the one that counts; `Dry` takes its place on a machine
without a GPU, so that every line around the numbers has run before a GPU is at hand. Its numbers mean nothing."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


class Gpu:
    """CUDA events, CUDA graphs, the profiler and the caching allocator."""

    device = "cuda"
    rounds, burst = 5, 100  # at least, of an implementation; calls between two looks at the host's clock

    def name(self) -> str:
        return torch.cuda.get_device_properties(0).name

    def wait(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        torch.cuda.empty_cache()

    def cache_bytes(self) -> int:
        """Of the second-level cache."""
        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)

    def copy_gbps(self) -> float:
        """Bytes read plus bytes written a second of a 1 GiB copy."""
        source = torch.empty(1 << 28, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        return (
            2 * source.numel() * 4 / (statistics.median(self.events([lambda: target.copy_(source)] * 20)) * 1e-3) / 1e9
        )

    def events(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call on the device; the device is busy until the last begins. The results live until then: memory that the
        next call took again would be in the cache."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        results = []
        for call, mark in zip(calls, marks[1:]):
            results.append(call())
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]

    def captured(self, calls: Sequence[Call]) -> Call:
        """The calls as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]  # each in memory of its own
        del results
        return graph.replay

    def launches(self, call: Call) -> int:
        """Kernels, copies and fills that one call sends to the device."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)

    def peak_mb(self, call: Call) -> float:
        """MiB allocated at most by one call, beyond its inputs."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class Dry(Gpu):
    """The processor and its clock."""

    device = "cpu"
    rounds, burst = 1, 2

    def name(self) -> str:
        return "dry run, no GPU"

    def wait(self) -> None:
        pass

    def free(self) -> None:
        pass

    def cache_bytes(self) -> int:
        return 0

    def copy_gbps(self) -> float:
        return 1.0

    def events(self, calls: Sequence[Call]) -> list[float]:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def captured(self, calls: Sequence[Call]) -> Call:
        return lambda: [call() for call in calls]

    def launches(self, call: Call) -> int:
        call()
        return 0

    def peak_mb(self, call: Call) -> float:
        call()
        return 0.0
