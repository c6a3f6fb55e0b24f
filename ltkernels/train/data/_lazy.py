"""Samples that do not fit into memory: read, or decoded, when a batch asks for them, by worker processes of a torch DataLoader.

`Raw` is what a file or a data set of another library gives, row by row; `LazySamples` are its standardised rows, with what the
trainer uses of a tensor: shape, rows by their indices, batches in order. Values are those that the samples have in memory, to the
bit. Nothing here draws from a global random state: a run that goes on sees what an uninterrupted one sees.
"""

import hashlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

MAX_IN_MEMORY = 1 << 29
"""Bytes of raw samples that are kept in memory; standardised ones take up to eight times as much for a while."""

_MOST_WORKERS = 8
_SHARE = 256  # samples that a worker reads at once where many are wanted in order


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Rows(Protocol):
    """Where raw samples come from. `shape` (n, ...) is that of all; `digest` says in bytes what is there."""

    shape: tuple[int, ...]
    slow: bool  # worth processes of their own
    digest: bytes

    def read(self, rows: Sequence[int]) -> np.ndarray: ...


class _Mapped:
    """Rows of an array, which may be mapped from a file."""

    slow = False

    def __init__(self, array: np.ndarray, digest: bytes) -> None:
        self.array, self.shape, self.digest = array, array.shape, digest

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(self.array[np.asarray(rows, np.int64)])


class _Index(TorchDataset[Any]):
    """For the DataLoader's workers: a batch is read as one."""

    def __init__(self, source: Rows) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.shape[0]

    def __getitems__(self, rows: list[int]) -> np.ndarray | Exception:
        try:
            return self._source.read(rows)
        except (ValueError, OSError) as error:  # raised in a worker, it would come back as the text of its traceback
            return error


class Raw:
    """Some rows of a source, in an order; `raw[index]` are rows of these."""

    def __init__(self, source: Rows, rows: np.ndarray | None = None, workers: int | None = None) -> None:
        self.source, self.rows = source, np.arange(source.shape[0]) if rows is None else rows
        self.workers = workers

    @classmethod
    def mapped(cls, array: np.ndarray, digest: bytes) -> "Raw":
        """The rows of a memory-mapped array."""
        return cls(_Mapped(array, digest))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.source.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.source.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> "Raw":
        return Raw(self.source, self.rows[index], self.workers)

    def read(self, index: Any = slice(None)) -> np.ndarray:
        """(n, ...): the samples themselves."""
        return self.source.read(self.rows[index].tolist())

    def batches(self, steps: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The samples of each step, read ahead by worker processes; their number changes no value."""
        workers = 0
        if self.source.slow:
            workers = min(_MOST_WORKERS, cores()) if self.workers is None else self.workers
        loader: DataLoader[Any] = DataLoader(
            _Index(self.source),
            batch_sampler=[self.rows[step].tolist() for step in steps],
            num_workers=min(workers, len(steps)),
            # Arrays go through a pipe: shared memory is 64 MB in many containers.
            collate_fn=_as_it_is,
            worker_init_fn=_quiet,
            # Its own: drawing from the global one would change a run that is resumed in the middle of an epoch.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def in_order(self) -> Iterator[np.ndarray]:
        """All samples, in pieces."""
        return self.batches(np.split(np.arange(len(self)), range(_SHARE, len(self), _SHARE)))

    def digest(self) -> bytes:
        return hashlib.sha256(self.source.digest + self.rows.astype("<i8").tobytes()).digest()


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet(_: int) -> None:
    """Ctrl-C reaches every process of a terminal: the training stops the workers once its state is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class LazySamples:
    """(n, ...) float32: standardised samples on `device`, made when they are asked for."""

    dtype = torch.float32

    def __init__(
        self,
        raw: Raw,
        standardise: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        layout: torch.memory_format = torch.preserve_format,
    ) -> None:
        self.raw, self._standardise = raw, standardise
        self.device, self._layout = torch.device(device), layout
        self._expected: deque[np.ndarray] = deque()
        self._coming: Iterator[np.ndarray] = iter(())

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.raw.shape)

    def dim(self) -> int:
        return self.raw.ndim

    def __len__(self) -> int:
        return len(self.raw)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise ValueError(f"this needs all samples in memory, and {len(self)} of {tuple(self.shape[1:])} are too many")

    def rows(self, index: Tensor | slice) -> "LazySamples":
        chosen = index if isinstance(index, slice) else index.cpu().numpy()
        return LazySamples(self.raw[chosen], self._standardise, self.device, self._layout)

    def to(self, device: torch.device | str, *, memory_format: torch.memory_format) -> "LazySamples":
        return LazySamples(self.raw, self._standardise, device, memory_format)

    def ahead(self, steps: Sequence[Tensor]) -> None:
        """Say which rows will be asked for next, and in which order: they are read meanwhile."""
        given = [step.cpu().numpy() for step in steps]
        self._expected, self._coming = deque(given), self.raw.batches(given) if given else iter(())

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = index if isinstance(index, slice) else index.cpu().numpy()
        if self._expected and not isinstance(rows, slice) and np.array_equal(rows, self._expected[0]):
            self._expected.popleft()
            return self._prepared(next(self._coming))
        return self._prepared(self.raw.read(rows))

    def split(self, size: int) -> Iterator[Tensor]:
        """All samples in order, `size` at a time."""
        for batch in self.raw.batches(np.split(np.arange(len(self)), range(size, len(self), size))):
            yield self._prepared(batch)

    def _prepared(self, batch: np.ndarray) -> Tensor:
        samples = self._standardise(torch.from_numpy(batch).to(self.device))
        # (n, c, h, w) with strides of its own is what tells a layout from another.
        return samples.to(memory_format=self._layout)


Samples = Tensor | LazySamples


def rows_of(samples: Samples, index: Tensor | slice) -> Samples:
    """Some samples, still unread where they are lazy."""
    return samples.rows(index) if isinstance(samples, LazySamples) else samples[index]
