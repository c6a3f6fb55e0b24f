"""Every rank of test_contrastive_modules.py: the loss of a batch that is spread over the ranks, under DistributedDataParallel, against one
process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import ltkernels as ltk

ROWS, WIDTH, CLASSES = 8, 6, 3


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.tensor([0, 1, 2, 0, 1, 1, -100, 0])
    weight = torch.linspace(0.5, 2, ROWS, dtype=torch.float64)
    return {
        "x": noise(ROWS, WIDTH),
        "views": noise(ROWS, 2, WIDTH),
        "labels": labels,
        "keys": noise(ROWS, WIDTH),
        "weight": weight,
    }


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = torch.nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        self.centres = torch.nn.Parameter(torch.randn(CLASSES, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = self.body(x)
        return z, self.head(z), self.centres * 1, self.body(views)


NAMES = ("ntxent", "supcon", "supcon sum", "supcon_in", "balanced", "paco", "gml")


def loss_of(name: str, net: torch.nn.Module, given: dict[str, Tensor], group: str | None) -> Tensor:
    z, logits, centres, views = net(given["x"], given["views"])
    contrastive, labels = ltk.functional.contrastive, given["labels"]
    counts = {"class_counts": [5, 3, 1]}
    queue = {"queue": data()["x"].flip(0), "queue_labels": torch.tensor([0, 0, 1, 2, 1, -1, 0, 2])}
    said = {"group": group, "sample_weight": given["weight"]}
    if name == "ntxent":
        return contrastive(views, kind=name, group=group)
    if name == "supcon sum":
        return contrastive(z, labels, reduction="sum", **said)
    own = {
        "supcon": {},
        "supcon_in": {"reduction": "batch_mean"},
        "balanced": {"centres": centres},
        "paco": {"logits": logits, "keys": given["keys"], **counts, **queue},
        "gml": {**counts, **queue},
    }
    return contrastive(z, labels, name, **own[name], **said)


def run(net: torch.nn.Module, given: dict[str, Tensor], group: str | None) -> dict[str, Tensor]:
    out = {}
    for name in NAMES:
        net.zero_grad()
        loss = loss_of(name, net, given, group)
        loss.backward()
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()]
        out[name] = torch.cat([loss.detach().reshape(1), *grads])
    return out


def module_state(given: dict[str, Tensor], group: str | None) -> dict[str, Tensor]:
    queued = ltk.nn.KCL(16, WIDTH, group=group)
    queued(given["x"], given["labels"], given["keys"])
    queued(given["x"], given["labels"], -given["keys"])
    centred = ltk.nn.BalancedContrastive(CLASSES, WIDTH, group=group)
    centred(given["views"], given["labels"])
    held = queued.queue_labels >= 0
    order = torch.argsort(queued.queue[held][:, 0])  # ranks append in their order, so the slots differ
    return {"queue": queued.queue[held][order], "next": queued.queue_next, "centres": centred.centres}


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    mine = {name: value.chunk(world)[rank] for name, value in data().items()}
    found = run(DistributedDataParallel(Net(), find_unused_parameters=True), mine, "world")
    found |= module_state(mine, "world")
    try:
        ltk.functional.contrastive(mine["x"][: 4 - rank], mine["labels"][: 4 - rank], group="world")
        message = ""
    except ValueError as error:
        message = str(error)
    torch.save(
        {**found, "message": torch.tensor(list(message.encode()), dtype=torch.uint8)}, Path(folder) / f"{rank}.pt"
    )
    dist.barrier()  # a rank that ends while the other still talks to it may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
