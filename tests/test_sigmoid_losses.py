"""Promise: EQL v2, ACSL, ECM, balanced BCE and the distribution-balanced loss have their papers' numbers, and EQL v2 keeps its state.

F1 of the specification: n = (6, 3, 1), z = (1, .5, -.5), y = 2.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import ltkernels as ltk

Z, Y, N = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64), torch.tensor([2]), [6, 3, 1]


def drawn(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, classes, generator=generator) * 3
    hot = (torch.rand(rows, classes, generator=generator) < 0.2).float()
    hot[1] = 0  # a row without positives
    return z, hot


def close(found: Tensor, *wanted: float) -> None:
    assert found.flatten().tolist() == pytest.approx(list(wanted), abs=1e-6)


def test_acsl() -> None:
    close(ltk.nn.ACSL()(Z, Y), 2.287339)
    close(ltk.nn.ACSL(0.5)(Z, Y), 3.261416)
    with pytest.raises(ValueError, match=r"threshold is 1.0; it must lie in \[0, 1\)"):
        ltk.nn.ACSL(1.0)


def test_ecm() -> None:
    built = ltk.adjustments.ecm(N, table_dtype=torch.float64)
    close(built.term.table[0], 0.610860, 0.832242, 0.948245)
    assert torch.equal(built.term.table[0], built.term.table[1])
    close(built.shift, 0.101366, -0.211824, -0.549306)
    close(ltk.nn.ECM(N)(Z, Y), 3.973729)
    with pytest.raises(ValueError, match="has all 5 samples"):
        ltk.nn.ECM([0, 5], empty="ignore")


def test_balanced_bce() -> None:
    close(ltk.adjustments.balanced_bce(N).shift, 0.405465, -0.847298, -2.197225)
    close(ltk.nn.BalancedBCE(N)(Z, Y), 4.921747)


def test_eql_v2() -> None:
    loss = ltk.nn.EQLv2(3, table_dtype=torch.float64)
    close(loss.ratio, 100, 100, 100)
    loss.positive_gradient.copy_(torch.tensor([2.0, 0.8, 0.3]))
    loss.negative_gradient.fill_(1.0)
    loss._collect(torch.zeros(2, 3))  # puts the factors of r = (2, .8, .3) in place
    close(loss.term_table, 0.9999994, 0.5, 0.002473, 1.0000022, 3.0, 4.990110)
    before = loss.positive_gradient.clone(), loss.negative_gradient.clone()
    close(loss(Z, Y), 6.661050)
    close(loss.positive_gradient - before[0], 0, 0, 3.106140)
    close(loss.negative_gradient - before[1], 0.731058, 0.311230, 0)
    close(loss.ratio, 2 / 1.731058, 0.8 / 1.311230, 3.40614)


def test_eql_v2_refuses_a_map_that_falls() -> None:
    for call in (lambda: ltk.nn.EQLv2(3, gamma=-0.5), lambda: ltk.adjustments.eql_v2(3, gamma=-0.5)):
        with pytest.raises(ValueError, match=r"gamma .*-0\.5"):
            call()


def test_eql_v2_keeps_its_state() -> None:
    z, hot = drawn(20, 9)
    loss, plain = ltk.nn.EQLv2(9, reduction="batch_mean"), ltk.nn.EQLv2(9, reduction="batch_mean")
    for _ in range(3):
        loss(z, hot)
    again = ltk.nn.EQLv2(9, reduction="batch_mean")
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(z, hot), loss(z, hot))
    assert torch.equal(again.negative_gradient, loss.negative_gradient)
    assert loss.ratio.max() < 100
    state = loss.state_dict()
    loss.eval()(z, hot)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), loss.state_dict().values(), strict=True))
    assert loss(z, hot) != plain(z, hot)
    # Two calls before one backward, each with its own factors.
    leaf = z.clone().requires_grad_()
    loss.train()
    one = copy.deepcopy(loss)
    (loss(leaf, hot) + loss(leaf, hot)).backward()
    wanted = [torch.autograd.grad(one(leaf, hot), leaf)[0] for _ in range(2)]
    torch.testing.assert_close(leaf.grad, sum(wanted))
    assert not torch.equal(*wanted)
    loss.eval()
    # Class indices, a head and the same in evaluation mode: one loss.
    x, head, y = torch.randn(20, 5), torch.randn(9, 5), torch.arange(20) % 9
    wanted = loss(x @ head.T, y)
    torch.testing.assert_close(loss.from_features(x, head, y), wanted)
    loss.train()
    torch.testing.assert_close(loss.from_features(x, head, y), wanted)
    loss.reset_parameters()
    assert loss.ratio.min() == 100
    assert torch.equal(loss.term_table, plain.term_table) or loss.term_table.allclose(torch.ones(2, 9))
    with pytest.raises(TypeError, match="target is mixed"):
        loss(z, (y, y, 0.5))
    with pytest.raises(ValueError, match="chunk_rows=4 is not possible"):
        loss.from_features(x, head, y, chunk_rows=4)
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 7"):
        loss(z, hot + 7)
    assert loss.ratio.min() == 100, "a refused call counts nothing"


def test_distribution_balanced() -> None:
    """Against the paper's equations, written with torch's functions; a class of every positive of a row weighs 1 / n of them."""
    n, total = torch.tensor([60.0, 30.0, 10.0]).double(), 70
    loss = ltk.nn.DistributionBalanced([60, 30, 10], total, reduction="none", bias=0.05, negative_scale=2.0)
    z, hot = drawn(9, 3)
    z, hot = z.double(), hot.double()
    hot[2] = 1
    r = (1 / n) / (hot / n).sum(1, keepdim=True)
    w = 0.1 + 1 / (1 + torch.exp(-10 * (r - 0.2)))
    nu = 0.05 * torch.log(total / n - 1)
    of_positives = hot * torch.log1p(torch.exp(-(z - nu)))
    of_negatives = (1 - hot) / 2 * torch.log1p(torch.exp(2 * (z - nu)))
    torch.testing.assert_close(loss(z, hot), (w * (of_positives + of_negatives)).sum(1), rtol=1e-6, atol=1e-6)
    assert "cpu" in ltk.explain(loss, z, hot).backend
    with pytest.raises(ValueError, match=r"class_counts\[0\] is 70; it must be below num_samples \(70\)"):
        ltk.nn.DistributionBalanced([70, 3], 70)


@pytest.mark.parametrize(("counts", "single"), [([11], 0), ([0, 11], 1), ([11, 0], 0)])
@pytest.mark.parametrize("builder", [ltk.adjustments.ecm, ltk.adjustments.balanced_bce])
def test_a_class_that_has_every_sample_is_refused_by_its_number(builder, counts, single) -> None:
    with pytest.raises(ValueError, match=f"class {single} has all 11 samples"):
        builder(counts, empty="ignore")
