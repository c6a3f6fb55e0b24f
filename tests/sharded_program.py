"""Run by test_sharded.py in four processes: arguments rank, number of processes, rendezvous file."""

import itertools
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import ltkernels as ltk
from ltkernels import distributed
from ltkernels.distributed import NegativeSampling, _autograd, _exchange, _sampling

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
ROWS, WIDTH, CLASSES = 13, 6, 23
EDGES = {1: [0, 23], 2: [0, 5, 23], 3: [0, 17, 17, 23], 4: [0, 9, 10, 20, 23]}  # of the classes
ROW_EDGES = {1: [0, 13], 2: [0, 9, 13], 3: [0, 0, 6, 13], 4: [0, 4, 6, 11, 13]}  # of a sharded batch
generator = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, WIDTH, generator=generator)
W = torch.randn(CLASSES, WIDTH, generator=generator)
b = torch.randn(CLASSES, generator=generator)
y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
y[4] = -100
mixed = (y, y.flip(0).clamp_min(0), torch.rand(ROWS, generator=generator))
counts = list(range(1, CLASSES + 1))
cases = {}
for name, record in ltk.LOSSES.items():
    built = record.adjustment(counts)
    if isinstance(built, ltk.Adjustment):
        tables = built._asdict()
        tables["class_weight"] = tables.pop("weight")
        cases[name] = (y, record.logits == "cosine", False, tables)
    elif isinstance(built, ltk.losses.Smoothed):
        cases[name] = (y, False, False, built._asdict())


def table():
    return torch.rand(CLASSES, generator=generator) + 0.5


everything = {"shift": table(), "scale": table(), "margin": table(), "row_scale": table(), "class_weight": table()}
for normalize, biased in itertools.product((False, True), repeat=2):
    options = {**everything, "label_smoothing": 0.1, "focal_gamma": 1.5}
    cases[f"everything {normalize} {biased}"] = (y, normalize, biased, options)
    cases[f"mixed {normalize} {biased}"] = (mixed, normalize, biased, {**everything, "label_smoothing": 0.2})
# Sample weights, a smoothing by class and a label scale.
beside = {
    "sample_weight": torch.rand(ROWS, generator=generator) * 2,
    "label_scale": table(),
    "label_smoothing": table() / 2,
}
for normalize, biased in itertools.product((False, True), repeat=2):
    cases[f"beside {normalize} {biased}"] = (y, normalize, biased, {**everything, **beside, "focal_gamma": 1.5})
    cases[f"beside, mixed {normalize} {biased}"] = (mixed, normalize, biased, {**everything, **beside})
removed = torch.zeros(CLASSES)
removed[next(c for c in range(CLASSES) if c not in y.tolist())] = -torch.inf
cases["removed class, scaled"] = (y, False, True, {"shift": removed, "label_scale": table() * 2})
for reduction in ("none", "mean", "batch_mean", "sum"):
    cases[f"beside {reduction}"] = (y, True, True, {**everything, **beside, "reduction": reduction})
for reduction in ("none", "mean", "batch_mean", "sum"):
    cases[reduction] = (y, True, True, {**everything, "reduction": reduction})
# An index that is also a class: a first label ignores its row, a second one is a label like any other.
index = {"ignore_index": int(y[0])}
cases["ignored class"] = (y.clamp_min(0), False, False, {**everything, **index})
cases["mixed, ignored class"] = (
    (y.clamp_min(0), y.roll(1).clamp_min(0), mixed[2]),
    True,
    True,
    {**everything, **index},
)
cases["empty batch"] = (y[:0], False, False, {"reduction": "sum"})


class Variant(NamedTuple):
    dtype: torch.dtype
    held: int = 1 << 26
    gathered: int = 1 << 21
    batch: str = "replicated"
    dtensor: bool = False


def rows_of(target, rows):
    if not isinstance(target, tuple):
        return target[rows]
    return tuple(value[rows] if isinstance(value, torch.Tensor) else value for value in target)


