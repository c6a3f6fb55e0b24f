"""Promise: the corrections at prediction time are their formulas; expected values are typed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ltkernels.inference import logit_adjust, tau_normalize, threshold_move


def test_logit_adjust() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0]])
    out = logit_adjust(z, [8, 1, 1], tau=2.0)
    expected = [1 - 2 * math.log(0.8), 2 - 2 * math.log(0.1), 3 - 2 * math.log(0.1)]
    assert out.tolist()[0] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(logit_adjust(z[0], [8, 1, 1], tau=2.0), out[0])
    assert torch.equal(logit_adjust(z, [8, 1, 1], tau=0.0), z)


def test_logit_adjust_moves_the_decision_to_the_rare_class() -> None:
    z = torch.tensor([[2.0, 0.0]])
    assert logit_adjust(z, [50, 50]).argmax() == 0
    assert logit_adjust(z, [90, 10]).argmax() == 1
    assert logit_adjust(z, [10, 0], empty="ignore").argmax() == 0


def test_logit_adjust_dtypes_and_shapes() -> None:
    z = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    out = logit_adjust(z, [8, 1, 1])
    assert out.dtype == torch.float32
    assert out.shape == z.shape
    assert out[1, :, 2, 3].tolist() == pytest.approx([-math.log(0.8), -math.log(0.1), -math.log(0.1)], rel=1e-6)
    assert logit_adjust(z.double(), [8, 1, 1]).dtype == torch.float64
    leaf = torch.zeros(1, 3, requires_grad=True)
    logit_adjust(leaf, [8, 1, 1]).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(1, 3))


def test_threshold_move_with_a_vector() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]])
    assert threshold_move(p, [1.0, 5.0, 2.0]).tolist()[0] == pytest.approx([0.7, 1.0, 0.2])
    assert threshold_move(p.half(), [1.0, 5.0, 2.0]).dtype == torch.float32


def test_threshold_move_with_a_matrix() -> None:
    """cost[i, j]: truth i, prediction j. Missing class 1 as class 0 costs 10, as class 2 only 1."""
    cost = torch.tensor([[0.0, 1.0, 1.0], [10.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    p = torch.tensor([[0.5, 0.3, 0.2]])
    risk = [0.3 * 10 + 0.2, 0.5 + 0.2, 0.5 + 0.3]  # of predicting 0, 1, 2
    worst = 0.5 * 1 + 0.3 * 10 + 0.2 * 1
    assert threshold_move(p, cost).tolist()[0] == pytest.approx([worst - r for r in risk], rel=1e-6)
    assert threshold_move(p, cost).argmax() == 1
    assert threshold_move(p, cost.t()).argmax() == 0, "the orientation matters"


def test_a_vector_is_the_matrix_with_one_cost_a_row() -> None:
    p, c = torch.rand(6, 4, dtype=torch.float64).softmax(1), torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    matrix = c[:, None] * (1 - torch.eye(4, dtype=torch.float64))
    assert torch.allclose(threshold_move(p, matrix), threshold_move(p, c), rtol=1e-12)
    images = p.t().reshape(1, 4, 6)
    assert torch.allclose(threshold_move(images, matrix)[0].t(), threshold_move(p, c), rtol=1e-12)


def test_tau_normalize() -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    assert tau_normalize(w, 1.0).flatten().tolist() == pytest.approx([0.6, 0.8, 0.0, 1.0, 0.0, 0.0])
    assert tau_normalize(w, 0.5).flatten().tolist() == pytest.approx(
        [3 / math.sqrt(5), 4 / math.sqrt(5), 0.0, math.sqrt(2), 0.0, 0.0]
    )
    assert torch.equal(tau_normalize(w, 0.0), w)
    assert tau_normalize(w.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: logit_adjust(torch.zeros(1, 3), [1, 2]), ValueError, "class_counts has 2 entries; the logits have 3"),
        (lambda: logit_adjust(torch.zeros(1, 2), [1, 0]), ValueError, "class_counts is 0 for class 1"),
        (lambda: logit_adjust(torch.zeros(1, 2), [1, 2], tau=math.nan), ValueError, "tau is nan"),
        (lambda: logit_adjust(torch.zeros(1, 2).long(), [1, 2]), TypeError, "int64"),
        (lambda: threshold_move(torch.ones(1, 2), [1.0, -1.0]), ValueError, r"cost\[1\] is -1.0"),
        (lambda: threshold_move(torch.ones(1, 2), torch.full((2, 2), math.inf)), ValueError, r"cost\[0, 0\] is inf"),
        (lambda: threshold_move(torch.ones(1, 2), [1.0]), ValueError, r"cost has shape \(1,\)"),
        (lambda: threshold_move([0.5, 0.5], [1.0, 1.0]), TypeError, "probs"),
        (lambda: tau_normalize(torch.ones(3)), ValueError, r"weight has shape \(3,\)"),
        (lambda: tau_normalize(torch.ones(2, 2), math.inf), ValueError, "tau is inf"),
        (lambda: tau_normalize(torch.ones(2, 2).long()), TypeError, "weight"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
