"""Several processes on one training (torchrun): every process holds the data and computes its rows of each step.

All processes draw the same batches, augmentation and mixing, and know all labels: the loss is divided by what the whole
step divides by (the sum of its weights), without communication. Gradients are summed by DistributedDataParallel; batch
normalisation uses the statistics of the whole step. The numbers are those of one process, up to rounding.
"""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltkernels._ranks import Ranks


class World:
    """This process among `size`, and their `Ranks` where there are several; rank 0 alone writes files and reports progress."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.ranks = Ranks() if several else None
        self.rank, self.size = (self.ranks.rank, self.ranks.size) if self.ranks else (0, 1)
        self.is_main = self.rank == 0

    def rows(self) -> slice:
        """The rows of a step that this process computes."""
        return slice(self.rank, None, self.size)

    def any(self, value: int) -> int:
        """The largest `value` of all processes (a signal number, 0 for none)."""
        return max(self.ranks.share(value)) if self.ranks else value

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every process."""
        if self.ranks is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.ranks.device)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every process's `value`, by rank, on rank 0."""
        return self.ranks.collect(value) if self.ranks else [value]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: `model` itself, or DistributedDataParallel around it."""
        if self.size == 1:
            return model
        synchronise_batch_norm(model)
        # Equal on every process as it is: the statistics are those of the whole step.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def local_device(device: str) -> str:
    """`cuda` becomes this process's own GPU where torchrun started several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def refuse(what: str) -> None:
    """Raise ValueError where torchrun started several processes for something that is not spread over them."""
    if _started() > 1:
        raise ValueError(f"{what} is not spread over processes by torchrun; start it alone, or one training at a time")


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, if any, for the duration of the block."""
    if _started() == 1 or World().size > 1:
        yield World()
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(torch.device(device))
    # Its functions take the group of the moment of their import as a default. DistributedDataParallel would import them later, and
    # they would keep the group, whose threads abort the process if they ask for the interpreter's lock while it is torn down.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World()
    finally:
        dist.destroy_process_group()
        gc.collect()  # DistributedDataParallel holds it in cycles


class _Sum(torch.autograd.Function):
    """The sum over all processes, and of the gradients that come back to each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the rows of all processes (torch's SyncBatchNorm runs on GPUs only)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _Sum.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make every BatchNorm2d of `model` use the statistics of all processes; parameters and state dict stay as they are."""
    for module in model.modules():
        if type(module) is _GlobalBatchNorm2d:
            continue
        if type(module) is nn.BatchNorm2d and module.track_running_stats:
            # The same attributes with another forward: optimizer and state dict go on referring to the same tensors.
            on_gpu = module.weight is not None and module.weight.is_cuda
            module.__class__ = nn.SyncBatchNorm if on_gpu else _GlobalBatchNorm2d
            if on_gpu:
                module.process_group = None
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(f"{type(module).__name__} has no form over several processes; use BatchNorm2d")
