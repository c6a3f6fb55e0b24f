"""Run by test_dtensor.py in two processes: arguments rank, number of processes, rendezvous file."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

import ltkernels as ltk

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
CE = ltk.functional.adjusted_cross_entropy
N, C = 7, 9  # neither divides by the ranks
g = torch.Generator().manual_seed(0)
Z = torch.randn(N, C, generator=g, dtype=torch.float64)
Y = torch.randint(0, C, (N,), generator=g)
Y[3] = -100
MIXED = (Y, Y.flip(0).clamp_min(0), torch.rand(N, generator=g, dtype=torch.float64))
TABLES = {
    name: torch.rand(C, generator=g, dtype=torch.float64) + 0.5
    for name in ("shift", "scale", "margin", "row_scale", "weight")
}
# By torch 2.8 and 2.10; not by 2.13.
OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
CALLS = {
    "plain": (Y, {}),
    "tables": (Y, {**TABLES, "focal_gamma": 1.5}),
    "smoothed": (Y, {"label_smoothing": 0.1, "weight": TABLES["weight"]}),
    "mixed": (MIXED, {"shift": TABLES["shift"], "weight": TABLES["weight"]}),
}


def spread(target, placement):
    if isinstance(target, tuple):
        return tuple(spread(each, placement) for each in target)
    return distribute_tensor(target, mesh, [placement])


for where in (Replicate(), Shard(0), Shard(1)):
    for name, (target, options) in CALLS.items():
        for reduction in ("mean", "sum", "batch_mean", "none"):
            whole = Z.clone().requires_grad_()
            wanted = CE(whole, target, reduction=reduction, **options)
            (3 * wanted.sum()).backward()
            leaf = distribute_tensor(Z, mesh, [where]).detach().requires_grad_()
            labels = spread(target, where if where == Shard(0) else Replicate())
            got = CE(leaf, labels, reduction=reduction, **options)
            assert isinstance(got, DTensor), (where, name)
            assert torch.allclose(got.full_tensor(), wanted.detach(), rtol=1e-10), (where, name, reduction)
            (3 * got.sum()).backward()
            gathered = where == Shard(1) and OLD
            assert gathered or leaf.grad.placements == (where,), (where, leaf.grad.placements)
            assert torch.allclose(leaf.grad.full_tensor(), whole.grad, rtol=1e-8, atol=1e-12), (where, name, reduction)
            if where != Shard(0):  # plain labels, whole on every rank
                assert torch.equal(CE(leaf, target, reduction=reduction, **options).full_tensor(), got.full_tensor())

# Where torch's own function works, inside loss_parallel, ours is a drop-in.
with loss_parallel():
    leaf, same = (distribute_tensor(Z, mesh, [Shard(1)]).detach().requires_grad_() for _ in range(2))
    labels = distribute_tensor(Y, mesh, [Replicate()])
    ours, theirs = CE(leaf, labels), F.cross_entropy(same, labels)
    assert torch.allclose(ours.full_tensor(), theirs.full_tensor(), rtol=1e-10)
    ours.backward()
    theirs.backward()
assert torch.allclose(leaf.grad.full_tensor(), same.grad.full_tensor(), rtol=1e-8, atol=1e-12)

images, labels = torch.randn(2, C, 3, 2, generator=g), torch.randint(0, C, (2, 3, 2), generator=g)
for reduction in ("mean", "none"):
    got = CE(distribute_tensor(images, mesh, [Shard(1)]), labels, reduction=reduction).full_tensor()
    assert torch.allclose(got, F.cross_entropy(images, labels, reduction=reduction), rtol=1e-5)

by_class = distribute_tensor(Z, mesh, [Shard(1)])
by_row = distribute_tensor(Z, mesh, [Shard(0)])
learned = TABLES["shift"].clone().requires_grad_()
partial = DTensor.from_local(Z, mesh, [Partial()], run_check=False)
replicated = distribute_tensor(TABLES["shift"], mesh, [Replicate()])
assert torch.equal(
    CE(by_class, Y, shift=replicated).full_tensor(), CE(by_class, Y, shift=TABLES["shift"]).full_tensor()
)
for call, error, message in (
    (lambda: CE(partial, Y), ValueError, "logits are a DTensor with placements"),
    (lambda: CE(by_class, Y, inplace=True), ValueError, "inplace=True is not possible: the logits are a DTensor"),
    (lambda: CE(by_class, Y, shift=learned), ValueError, "shift requires a gradient"),
    (lambda: CE(by_class, Y, **ltk.adjustments.seesaw([1] * C)._asdict()), ValueError, "closed form 'seesaw'"),
    (lambda: CE(by_class, Z.softmax(1)), TypeError, "takes class indices"),
    (lambda: CE(by_row, Y), TypeError, "target is a plain tensor"),
    (
        lambda: CE(by_class, Y, shift=distribute_tensor(TABLES["shift"], mesh, [Shard(0)])),
        ValueError,
        "shift is a DTensor",
    ),
    # plain logits beside a DTensor: never an address of nothing
    (lambda: CE(Z, Y, shift=replicated), TypeError, "shift is a DTensor, logits a plain tensor"),
    (lambda: CE(Z, distribute_tensor(Y, mesh, [Replicate()])), TypeError, "target is a DTensor, logits a plain tensor"),
    (
        lambda: ltk.functional.linear_adjusted_cross_entropy(by_row, torch.eye(C, dtype=Z.dtype), Y),
        TypeError,
        "features is a DTensor",
    ),
    (
        lambda: ltk.functional.linear_adjusted_cross_entropy(Z, torch.eye(C, dtype=Z.dtype), Y, shift=replicated),
        TypeError,
        "shift is a DTensor",
    ),
):
    with pytest.raises(error, match=message):
        call()
dist.destroy_process_group()
print("ok")
