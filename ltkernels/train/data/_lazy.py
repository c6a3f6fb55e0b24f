"""Samples that do not fit into memory: read, or decoded, when a batch asks for them, by worker processes of a torch DataLoader.

`Rows` is what a file or a data set of another library gives, row by row; `LazySamples` are some of them, raw or standardised, with what
the trainer uses of a tensor: shape, rows by their indices, batches in order. Values are those that the samples have in memory, to the
bit. Nothing here draws from a global random state: a run that goes on sees what an uninterrupted one sees.
"""

import copy
import hashlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

MAX_IN_MEMORY = 1 << 29
"""Bytes of raw samples that are kept in memory; standardised ones take up to eight times as much for a while."""

_MOST_WORKERS = 8
_SHARE = 256  # samples that a worker reads at once where many are wanted in order


class Rows(TorchDataset[Any]):
    """Where raw samples come from. `shape` (n, ...) is that of all; `digest` says in bytes what is there."""

    shape: tuple[int, ...]
    slow = True  # worth processes of their own
    digest: bytes

    def read(self, rows: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    def __getitems__(self, rows: list[int]) -> np.ndarray | Exception:
        """A batch, for the workers of a DataLoader."""
        try:
            return self.read(rows)
        except (ValueError, OSError) as error:  # raised in a worker, it would come back as the text of its traceback
            return error


class Mapped(Rows):
    """Rows of an array, which may be mapped from a file."""

    slow = False

    def __init__(self, array: np.ndarray, digest: bytes) -> None:
        self.array, self.shape, self.digest = array, array.shape, digest

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(self.array[np.asarray(rows, np.int64)])


class Items(Rows):
    """`count` samples of the shape and type of `like`, each made by `get(row)`. Raises ValueError for one of another shape."""

    def __init__(self, get: Callable[[int], np.ndarray], count: int, like: np.ndarray, digest: bytes) -> None:
        self._get, self._dtype = get, like.dtype
        self.shape, self.digest = (count, *like.shape), digest

    def read(self, rows: Sequence[int]) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self._dtype)
        for i, row in enumerate(rows):
            sample = self._get(row)
            if sample.shape != self.shape[1:]:
                raise ValueError(f"sample {row} has the shape {sample.shape}, the first one {self.shape[1:]}")
            out[i] = sample
        return out


class LazySamples:
    """Rows of a source, in an order, made when they are asked for: as the source has them, or once they are `standardised`, as
    float32 on `device`. `workers` processes read ahead where that takes long (None: the cores, 8 at most); their number changes no
    value."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, source: Rows, workers: int | None = None) -> None:
        self.source = source
        self._rows = np.arange(len(source))
        self._workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if workers is None else workers
        self._layout = torch.preserve_format
        self._standardise: Callable[[Tensor], Tensor] | None = None
        self.ahead(())

    def _with(self, **changes: Any) -> "LazySamples":
        other = copy.copy(self)
        vars(other).update(changes)
        other.ahead(())
        return other

    def rows(self, index: Tensor | np.ndarray | slice) -> "LazySamples":
        return self._with(_rows=self._rows[_index(index)])

    def standardised(self, standardise: Callable[[Tensor], Tensor]) -> "LazySamples":
        return self._with(_standardise=standardise)

    def to(self, device: torch.device | str, *, memory_format: torch.memory_format) -> "LazySamples":
        return self._with(device=torch.device(device), _layout=memory_format)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.source.shape[1:]))

    def dim(self) -> int:
        return len(self.source.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise ValueError(f"this needs all samples in memory, and {len(self)} of {tuple(self.shape[1:])} are too many")

    def ahead(self, steps: Sequence[Tensor]) -> None:
        """Say which rows will be asked for next, and in which order: they are read meanwhile."""
        given = [_index(step) for step in steps]
        self._expected, self._coming = deque(given), self._batches(given) if given else iter(())

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> Tensor:
        rows = _index(index)
        if self._expected and not isinstance(rows, slice) and np.array_equal(rows, self._expected[0]):
            self._expected.popleft()
            return self._prepared(next(self._coming))
        return self._prepared(self.source.read(self._rows[rows].tolist()))

    def split(self, size: int | None = None) -> Iterator[Tensor]:
        """All samples in order, `size` at a time."""
        size = size or _SHARE
        for batch in self._batches(np.split(np.arange(len(self)), range(size, len(self), size))):
            yield self._prepared(batch)

    def digest(self) -> bytes:
        return hashlib.sha256(self.source.digest + self._rows.astype("<i8").tobytes()).digest()

    def _batches(self, steps: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        # Of what it reads, not of self, which holds it: the workers end with the last reference.
        return _batches(self.source, [self._rows[step].tolist() for step in steps], self._workers)

    def _prepared(self, batch: np.ndarray) -> Tensor:
        samples = torch.from_numpy(batch)
        if self._standardise is not None:
            samples = self._standardise(samples.to(self.device))
        # (n, c, h, w) with strides of its own is what tells a layout from another.
        return samples.to(memory_format=self._layout)


def _batches(source: Rows, steps: list[list[int]], workers: int) -> Iterator[np.ndarray]:
    loader: DataLoader[Any] = DataLoader(
        source,
        batch_sampler=steps,
        num_workers=min(workers, len(steps)) if source.slow else 0,
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


def _index(index: Tensor | np.ndarray | slice) -> np.ndarray | slice:
    return index.cpu().numpy() if isinstance(index, Tensor) else index


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet(_: int) -> None:
    """Ctrl-C reaches every process of a terminal: the training stops the workers once its state is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


Samples = Tensor | LazySamples


def rows_of(samples: Any, index: Any) -> Any:
    """Some samples of an array, a tensor or `LazySamples`, which stay unread."""
    return samples.rows(index) if isinstance(samples, LazySamples) else samples[index]
