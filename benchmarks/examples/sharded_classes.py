"""A classifier whose classes are spread over processes, as many as there are.

    torchrun --nproc-per-node 2 sharded_classes.py

Ten thousand classes, long-tailed; every process holds the rows of its own, and all see the same batches:

    process 0 of 2 holds classes 0 to 4999
    loss 6.30 at first, 3.89 after 40 steps; all classes in one process: 3.89
"""

import torch
import torch.distributed as dist

import ltkernels as ltk

CLASSES, WIDTH, STEPS = 10_000, 32, 40


def train(first: int, rows: int, loss_of: "callable[..., torch.Tensor]") -> "list[float]":
    """Trains the classes [first, first + rows) on batches that are the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    frequency = 1.0 / torch.arange(1, CLASSES + 1)
    weight = torch.nn.Parameter(torch.zeros(rows, WIDTH))  # this process' rows of the classifier
    optimizer = torch.optim.SGD([weight], lr=20.0)
    losses = []
    for _ in range(STEPS + 1):
        labels = frequency.multinomial(256, replacement=True, generator=generator)
        features = centres[labels] + 0.5 * torch.randn(256, WIDTH, generator=generator)
        optimizer.zero_grad()
        loss = loss_of(features, weight, labels)
        loss.backward()  # on every process; the gradient of the shard is its own and not averaged
        optimizer.step()
        losses.append(loss.item())
    return losses


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
counts = (100_000 / torch.arange(1, CLASSES + 1)).long()
tables = ltk.adjustments.logit_adjustment(counts)._asdict()
tables["class_weight"] = tables.pop("weight")
first = CLASSES * rank // world
rows = CLASSES * (rank + 1) // world - first
sharded = train(first, rows, lambda x, w, y: ltk.distributed.sharded_linear_adjusted_cross_entropy(
    x, w, y, class_start=first, num_classes=CLASSES, **tables))  # fmt: skip
if rank == 0:
    whole = train(0, CLASSES, lambda x, w, y: ltk.functional.linear_adjusted_cross_entropy(x, w, y, **tables))
    print(f"process {rank} of {world} holds classes {first} to {first + rows - 1}")
    print(
        f"loss {sharded[0]:.2f} at first, {sharded[-1]:.2f} after {STEPS} steps; all classes in one process: {whole[-1]:.2f}"
    )
dist.destroy_process_group()
