"""Promise: the contrastive Modules keep queues and centres as they say, save and load them, and train over ranks as in one process."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import contrast_ranks_program as program
import pytest
import torch

import ltkernels as ltk

NN = ltk.nn
X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 1])
MODULES = {
    "supcon": (lambda: NN.SupCon(), (X, Y)),
    "supcon in": (lambda: NN.SupCon(inside=True, learnable_tau=True), (X, Y)),
    "ntxent": (lambda: NN.NTXent(), (X.reshape(3, 2, 4),)),
    "balanced": (lambda: NN.BalancedContrastive(3, 4), (X, Y)),
    "prototypes": (lambda: NN.PrototypeContrastive(3, 4), (X, Y)),
    "moco": (lambda: NN.MoCo(16, 4), (X, -X)),
    "kcl": (lambda: NN.KCL(16, 4), (X, Y, -X)),
    "gml": (lambda: NN.GML([5, 2, 1], 16, 4), (X, Y, -X)),
    "paco": (lambda: NN.PaCo([5, 2, 1], 16, 4), (X, X[:, :3], Y, -X)),
    "gpaco": (lambda: NN.GPaCo([5, 2, 1]), (X, X[:, :3], Y)),
}


@pytest.mark.parametrize("name", MODULES)
def test_trains_saves_and_loads(name: str) -> None:
    make, given = MODULES[name]
    module = make()
    for step in range(2):  # a queue has something to say from the second call on
        leaf = given[0].clone().requires_grad_()
        loss = module(leaf, *given[1:])
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()
        for parameter in module.parameters():
            assert parameter.grad.abs().sum() > 0 or step == 0
    assert leaf.grad.abs().sum() > 0
    fresh = make()
    fresh.load_state_dict(module.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    module.eval()
    fresh.eval()
    torch.manual_seed(0)
    before = copy.deepcopy(module.state_dict())
    one = module(*given)
    torch.manual_seed(0)
    assert torch.equal(one, fresh(*given))
    assert all(
        torch.equal(before[key], value) for key, value in module.state_dict().items()
    )  # evaluation moves nothing
    assert repr(module)


def test_a_learned_temperature_gets_the_gradient_of_its_logarithm() -> None:
    loss = NN.SupCon(tau=0.3, learnable_tau=True).double()
    value = loss(X.double(), Y)
    value.backward()
    step = 1e-5
    sides = [
        ltk.functional.contrastive(X.double(), Y, tau=0.3 * torch.tensor(s).double().exp().item())
        for s in (step, -step)
    ]
    assert loss.log_tau.grad.item() == pytest.approx((sides[0] - sides[1]).item() / (2 * step), rel=1e-5)


def test_the_queue_is_a_ring() -> None:
    loss = NN.KCL(5, 2, positives=1)
    keys = torch.arange(16.0).reshape(8, 2)
    loss.append(keys[:3], torch.tensor([0, 1, -100]))
    assert loss.queue_labels.tolist() == [0, 1, -1, -1, -1]
    loss.append(keys[3:6], torch.tensor([3, 4, 5]))
    assert loss.queue_labels.tolist() == [5, 1, -1, 3, 4]
    assert loss.queue.tolist() == keys[[5, 1, 2, 3, 4]].tolist()
    assert int(loss.queue_next) == 1
    with pytest.raises(ValueError, match="the queue has 5 slots; a batch has 6 keys"):
        loss.append(keys[:6], torch.arange(6))
    assert int(loss.queue_next) == 1
    loss.reset_queue()
    assert (loss.queue_labels == -1).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_backward_sees_the_queue_of_its_own_step(normalize: bool) -> None:
    loss = NN.MoCo(6, 4, normalize=normalize)
    loss.append(torch.randn(6, 4))
    held = loss.queue.clone()
    leaf = X.clone().requires_grad_()
    value = loss(leaf, -X)  # replaces all of the queue
    (found,) = torch.autograd.grad(value, leaf)
    expected = ltk.functional.contrastive(leaf, kind="moco", keys=-X, queue=held, tau=0.07, normalize=normalize)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf)[0])


def test_centres_are_running_means() -> None:
    loss = NN.BalancedContrastive(4, 4, momentum=0.75)
    unit = torch.nn.functional.normalize(X)
    loss(X, Y)
    means = torch.stack([unit[c == Y].mean(0) for c in range(3)])
    torch.testing.assert_close(loss.centres[:3], means)
    assert (loss.centres[3] == 0).all()
    loss(-X, Y)
    torch.testing.assert_close(loss.centres[:3], 0.75 * means - 0.25 * means)


def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    """Loss and the network's gradients after DistributedDataParallel's average, for unequal numbers of rows that count."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        program.__file__,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = program.data()
    expected = program.run(program.Net(), whole, None) | program.module_state(whole, None)
    for rank, found in enumerate(ranks):
        message = bytes(found.pop("message").tolist()).decode()
        assert "all ranks must have the same shape" in message, (rank, message)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (X, Y + 1, r"labels is 3 in row 2; it must lie in \[0, 3\) or be -100"),
        (X, Y - 1, "labels is -1 in row 0"),
        (X[:, :3], Y, "features has width 3, centres 4"),
        ([X, X], Y, "features is list"),
        (X, Y[:5], r"labels has shape \(5,\); it must be \(6,\)"),
        (X, Y.float(), "labels has dtype torch.float32"),
    ],
)
def test_a_refused_batch_moves_no_running_centre(features, labels, message) -> None:
    loss = NN.BalancedContrastive(3, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        loss(features, labels)
    assert not loss.centres.any()
