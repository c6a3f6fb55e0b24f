"""Run by test_sharded.py in four processes: arguments rank, number of processes, rendezvous file."""

import itertools
import sys

import pytest
import torch
import torch.distributed as dist

import ltkernels as ltk
from ltkernels import distributed

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
ROWS, WIDTH, CLASSES = 13, 6, 23
EDGES = {1: [0, 23], 2: [0, 5, 23], 3: [0, 1, 17, 23], 4: [0, 9, 10, 20, 23]}
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


def table():
    return torch.rand(CLASSES, generator=generator) + 0.5


everything = {"shift": table(), "scale": table(), "margin": table(), "row_scale": table(), "class_weight": table()}
for normalize, biased in itertools.product((False, True), repeat=2):
    options = {**everything, "label_smoothing": 0.1, "focal_gamma": 1.5}
    cases[f"everything {normalize} {biased}"] = (y, normalize, biased, options)
    cases[f"mixed {normalize} {biased}"] = (mixed, normalize, biased, {**everything, "label_smoothing": 0.2})
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


def run(size, target, normalize, biased, options, dtype, held):
    start, end = EDGES[size][rank : rank + 2]
    rows = len(target[0] if isinstance(target, tuple) else target)

    def leaf(value):
        return value.detach().to(dtype).clone().requires_grad_()

    x, w, shard = leaf(X[:rows]), leaf(W), leaf(W[start:end])
    bias, bias_shard = (leaf(b), leaf(b[start:end])) if biased else (None, None)
    if isinstance(target, tuple):
        target = (*target[:2], target[2].to(torch.float64 if dtype == torch.float64 else torch.float32))
    whole = ltk.functional.linear_adjusted_cross_entropy(x, w, target, bias=bias, normalize=normalize, **options)
    upstream = torch.linspace(0.5, 2, rows).to(whole.dtype) if whole.dim() else torch.tensor(0.7, dtype=whole.dtype)
    whole.backward(upstream)
    expected = (x.grad, w.grad[start:end], None if bias is None else bias.grad[start:end])
    x.grad = None
    distributed._HELD = held
    loss = distributed.sharded_linear_adjusted_cross_entropy(
        x,
        shard,
        target,
        class_start=start,
        num_classes=CLASSES,
        group=groups[size],
        bias=bias_shard,
        normalize=normalize,
        **options,
    )
    close = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss, whole, rtol=close, atol=1e-7, equal_nan=True)
    loss.backward(upstream, retain_graph=True)
    for again in (1, 2):
        for ours, theirs in zip((x.grad, shard.grad, None if bias is None else bias_shard.grad), expected):
            if theirs is None:
                continue
            largest = float(theirs.abs().max()) if len(theirs) else 0.0
            assert rows == 0 or largest > 0, "a comparison of zeros"
            torch.testing.assert_close(ours, again * theirs, rtol=close, atol=again * close * largest)
        if again == 1:
            loss.backward(upstream)  # a second backward over the graph adds the same again


for size in range(1, world + 1):
    if rank >= size:
        continue
    for name, (target, *rest) in cases.items():
        for dtype, held in (
            (torch.float64, 1 << 26),
            (torch.float32, 1 << 26),
            (torch.float32, 8),
            (torch.bfloat16, 1 << 26),
        ):
            if dtype == torch.bfloat16 and name not in ("ce", "ldam", "none"):
                continue
            try:
                run(size, target, *rest, dtype, held)
            except Exception as error:
                raise AssertionError(f"{name}, {size} processes, {dtype}, held {held}") from error

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
print("passed", len(cases))
