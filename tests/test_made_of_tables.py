"""Promise: the tables of every loss are those that its counts and options make: no checkpoint of another loss replaces them, what was built
on "meta" has them after `reset_parameters`, and no dtype of a model rounds them."""

from __future__ import annotations

import pytest
import torch

import ltkernels as ltk

COUNTS, OTHER = [900, 40, 2], [900, 40, 3]

# (the loss, the same of other counts or options, the buffer that tells)
LOSSES = {
    "SADE": (lambda: ltk.nn.SADE(COUNTS), lambda: ltk.nn.SADE(COUNTS, tau=1.0), "shift"),
    "BalPoE": (lambda: ltk.nn.BalPoE(COUNTS), lambda: ltk.nn.BalPoE(COUNTS, (0.0, 1.0, 3.0)), "shift"),
    "MDCS": (lambda: ltk.nn.MDCS(COUNTS), lambda: ltk.nn.MDCS(OTHER), "shift"),
    "NCL": (lambda: ltk.nn.NCL(COUNTS, hard=2), lambda: ltk.nn.NCL(OTHER, hard=2), "shift"),
    "RIDE": (lambda: ltk.nn.RIDE(COUNTS), lambda: ltk.nn.RIDE(OTHER), "class_weight"),
    "ResLT": (lambda: ltk.nn.ResLT(COUNTS), lambda: ltk.nn.ResLT(COUNTS, few=41), "weight"),
    "DistributionBalanced": (
        lambda: ltk.nn.DistributionBalanced(COUNTS, 1000),
        lambda: ltk.nn.DistributionBalanced(COUNTS, 1001),
        "shift",
    ),
    "LDAMHinge": (lambda: ltk.nn.LDAMHinge(COUNTS), lambda: ltk.nn.LDAMHinge(COUNTS, 0.4), "margin"),
    "ProCo": (lambda: ltk.nn.ProCo(COUNTS, 8), lambda: ltk.nn.ProCo(OTHER, 8), "log_prior"),
    "GML": (lambda: ltk.nn.GML(COUNTS, 8, 4), lambda: ltk.nn.GML(OTHER, 8, 4), "class_counts"),
    "PaCo": (lambda: ltk.nn.PaCo(COUNTS, 8, 4), lambda: ltk.nn.PaCo(OTHER, 8, 4), "class_counts"),
    "GPaCo": (lambda: ltk.nn.GPaCo(COUNTS), lambda: ltk.nn.GPaCo(OTHER), "class_counts"),
}
# Those without tables of counts, which gather something.
GATHERING = {
    "MoCo": lambda: ltk.nn.MoCo(8, 4),
    "KCL": lambda: ltk.nn.KCL(8, 4),
    "BalancedContrastive": lambda: ltk.nn.BalancedContrastive(3, 4),
    "ClassVariances": lambda: ltk.nn.ClassVariances(4, 3),
    "learnable temperature": lambda: ltk.nn.SupCon(
        tau=0.2, learnable_tau=True, class_weight=torch.ones(2, device="cpu")
    ),
    "RIDE on LDAM": lambda: ltk.nn.RIDE(base=ltk.adjustments.ldam(COUNTS)),
    "ExpertsLoss": lambda: ltk.nn.ExpertsLoss(torch.ones(2, 3, device="cpu")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_checkpoint_of_another_loss_is_refused_and_changes_nothing(name) -> None:
    make, other, table = LOSSES[name]
    loss = make()
    make().load_state_dict(loss.state_dict())
    different = other()
    before = {key: value.clone() for key, value in different.state_dict().items()}
    model = torch.nn.ModuleDict({"loss": different})
    state = {f"loss.{key}": value for key, value in loss.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"the checkpoint's loss\.{table}\[.*of this {name} is .*other counts or options"
    ):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in different.state_dict().items())


def test_tables_that_a_user_gave_may_come_from_a_checkpoint() -> None:
    loss = ltk.nn.RIDE(base=ltk.adjustments.ldam(COUNTS))
    loss.base_margin.mul_(2)
    other = ltk.nn.RIDE(base=ltk.adjustments.ldam(COUNTS))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.base_margin, loss.base_margin)
    first, second = ltk.nn.ExpertsLoss(torch.zeros(2, 3)), ltk.nn.ExpertsLoss(torch.ones(2, 3))
    second.load_state_dict(first.state_dict())
    assert not second.shift.any()


@pytest.mark.parametrize("name", [*LOSSES, *GATHERING])
def test_what_was_built_on_meta_is_filled_by_reset_parameters(name) -> None:
    make = LOSSES[name][0] if name in LOSSES else GATHERING[name]
    with torch.device("meta"):
        built = make()
    assert all(value.is_meta for value in built.state_dict().values() if torch.is_tensor(value))
    loss = built.to_empty(device="cpu")
    with torch.no_grad():
        for value in loss.state_dict().values():
            value.fill_(7)
    torch.manual_seed(0)
    loss.reset_parameters()
    torch.manual_seed(0)
    expected = make().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("GML", "PaCo", "GPaCo")])
def test_no_dtype_of_a_model_rounds_a_table(name, default) -> None:
    make, _, table = LOSSES[name]
    expected = getattr(make(), table)
    torch.set_default_dtype(default)
    try:
        loss = make().half()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.dtype in (torch.float32, torch.float64) for value in loss.buffers() if value.is_floating_point())
    assert torch.equal(getattr(loss, table), expected)