def shards(size, dtensor, *whole):
    """(leaves of this rank's part of each, where it is)"""
    start, end = EDGES[size][rank : rank + 2]
    if not dtensor:
        return [value[start:end].detach().clone().requires_grad_() for value in whole], slice(start, end)
    step = -(-CLASSES // size)
    start, end = min(rank * step, CLASSES), min((rank + 1) * step, CLASSES)
    mesh = DeviceMesh.from_group(groups[size], "cpu")
    options = {"run_check": False}
    leaves = []
    for value in whole:
        local = value[start:end].detach().clone()
        made = DTensor.from_local(local, mesh, [Shard(0)], shape=value.shape, stride=value.stride(), **options)
        leaves.append(made.requires_grad_())
    return leaves, slice(start, end)


def run(size, target, normalize, biased, options, variant):
    rows = len(target[0] if isinstance(target, tuple) else target)
    dtype = variant.dtype

    def leaf(value):
        return value.detach().to(dtype).clone().requires_grad_()

    x, w, bias = leaf(X[:rows]), leaf(W), leaf(b) if biased else None
    if isinstance(target, tuple):
        target = (*target[:2], target[2].to(torch.float64 if dtype == torch.float64 else torch.float32))
    whole = ltk.functional.linear_adjusted_cross_entropy(x, w, target, bias=bias, normalize=normalize, **options)
    upstream = torch.linspace(0.5, 2, rows).to(whole.dtype) if whole.dim() else torch.tensor(0.7, dtype=whole.dtype)
    whole.backward(upstream)
    here = slice(None)
    if variant.batch == "sharded" and rows:
        here = slice(*ROW_EDGES[size][rank : rank + 2])
    (shard, *rest), part = shards(size, variant.dtensor, *(w, bias) if biased else (w,))
    bias_shard = rest[0] if biased else None
    expected = (x.grad[here], w.grad[part], bias.grad[part] if biased else None)
    x = x.detach()[here].clone().requires_grad_()
    if whole.dim():
        whole, upstream = whole[here], upstream[here]
    where = {} if variant.dtensor else {"class_start": part.start, "num_classes": CLASSES, "group": groups[size]}
    _autograd._HELD, _exchange._GATHERED = variant.held, variant.gathered
    if "sample_weight" in options:
        options = {**options, "sample_weight": options["sample_weight"][here]}
    loss = distributed.sharded_linear_adjusted_cross_entropy(
        x, shard, rows_of(target, here), **where, batch=variant.batch, bias=bias_shard, normalize=normalize, **options
    )
    close = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss, whole, rtol=close, atol=1e-7, equal_nan=True)
    loss.backward(upstream, retain_graph=True)
    for again in (1, 2):
        for ours, theirs in zip((x, shard, bias_shard), expected):
            if theirs is None:
                continue
            ours = ours.grad
            if variant.dtensor and isinstance(ours, DTensor):
                assert ours.placements == (Shard(0),)
                assert ours.shape == (CLASSES, *theirs.shape[1:])
                ours = ours.to_local()
            largest = float(theirs.abs().max()) if len(theirs) else 0.0
            assert rows == 0 or len(theirs) == 0 or largest > 0, "a comparison of zeros"
            torch.testing.assert_close(ours, again * theirs, rtol=close, atol=again * close * largest)
        if again == 1:
            loss.backward(upstream)  # a second backward over the graph adds the same again


EVERY = (
    Variant(torch.float64),
    Variant(torch.float32, held=8, gathered=0),
    Variant(torch.float32, batch="sharded"),
)
SOME = (
    Variant(torch.float32),
    Variant(torch.bfloat16),
    Variant(torch.bfloat16, batch="sharded"),
    Variant(torch.float64, gathered=0, batch="sharded"),
    Variant(torch.float64, dtensor=True),
    Variant(torch.float32, dtensor=True, batch="sharded"),
)
SOME_CASES = ("ce", "ldam", "none", "everything True True", "mixed True True")
for size in range(1, world + 1):
    if rank >= size:
        continue
    for name, (target, *rest) in cases.items():
        for variant in EVERY + SOME * (name in SOME_CASES):
            if variant.dtype == torch.bfloat16 and name.endswith("True True"):
                continue  # the unsharded bfloat16 itself is off by more than the tolerance
            try:
                run(size, target, *rest, variant)
            except Exception as error:
                raise AssertionError(f"{name}, {size} processes, {variant}") from error
