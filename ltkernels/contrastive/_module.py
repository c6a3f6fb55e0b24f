"""What the Modules of this folder share: temperature, options, and a queue of earlier keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor

from .. import _checks
from .._backends import Explanation
from .._errors import ArgumentError
from .._ranks import Ranks
from .._tables import MadeOfTables
from ._contrastive import contrastive
from ._contrastive import explain as explain_call

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The keyword arguments that all contrastive Modules take.

    learnable_tau: the temperature is a Parameter, `log_tau`.
    class_weight: (C,) factor of a row's loss by its label; a buffer.
    ignore_index, reduction, normalize, group, chunk_rows, backend: as in `ltkernels.functional.contrastive`.
    """

    learnable_tau: bool
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    normalize: bool
    group: Any
    chunk_rows: int | None
    backend: str | None


class Contrastive(MadeOfTables):
    """`ltkernels.functional.contrastive` of one kind, with its options. Every class of this folder is a subclass of it."""

    kind: ClassVar[str] = ""
    log_tau: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        tau: float = 0.1,
        *,
        learnable_tau: bool = False,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize: bool = True,
        group: Any = None,
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.reduction(reduction)
        # Kept as a logarithm: an optimizer's step must not take it below 0.
        log_tau = torch.tensor(_checks.number("tau", tau, above=0.0), device="cpu").log()
        if learnable_tau:
            self._table("log_tau", log_tau, made=False, learned=True)
        self.learnable_tau, self._tau = learnable_tau, float(tau)
        self._table("class_weight", class_weight, made=False)
        self.ignore_index, self.reduction, self.normalize = ignore_index, reduction, normalize
        self.group, self.chunk_rows, self.backend = group, chunk_rows, backend

    @property
    def tau(self) -> float | Tensor:
        """The temperature: a number, or a tensor with gradient where it is learned."""
        return self.log_tau.exp() if self.learnable_tau else self._tau

    def _count(self, class_counts: _checks.ClassCounts) -> None:
        """Keeps the counts, (C,) above 0, in the buffer `class_counts`."""
        _checks.class_counts(class_counts, option=False)
        self._table("class_counts", torch.tensor(_checks.count_list(class_counts), device="cpu"))

    def _options(self) -> dict[str, Any]:
        names = ("class_weight", "ignore_index", "reduction", "normalize", "group", "chunk_rows", "backend")
        return {"tau": self.tau, **{name: getattr(self, name) for name in names}}

    def _loss(self, features: Tensor, labels: Tensor | None, **said: Any) -> Tensor:
        return contrastive(features, labels, self.kind, **self._options(), **said)

    def explain(self, features: Tensor, *_: object, **__: object) -> Explanation:
        """Which backend would serve a call; see `ltkernels.explain`."""
        queue = getattr(self, "queue", None)
        return explain_call(features, kind=self.kind, queue=queue, chunk_rows=self.chunk_rows, backend=self.backend)

    def extra_repr(self) -> str:
        return f"tau={float(torch.as_tensor(self.tau).detach()):g}, reduction={self.reduction!r}"


class Queued(Contrastive):
    """A `Contrastive` with a queue of the last `queue_size` keys in buffers: `queue` (K, D), `queue_labels` (K,), -1 where a slot holds
    nothing yet, and `queue_next` (), the slot that is written next. They are in the state dict."""

    queue: Tensor
    queue_labels: Tensor
    queue_next: Tensor

    def __init__(self, queue_size: int, embedding_dim: int, tau: float, **options: Unpack[Options]) -> None:
        super().__init__(tau, **options)
        for name, value in (("queue_size", queue_size), ("embedding_dim", embedding_dim)):
            if _checks.integer(name, value) < 1:
                raise ArgumentError(f"{name} is {value}; it must be at least 1")
        self.register_buffer("queue", torch.zeros(queue_size, embedding_dim))
        self.register_buffer("queue_labels", torch.full((queue_size,), -1))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.int64))

    def _held(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Copies, in the features' dtype: the queue moves on before backward looks at what it was."""
        return self.queue.to(like.dtype, copy=True), self.queue_labels.clone()

    def _queued_loss(self, features: Tensor, labels: Tensor | None, entering: Tensor, **said: Any) -> Tensor:
        """The loss against the queue, which the keys `entering` join afterwards in training."""
        self.check_size(features)
        queue, held = self._held(features)
        loss = self._loss(features, labels, queue=queue, queue_labels=held, **said)
        if self.training:
            self.append(entering, labels)
        return loss

    def check_size(self, batch: Tensor) -> None:
        """Raises ValueError where the queue is shorter than a batch (of all ranks)."""
        many = len(batch) * (1 if self.group is None else Ranks(self.group).size)
        if many > len(self.queue):
            raise ArgumentError(f"the queue has {len(self.queue)} slots; a batch has {many} keys")

    @torch.no_grad()
    def append(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Puts keys (N, D) in place of the oldest; with a process group those of all ranks, in the order of the ranks.

        Raises ValueError where the queue is shorter than the batch.
        """
        if labels is None:
            labels = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        keys = keys.detach().to(self.queue.dtype)
        labels = torch.where(labels == self.ignore_index, -1, labels)
        self.check_size(keys)
        if self.group is not None:
            ranks = Ranks(self.group)
            keys, labels = torch.cat(ranks.gather(keys)), torch.cat(ranks.gather(labels))
        size = len(self.queue)
        slots = (self.queue_next + torch.arange(len(keys), device=keys.device)) % size
        self.queue[slots], self.queue_labels[slots] = keys, labels
        self.queue_next.copy_((self.queue_next + len(keys)) % size)

    def reset_parameters(self) -> None:
        """As of every loss, and the queue is empty."""
        super().reset_parameters()
        self.reset_queue()

    def reset_queue(self) -> None:
        """Empties it."""
        self.queue.zero_()
        self.queue_labels.fill_(-1)
        self.queue_next.zero_()
