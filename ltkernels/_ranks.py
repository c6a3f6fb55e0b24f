"""The ranks of a torch.distributed process group, as the statistics and the selection over several processes see them.

Every method of `Ranks` is collective: all ranks must call it, in one order. What can go wrong on a single rank goes through
`together`, so that it is an error on every rank and nobody waits for a rank that has left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among the `size` of a group; `rank` counts within the group."""

    def __init__(self, group: Any = None) -> None:
        """`group` is a process group; None and "world" are the default one. RuntimeError without `init_process_group`."""
        if isinstance(group, str) and group != "world":
            raise ValueError(f"group is {group!r}; it must be a process group, 'world' or None")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "no process group: call torch.distributed.init_process_group first (one process is a group too)"
            )
        self.group = None if isinstance(group, str) else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not in group")
        nccl = dist.get_backend(self.group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def gather(self, x: Tensor) -> list[Tensor]:
        """The `x` of every rank, by rank, on its device; shape and dtype must be the same everywhere."""
        own = x.detach().to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return [part.to(x.device) for part in parts]

    def broadcast(self, x: Tensor, owner: int) -> Tensor:
        """The `x` of rank `owner`, on every rank; elsewhere `x` gives shape, dtype and device only."""
        own = x.detach().to(self.device).contiguous()
        dist.broadcast(own, owner if self.group is None else dist.get_global_rank(self.group, owner), group=self.group)
        return own.to(x.device)

    def share(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything that JSON holds), by rank. Nothing is pickled."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.gather(torch.tensor([len(text)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        return [json.loads(part[:n].numpy().tobytes()) for part, n in zip(self.gather(padded), lengths)]

    def collect(self, value: Any) -> list[Any] | None:
        """Every rank's `value`, by rank, on rank 0; None elsewhere. Any object: the ranks are one job and trust each
        other's pickles."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.gather_object(value, found, first, group=self.group)
        return found

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank where one rank has an error: its own there, one that names the rank elsewhere."""
        found = self.share(None if error is None else [type(error).__name__, str(error)])
        if error is not None:
            raise error
        for rank, entry in enumerate(found):
            if entry is not None:
                name, text = entry
                kind = {"TypeError": TypeError, "ValueError": ValueError}.get(name)
                raise kind(f"rank {rank}: {text}") if kind else RuntimeError(f"rank {rank}: {name}: {text}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of local work (no collectives in it) that fails on every rank where it fails on one."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)


def together(ranks: Ranks | None) -> AbstractContextManager[None]:
    """`Ranks.together`, or nothing at all for one process without a group."""
    return nullcontext() if ranks is None else ranks.together()


def digest(x: Tensor) -> str:
    return hashlib.sha256(repr(tuple(x.shape)).encode() + x.cpu().numpy().tobytes()).hexdigest()


def same_arguments(ranks: Ranks, original: Tensor, arguments: str, own: Any) -> list[Any]:
    """What each rank has of its own, by rank. ValueError on every rank where `original`, or the arguments in words, differ."""
    shares = ranks.share([digest(original), arguments, own])
    for rank, (z, words, _) in enumerate(shares):
        if z != shares[0][0]:
            raise ValueError(f"original differs between rank 0 and rank {rank}; every rank must give the whole of it")
        if words != shares[0][1]:
            raise ValueError(f"arguments differ: rank 0 has {shares[0][1]}, rank {rank} has {words}")
    return [own for _, _, own in shares]
