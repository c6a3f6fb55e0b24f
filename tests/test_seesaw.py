"""Promise: Seesaw is the paper's formula, counts what it has seen in training only, and keeps the contract of every loss."""

from __future__ import annotations

import math
import multiprocessing

import contract
import pytest
import torch
from contract import CLASSES, COUNTS

import ltkernels as ltk

P, Q, EPS = 0.8, 2.0, 1e-2


def call(z, y, counts=COUNTS, p=P, q=Q, eps=EPS, empty="error", **common):
    return contract.with_tables(ltk.adjustments.seesaw(counts, p, q, eps, empty=empty), z, y, **common)


def reference(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations 3 to 6 with the factors S_ij = M_ij C_ij, one class at a time; log counts rounded to float32, as all tables."""
    log_n = torch.tensor(COUNTS).double().log().float().tolist()
    losses, grads, size = torch.zeros(len(z)).double(), torch.zeros_like(z), torch.zeros(len(z)).double()
    for i in range(len(z)):
        label = int(y[i])
        highest = float(z[i].max())
        log_sum = highest + math.log(sum(math.exp(float(x) - highest) for x in z[i]))
        log_p = [float(x) - log_sum for x in z[i]]
        a = []
        for j in range(z.shape[1]):
            mitigation = math.exp(log_n[j] - log_n[label]) ** P if COUNTS[j] < COUNTS[label] else 1.0
            ahead = log_p[j] - max(log_p[label], math.log(EPS))
            a.append(float(z[i, j]) + math.log(mitigation) + (Q * ahead if ahead > 0 else 0.0))
        top = max(a)
        e = [math.exp(x - top) for x in a]
        others = sum(x for j, x in enumerate(e) if j != label)
        total = others + e[label]
        losses[i] = math.log1p(others / e[label]) if e[label] > 0 else math.log(total) + top - a[label]
        grads[i] = torch.tensor(e, dtype=torch.float64) / total
        grads[i, label] = -others / total
        size[i] = (1 + 2 * Q) * max(abs(x) for x in a if math.isfinite(x))
    return losses, grads, size


@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_values(dtype, reduction) -> None:
    z, y = contract.hostile_logits(9, CLASSES), contract.labels(9, CLASSES)
    contract.check_values(call, reference, z, y, dtype, reduction)
    weight = torch.linspace(0.2, 2, CLASSES)
    weighted = lambda z, y, **common: call(z, y, weight=weight, **common)  # noqa: E731
    contract.check_values(weighted, reference, z, y, dtype, reduction, weight)


def test_both_factors_by_hand() -> None:
    """Label 0 of 100 samples at p = 0.2; class 1 has 1 sample and p = 0.8: mitigation 0.01^0.8, compensation 4^2."""
    z = torch.tensor([[0.2, 0.8]], dtype=torch.float64).log()
    loss = call(z, torch.tensor([0]), [100, 1])
    assert loss.item() == pytest.approx(math.log(1 + 4 * 0.01**0.8 * 16), rel=1e-6)
    # The label's probability is taken as eps at least.
    z = torch.tensor([[1e-6, 1 - 1e-6]], dtype=torch.float64).log()
    loss = call(z, torch.tensor([0]), [1, 1], eps=0.5)
    assert loss.item() == pytest.approx(math.log(1 + (1 - 1e-6) / 1e-6 * (2 * (1 - 1e-6)) ** 2), rel=1e-9)


def test_neutral_options_are_cross_entropy() -> None:
    z, y = torch.randn(5, CLASSES, dtype=torch.float64), torch.arange(5)
    assert torch.allclose(call(z, y, p=0.0, q=0.0), torch.nn.functional.cross_entropy(z, y), rtol=1e-13)


@pytest.mark.parametrize("classes", [2, 17, 2049, 4100])
def test_sizes(classes) -> None:
    """Tails of every vector width, several blocks: the kernel against the torch reference."""
    counts = (COUNTS * (classes // CLASSES + 1))[:classes]
    z, y = contract.hostile_logits(5, classes), contract.labels(5, classes)
    (a, da), (b, db) = (contract.gradient(call, z.float(), y, counts=counts, backend=x) for x in ("cpu", "torch"))
    assert torch.allclose(a, b, rtol=1e-5)
    assert torch.allclose(da, db, rtol=2e-3, atol=1e-9)


def test_contract() -> None:
    z, y = contract.hostile_logits(8, CLASSES), contract.labels(8, CLASSES)
    contract.check_autograd(call, z, y)
    contract.check_backends_and_targets(call, z, y)
    contract.check_threads(call, torch.randn(300, CLASSES), torch.arange(300) % CLASSES)
    contract.check_ignored_and_nan(call, torch.randn(4, CLASSES, dtype=torch.float64), torch.arange(4))
    contract.check_operator(1, torch.rand(5), None, [0.8, 2.0, -4.6])


def test_permutation() -> None:
    z = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 1.0, -0.5, 0.125]], dtype=torch.float64)
    make = lambda counts: lambda z, y, **common: call(z, y, counts, **common)  # noqa: E731
    contract.check_permutation(make, z, [400, 100, 25, 6])


def test_a_row_of_minus_inf_and_a_masked_label() -> None:
    z = torch.zeros(2, CLASSES)
    z[0] = -torch.inf
    z[1, 0] = -torch.inf
    loss, grad = contract.gradient(call, z, torch.tensor([0, 0]), reduction="none")
    assert loss[0].isnan()
    assert loss[1] == torch.inf
    assert grad[1, 0] == -1
    assert grad[1].isfinite().all()


class TestModule:
    def test_counts_in_training_only(self) -> None:
        loss = ltk.nn.Seesaw(3)
        z, y = torch.randn(5, 3), torch.tensor([0, 2, 2, -100, 0])
        loss(z, y)
        assert loss.seen.tolist() == [2, 0, 2]
        assert torch.equal(loss.eval()(z, y), call(z, y, [2, 0, 2], empty="ignore"))
        assert loss.seen.tolist() == [2, 0, 2]
        loss.train()(z, (y, torch.tensor([1, 1, 1, 1, 1]), torch.tensor([0.9, 0.1, 0.5, 0.1, 0.1])))
        assert loss.seen.tolist() == [3, 2, 3]

    def test_the_batch_counts_before_its_own_loss(self) -> None:
        z, y = torch.randn(3, 3), torch.tensor([0, 0, 1])
        assert torch.equal(ltk.nn.Seesaw([1, 1, 1])(z, y), call(z, y, [3, 2, 1]))

    def test_a_call_that_raises_counts_nothing(self) -> None:
        loss = ltk.nn.Seesaw([5, 5])
        with pytest.raises(ValueError, match="label 2 in row 1"):
            loss(torch.randn(2, 2), torch.tensor([0, 2]))
        with pytest.raises(ValueError, match="probabilities"):
            loss(torch.randn(2, 2), torch.rand(2, 2))
        assert loss.seen.tolist() == [5, 5]

    def test_state_dict(self) -> None:
        loss = ltk.nn.Seesaw(2)
        loss(torch.randn(3, 2), torch.tensor([1, 1, 0]))
        fresh = ltk.nn.Seesaw(2)
        fresh.load_state_dict(loss.state_dict())
        assert fresh.seen.tolist() == [1, 2]
        assert fresh.half().seen.dtype == torch.int64

    def test_compiled(self) -> None:
        eager, compiled = ltk.nn.Seesaw(3), ltk.nn.Seesaw(3)
        step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for y in ([0, 1, 1, -100], [2, 2, 2, 0]):
            z, y = torch.randn(4, 3), torch.tensor(y)
            (a, da), (b, db) = contract.gradient(eager, z, y), contract.gradient(step, z, y)
            assert torch.equal(a, b)
            assert torch.equal(da, db)
        assert compiled.seen.tolist() == [2, 2, 3]

    def test_process_group(self, tmp_path) -> None:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), queue)) for rank in range(2)]
        for process in ranks:
            process.start()
        seen = [queue.get(timeout=60) for _ in ranks]
        for process in ranks:
            process.join(timeout=60)
        assert seen == [[2, 1, 1], [2, 1, 1]]


def _rank(rank: int, store: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loss = ltk.nn.Seesaw(3, process_group="world")
    loss(torch.zeros(2, 3), torch.tensor([0, rank + 1]))
    queue.put(loss.seen.tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": -1.0}, "p is -1.0"),
        ({"q": math.nan}, "q is nan"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"process_group": "all"}, "process_group is 'all'"),
        ({"weight": torch.ones(5)}, "weight has 5 entries"),
    ],
)
def test_bad_input(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ltk.nn.Seesaw(3, **options)


def test_counts_of_another_length_and_empty_classes() -> None:
    with pytest.raises(ValueError, match=r"class_counts of the loss has shape \(2,\); it must be \(3,\)"):
        call(torch.zeros(1, 3), torch.tensor([0]), [1, 2])
    with pytest.raises(ValueError, match="class_counts is 0 for class 1"):
        call(torch.zeros(1, 2), torch.tensor([0]), [1, 0])
