"""Promise: schedules put the published tables in place at their epoch: same memory, no recompilation, resumable."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import ltkernels as ltk
from ltkernels.schedules import DRW, TLA, GradientAdjustment

COUNTS = [500, 5, 50]  # class ids are not sorted by count
N = 555


def make(name: str):
    """(loss, schedule with start=2)."""
    if name == "DRW":
        loss = ltk.nn.LDAM(COUNTS)
        return loss, DRW(loss, 2, beta=0.9)
    loss = ltk.nn.KPS(COUNTS) if name == "GradientAdjustment" else ltk.nn.VectorScaling(COUNTS)
    return loss, GradientAdjustment(loss, 2) if name == "GradientAdjustment" else TLA(loss, 2, nu=0.5)


def buffers(loss) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_drw_by_hand() -> None:
    loss, schedule = make("DRW")
    assert loss.weight.tolist() == [1.0, 1.0, 1.0]
    schedule.step(1)
    assert loss.weight.tolist() == [1.0, 1.0, 1.0]
    schedule.step(2)
    weights = [0.1 / (1 - 0.9**n) for n in COUNTS]
    assert loss.weight.tolist() == pytest.approx([3 * w / sum(weights) for w in weights], rel=1e-6)
    assert DRW(ltk.nn.CrossEntropy(), 0, None, class_counts=COUNTS).loss.weight.tolist() == pytest.approx(
        [3 * w / 0.222 for w in (0.002, 0.2, 0.02)], rel=1e-6
    )


def test_gradient_adjustment_by_hand() -> None:
    loss, schedule = make("GradientAdjustment")
    before = ltk.adjustments.kps(COUNTS)
    assert torch.equal(loss.scale, before.scale)
    assert torch.equal(loss.margin, before.margin)
    assert loss.row_scale.tolist() == [1.0, 1.0, 1.0]
    schedule.step(2)
    log50 = math.log(50)
    assert loss.scale.tolist() == pytest.approx([math.log(5000) / log50, 1.0, math.log(500) / log50], rel=1e-6)
    rarity = [log50, math.log(5000), math.log(500)]
    assert loss.margin.tolist() == pytest.approx([0.2 * x / math.log(5000) for x in rarity], rel=1e-6)
    assert loss.row_scale.tolist() == pytest.approx([15 * x / log50 for x in rarity], rel=1e-6)
    z, y = torch.rand(4, 3), torch.tensor([0, 1, 2, 1])
    assert torch.equal(loss(z, y), ltk.nn.KPSGradientAdjusted(COUNTS)(z, y))


def test_tla_by_hand() -> None:
    loss, schedule = make("TLA")
    assert torch.equal(loss.scale, ltk.adjustments.vector_scaling(COUNTS).scale)
    assert loss.weight.tolist() == [1.0, 1.0, 1.0]
    shift = loss.shift.clone()
    schedule.step(5)
    assert loss.scale.tolist() == [1.0, 1.0, 1.0]
    weights = [(n / N) ** -0.5 for n in COUNTS]
    assert loss.weight.tolist() == pytest.approx([3 * w / sum(weights) for w in weights], rel=1e-6)
    assert torch.equal(loss.shift, shift)


@pytest.mark.parametrize("name", ["DRW", "GradientAdjustment", "TLA"])
def test_before_the_start_the_loss_is_the_bare_one(name) -> None:
    bare = {"DRW": ltk.nn.LDAM, "GradientAdjustment": ltk.nn.KPS, "TLA": ltk.nn.VectorScaling}[name](COUNTS)
    loss, schedule = make(name)
    z, y = torch.rand(6, 3), torch.tensor([0, 1, 2, 1, -100, 0])
    assert torch.equal(loss(z, y), bare(z, y))
    schedule.step(2)
    assert not torch.allclose(loss(z, y), bare(z, y))
    schedule.step(1)
    assert torch.equal(loss(z, y), bare(z, y)), "step depends on the epoch alone"


@pytest.mark.parametrize("name", ["DRW", "GradientAdjustment", "TLA"])
def test_in_place_and_without_recompilation(name) -> None:
    loss, schedule = make(name)
    pointers = {key: buffer.data_ptr() for key, buffer in loss.named_buffers()}
    torch._dynamo.reset()
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z, y = torch.rand(6, 3), torch.tensor([0, 1, 2, 1, -100, 0])
    results = []
    for epoch in range(4):
        schedule.step(epoch)
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            results.append(step(z, y))
        assert torch.equal(results[-1], loss(z, y))
    assert {key: buffer.data_ptr() for key, buffer in loss.named_buffers()} == pointers
    assert results[1] != results[2], "the change must reach the compiled code"
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["DRW", "GradientAdjustment", "TLA"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_resume(name, epoch) -> None:
    loss, schedule = make(name)
    schedule.step(epoch)
    saved, state = copy.deepcopy(loss.state_dict()), schedule.state_dict()
    other, resumed = make(name)
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    assert resumed.epoch == epoch
    assert resumed.active == (epoch >= 2)
    assert same(buffers(other), buffers(loss))
    resumed.step(epoch)
    assert same(buffers(other), buffers(loss))
    # The schedule alone is enough: it rewrites its tables.
    fresh, schedule = make(name)
    schedule.load_state_dict(state)
    assert same(buffers(fresh), buffers(loss))


def test_state_of_another_schedule_is_refused() -> None:
    _, schedule = make("DRW")
    state = schedule.state_dict()
    with pytest.raises(ValueError, match="class_counts is \\[1, 2, 3\\]"):
        schedule.load_state_dict({**state, "class_counts": [1, 2, 3]})
    with pytest.raises(ValueError, match="schedule is 'DRW'"):
        make("TLA")[1].load_state_dict(state)
    with pytest.raises(ValueError, match="start is 160"):
        schedule.load_state_dict({**state, "start": 160})
    with pytest.raises(ValueError, match="no 'epoch'"):
        schedule.load_state_dict({key: value for key, value in state.items() if key != "epoch"})


def test_two_schedules_on_one_loss() -> None:
    """KPS with gradient adjustment and deferred weights: they change different buffers."""
    loss = ltk.nn.KPS(COUNTS)
    adjust, weigh = GradientAdjustment(loss, 1), DRW(loss, 2)
    adjust.step(1)
    weigh.step(1)
    assert loss.weight.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(loss.row_scale, ltk.adjustments.kps_ga(COUNTS).row_scale)
    weigh.step(2)
    assert torch.equal(loss.weight, ltk.adjustments.class_balanced(COUNTS).weight)


def test_empty_classes() -> None:
    counts = [10, 0, 1]
    loss = ltk.nn.VectorScaling(counts, empty="ignore")
    TLA(loss, 0)
    assert loss.weight.tolist() == pytest.approx([2 / 11, 0.0, 20 / 11], rel=1e-6)
    with pytest.raises(ValueError, match="class_counts is 0 for class 1"):
        DRW(ltk.nn.LDAM(counts, empty="ignore"))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DRW(ltk.nn.ClassBalanced(COUNTS)), ValueError, "loss has class weights"),
        (lambda: DRW(ltk.nn.CrossEntropy()), ValueError, "class_counts is None"),
        (lambda: DRW(ltk.nn.LDAM(COUNTS), class_counts=[1, 2, 3]), ValueError, "the loss was made with"),
        (lambda: DRW(torch.nn.CrossEntropyLoss()), TypeError, "loss is CrossEntropyLoss"),
        (lambda: DRW(ltk.nn.LDAM(COUNTS), -1), ValueError, "start is -1"),
        (lambda: DRW(ltk.nn.LDAM(COUNTS), 1.5), TypeError, "start is 1.5"),
        (lambda: GradientAdjustment(ltk.nn.LDAM(COUNTS)), TypeError, "loss is LDAM"),
        (lambda: GradientAdjustment(ltk.nn.KPS(COUNTS, gradient_adjustment=True)), TypeError, "without gradient"),
        (lambda: TLA(ltk.nn.KPS(COUNTS)), TypeError, "loss is KPS"),
        (lambda: TLA(ltk.nn.VectorScaling(COUNTS), nu=math.inf), ValueError, "nu is inf"),
        (lambda: make("DRW")[1].step(-1), ValueError, "epoch is -1"),
        (lambda: make("DRW")[1].step(True), TypeError, "epoch is True"),
    ],
)
def test_bad_input(build, error, message) -> None:
    with pytest.raises(error, match=message):
        build()