_autograd._HELD, _exchange._GATHERED = 1 << 26, 1 << 21


def sampled(size, correct, label_smoothing):
    """The estimate, against the same written plainly in float64: adjusted logits of the kept classes, each as many times as it stands
    for, through autograd."""
    edges = EDGES[size]
    sampling = NegativeSampling(0.5, step=3, seed=size, correct=correct)
    tables = {name: value.double() for name, value in everything.items()}
    x, w, bias = (value.double().clone().requires_grad_() for value in (X, W, b))
    times = torch.zeros(CLASSES, dtype=torch.float64)
    for start, end in itertools.pairwise(edges):
        kept = _sampling.draw(sampling, [y], start, end - start)
        if kept is None:
            times[start:end] = 1.0
        else:
            times[start + kept.classes] = kept.factor
            times[start + kept.classes[: kept.labels]] = 1.0
    assert 0 < (times == 0).sum() < CLASSES
    valid = y != -100
    label = y[valid][:, None]
    unit_x, unit_w = x / x.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    z = (unit_x @ unit_w.t() + bias)[valid]
    a = tables["row_scale"][label] * (tables["scale"] * z + tables["shift"])
    a = a.scatter_add(1, label, -(tables["row_scale"] * tables["margin"])[label])
    log_z = torch.logsumexp(a + times.log(), dim=1)
    weight = tables["class_weight"]
    loss = (1 - label_smoothing) * weight[label[:, 0]] * (log_z - a.gather(1, label)[:, 0])
    loss = loss + label_smoothing / CLASSES * (weight.sum() * log_z - (a * weight * times).nan_to_num(0.0).sum(dim=1))
    loss = loss.sum() / weight[label].sum()
    loss.backward()
    start, end = edges[rank : rank + 2]
    ours = [value.double().clone().requires_grad_() for value in (X, W[start:end], b[start:end])]
    theirs = distributed.sharded_linear_adjusted_cross_entropy(
        ours[0],
        ours[1],
        y,
        class_start=start,
        num_classes=CLASSES,
        group=groups[size],
        bias=ours[2],
        normalize=True,
        label_smoothing=label_smoothing,
        sampling=sampling,
        **tables,
    )
    theirs.backward()
    torch.testing.assert_close(theirs, loss, rtol=1e-9, atol=0.0)
    for mine, reference in zip((value.grad for value in ours), (x.grad, w.grad[start:end], bias.grad[start:end])):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
    assert (ours[1].grad[times[start:end] == 0] == 0).all()


for size in range(1, world + 1):
    if rank < size:
        for correct, smoothing in ((True, 0.0), (True, 0.1), (False, 0.0)):
            for held in (1 << 26, 8):
                _autograd._HELD = held
                sampled(size, correct, smoothing)
_autograd._HELD = 1 << 26

# A mesh of two dimensions, its one-dimensional part, and a DTensor of which the last rank has no rows.
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
start, end = EDGES[2][rank % 2 : rank % 2 + 2]
expected = ltk.functional.linear_adjusted_cross_entropy(X, W, y)
where = {"class_start": start, "num_classes": CLASSES}
for given in ({"group": mesh, "mesh_dim": "classes"}, {"group": mesh, "mesh_dim": 1}, {"group": mesh["classes"]}):
    loss = distributed.sharded_linear_adjusted_cross_entropy(X, W[start:end], y, **where, **given)
    torch.testing.assert_close(loss, expected, rtol=3e-5, atol=0.0)
