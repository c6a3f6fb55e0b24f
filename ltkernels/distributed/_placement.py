"""Where the classes are: a process group or a device mesh, and the shard of a DTensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .._watch import is_dtensor


class Placement(NamedTuple):
    """This rank's shard: `weight` (part, D) and `bias` (part,) are plain tensors, the classes [start, start + part) of `classes`."""

    weight: Tensor
    bias: Tensor | None
    start: int
    classes: int
    group: Any
    rank: int
    world: int


def resolve(
    weight: Tensor,
    bias: Tensor | None,
    class_start: int | None,
    num_classes: int | None,
    group: Any,
    mesh_dim: str | int | None,
) -> Placement:
    """Plain tensors and a process group, whatever was given. The local part of a DTensor stays connected to it: its gradient comes
    back as a DTensor of the same placement."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "no process group: call torch.distributed.init_process_group first (one process is a group too)"
        )
    group = _group_of(group, mesh_dim)
    if is_dtensor(weight):
        start, group = _shard_of(weight, group)
        for name, given, own in (("class_start", class_start, start), ("num_classes", num_classes, weight.shape[0])):
            if given is not None and given != own:
                raise ValueError(f"{name} is {given!r}; the DTensor weight_shard says {own} on this rank")
        class_start, num_classes = start, weight.shape[0]
        if bias is not None:
            if not is_dtensor(bias) or bias.device_mesh != weight.device_mesh or bias.placements != weight.placements:
                raise ValueError(
                    "bias must be a DTensor on the mesh and with the placement of the DTensor weight_shard"
                )
            bias = bias.to_local()
        weight = weight.to_local()
    elif is_dtensor(bias):
        raise ValueError("bias is a DTensor and weight_shard is not; both or none must be")
    for name, value in (("class_start", class_start), ("num_classes", num_classes)):
        if value is None:
            raise ValueError(f"{name} is missing; only a DTensor weight_shard tells it by itself")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the group")
    return Placement(weight, bias, class_start, num_classes, group, rank, dist.get_world_size(group))


def _group_of(group: Any, mesh_dim: str | int | None) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(group, DeviceMesh):
        if mesh_dim is not None:
            raise ValueError(f"mesh_dim is {mesh_dim!r}; it names a dimension of a DeviceMesh, and group is none")
        return group
    if group.get_coordinate() is None:
        raise ValueError("this process is not a member of the mesh given as group")
    names = group.mesh_dim_names or ()
    if mesh_dim is None:
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions {names}; mesh_dim must say over which one the classes are sharded"
            )
        return group.get_group()
    known = mesh_dim in names if isinstance(mesh_dim, str) else mesh_dim in range(group.ndim)
    if not known:
        raise ValueError(f"mesh_dim is {mesh_dim!r}; the mesh has {group.ndim} dimensions {names}")
    return group.get_group(mesh_dim)


def _shard_of(weight: Any, group: Any) -> tuple[int, Any]:
    """(first class, process group) of a DTensor that is sharded by rows as torch shards."""
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1:
        raise ValueError(
            f"weight_shard is a DTensor on a mesh of {mesh.ndim} dimensions; it must be on the one over which the classes are "
            "sharded, such as mesh['tp']"
        )
    # By type as well: a strided shard, as FSDP makes them, is a subclass whose rows lie in another order.
    if type(placements[0]).__name__ != "Shard" or placements[0].dim != 0:
        raise ValueError(f"weight_shard is a DTensor with placements {placements}; they must be (Shard(0),)")
    own = mesh.get_group()
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own):
        raise ValueError("group has other ranks than the mesh of the DTensor weight_shard; leave it out")
    if dist.get_rank(own) < 0:
        raise ValueError("this process is not a member of the mesh of the DTensor weight_shard")
    classes, local = weight.shape[0], weight.to_local().shape[0]
    step = -(-classes // mesh.size())
    start = min(classes, dist.get_rank(own) * step)
    if local != min(classes - start, step):
        raise ValueError(
            f"weight_shard is a DTensor with {local} of {classes} rows on rank {dist.get_rank(own)}, which is not how torch "
            f"shards them ({min(classes - start, step)}); give the local tensor and class_start"
        )
    return start, own


__all__ = ["Placement", "resolve"]