small = W[:5].clone().requires_grad_()
labels = y.remainder(5)
ltk.functional.linear_adjusted_cross_entropy(X, small, labels).backward()
line = init_device_mesh("cpu", (world,))
local = W[:5][2 * rank : 2 * rank + 2].clone()
made = DTensor.from_local(
    local, line, [Shard(0)], run_check=False, shape=(5, WIDTH), stride=(WIDTH, 1)
).requires_grad_()
distributed.sharded_linear_adjusted_cross_entropy(X, made, labels).backward()
torch.testing.assert_close(made.grad.full_tensor(), small.grad, rtol=3e-5, atol=1e-7)
for weight, given, message in (
    (DTensor.from_local(W, line, [Replicate()], run_check=False), {}, r"placements \(Replicate\(\),\)"),
    (DTensor.from_local(W, line, [Shard(1)], run_check=False), {}, r"placements \(Shard\(dim=1\),\)"),
    (DTensor.from_local(W, mesh, [Replicate(), Shard(0)], run_check=False), {}, "mesh of 2 dimensions"),
    (DTensor.from_local(W[:3], line, [Shard(0)], run_check=False, shape=(23, 6), stride=(6, 1)), {}, "3 of 23 rows"),
    (made, {"num_classes": 6}, "num_classes is 6; the DTensor weight_shard says 5"),
    (made, {"class_start": 7}, "class_start is 7; the DTensor"),
    (made, {"bias": b[:5]}, "bias must be a DTensor"),
    (made, {"group": groups[1] if rank == 0 else mesh["classes"]}, "group has other ranks"),
    (W, {"group": mesh, **where}, r"mesh of 2 dimensions \('data', 'classes'\); mesh_dim must say"),
    (W, {"group": mesh, "mesh_dim": "rows", **where}, "mesh_dim is 'rows'"),
):
    with pytest.raises(ValueError, match=message):
        distributed.sharded_linear_adjusted_cross_entropy(X, weight, y.clamp(max=4), **given)
with pytest.raises(TypeError, match="features is a DTensor"):
    distributed.sharded_linear_adjusted_cross_entropy(DTensor.from_local(X, line, [Replicate()]), made, labels)
if rank:
    with pytest.raises(ValueError, match="not a member of the group"):
        distributed.sharded_linear_adjusted_cross_entropy(X, W, y, class_start=0, num_classes=23, group=groups[1])

# Ranks that disagree are told so, all of them, before anything of different sizes is exchanged.
start, end = EDGES[world][rank : rank + 2]
one = rank == 1
for message, arguments in (
    ("different options", {"focal_gamma": 2.0 * one}),
    ("different options", {"label_smoothing": 0.1 * one}),
    ("different options", {"reduction": "sum" if one else "mean"}),
    ("different options", {"normalize": one}),
    ("different options", {"shift": torch.arange(23.0) + one}),
    ("different options", {"sampling": NegativeSampling(0.5, step=int(one))}),
    ("different options", {"batch": "sharded" if one else "replicated"}),
    ("different options", {"features": X.clone().requires_grad_(one)}),
    ("different options", {"features": X.bfloat16() if one else X, "weight": W.bfloat16() if one else W}),
    ("num_classes differs", {"num_classes": 23 + one}),
    ("target differs over the ranks, with .13, 13, 13, 13. rows", {"target": y.flip(0) if one else y}),
    ("target differs over the ranks, with .13, 12, 13, 13. rows", {"rows": 13 - one}),
):
    options = {"features": X, "weight": W, "target": y, "rows": ROWS, "num_classes": CLASSES, **arguments}
    x, weight, target, rows = (options.pop(name) for name in ("features", "weight", "target", "rows"))
    with pytest.raises(ValueError, match=message):
        distributed.sharded_linear_adjusted_cross_entropy(
            x[:rows], weight[start:end], target[:rows], class_start=start, **options
        )

# Shards that overlap or leave classes out are refused, on every rank.
if rank < 2:
    for start, end in (((0, 12), (11, 23))[rank], ((0, 10), (11, 23))[rank]):
        with pytest.raises(ValueError, match=r"must make up \[0, 23\)"):
            distributed.sharded_linear_adjusted_cross_entropy(
                X, W[start:end], y, class_start=start, num_classes=CLASSES, group=groups[2]
            )
# A frozen classifier and frozen features.
start, end = EDGES[world][rank : rank + 2]
for frozen in ("features", "weight"):
    x, shard = X.clone(), W[start:end].clone()
    (shard if frozen == "features" else x).requires_grad_()
    distributed.sharded_linear_adjusted_cross_entropy(x, shard, y, class_start=start, num_classes=CLASSES).backward()
    assert (shard if frozen == "features" else x).grad.abs().max() > 0
dist.barrier()
dist.destroy_process_group()
print("passed", len(cases))
