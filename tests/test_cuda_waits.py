"""No call waits for the GPU: the Python between a public loss and its kernels, on a machine without one.

The kernels are those of the emulation, and every way by which Python reads a number out of a tensor raises. What only a GPU can show is
in tests/gpu: that a captured step replays, and follows its schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_host import library

import ltkernels as ltk
from ltkernels import _backends

COUNTS = [50, 3, 20, 7, 1]
READS = (
    "item",
    "tolist",
    "nonzero",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__iter__",
    "equal",
)


@pytest.fixture
def without_waiting(monkeypatch) -> Callable[[Callable[[], object]], None]:
    """Calls something while no tensor can be read."""
    library.emulate(monkeypatch)
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")

    def refuse(name):
        def read(self, *arguments):
            raise AssertionError(f"Tensor.{name} waits for the GPU")

        return read

    def run(call) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, refuse(name))
            call()

    return run


# For their tables, threshold or noise.
NOT_CUDA = {"acsl", "balanced_bce", "ecm", "gcl"}


@pytest.mark.parametrize("name", sorted(NOT_CUDA))
def test_losses_that_no_cuda_kernel_serves(name: str, monkeypatch) -> None:
    """Refused, not computed without what they are made of."""
    library.emulate(monkeypatch)
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")
    loss = ltk.LOSSES[name].make(COUNTS, backend="cuda")
    with pytest.raises(ValueError, match="there is no CUDA kernel for "):
        loss(torch.zeros(2, 5), torch.tensor([0, 1]))


def test_mixed_targets_of_a_form_that_takes_none(monkeypatch) -> None:
    library.emulate(monkeypatch)
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")
    y, term = torch.tensor([0, 1]), ltk.adjustments.vmf(torch.ones(5), 8).term
    with pytest.raises(ValueError, match="the von Mises-Fisher form, whose kernels take plain labels"):
        ltk.functional.adjusted_cross_entropy(torch.zeros(2, 5), (y, y.flip(0), 0.5), term=term, backend="cuda")


@pytest.mark.parametrize("reduction", ["mean", "none"])
# EQLv2 in training is `sigmoid_cross_entropy`, which has no CUDA kernel.
@pytest.mark.parametrize("name", sorted(set(ltk.LOSSES) - NOT_CUDA - {"eql_v2"}))
def test_losses(name: str, reduction: str, without_waiting) -> None:
    """A training step's part: forward, backward twice (the second recomputes), evaluation."""
    loss = ltk.LOSSES[name].make(COUNTS, reduction=reduction, backend="cuda")
    loss._range = None  # reads these tensors, which are on the CPU; of a GPU's it reads pinned memory behind an event
    logits = (torch.rand(6, 5) - 0.5).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, -100])
    found = []

    def step() -> None:
        value = loss(logits, target)
        upstream = torch.full_like(value, 0.5)
        value.backward(upstream, retain_graph=True)
        found.append(logits.grad.clone())
        value.backward(upstream)
        with torch.no_grad():
            loss(logits, target)

    without_waiting(step)
    assert logits.grad.abs().max() > 0
    torch.testing.assert_close(logits.grad, 2 * found[0])


def test_mixed_labels_and_smoothing(without_waiting) -> None:
    loss = ltk.nn.LDAM(COUNTS, label_smoothing=0.1, backend="cuda")
    loss._range = None
    logits, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100])
    without_waiting(lambda: loss(logits, (target, target.flip(0).abs() % 5, 0.3)).backward())
    without_waiting(lambda: loss(logits, (target, target, torch.rand(6))).backward())
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("head", [False, True])
def test_von_mises_fisher(head: bool, without_waiting) -> None:
    """ProCo's form, of cosines and in its head: the CPU's loss and gradient, without a wait."""
    term = ltk.adjustments.vmf(torch.tensor([300.0, 40.0, 0.0, 7.0, 90.0]), 8).term
    shift, target, found = torch.linspace(0, -2, 5), torch.tensor([0, 1, 2, 3, 4, -100]), []
    features, directions = torch.randn(6, 8), torch.randn(5, 8)
    for backend in ("cuda", "cpu"):
        leaf = (features if head else torch.tanh(features[:, :5])).clone().requires_grad_()

        def step(leaf=leaf, backend=backend) -> None:
            options = {"term": term, "shift": shift, "backend": backend}
            if head:
                loss = ltk.functional.linear_adjusted_cross_entropy(leaf, directions, target, normalize=True, **options)
            else:
                loss = ltk.functional.adjusted_cross_entropy(leaf, target, **options)
            loss.backward()
            found.append(loss.detach())

        without_waiting(step) if backend == "cuda" else step()
        found.append(leaf.grad)
    for ours, theirs in zip(found[:2], found[2:]):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
def test_sample_weights(reduction: str, without_waiting) -> None:
    """By the kernels' own operands: the CPU's loss and gradient, without a wait."""
    logits, target, own = (
        torch.randn(6, 5),
        torch.tensor([0, 1, 2, 3, 4, -100]),
        torch.tensor([1.0, 0, 2, 0.5, 3, torch.nan]),
    )
    found = []
    for backend in ("cuda", "cpu"):
        leaf = logits.clone().requires_grad_()
        loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS, reduction=reduction, backend=backend)
        value = [None]

        def step(loss=loss, leaf=leaf, value=value) -> None:
            value[0] = loss(leaf, target, sample_weight=own)
            value[0].backward(torch.full_like(value[0], 0.5))

        without_waiting(step) if backend == "cuda" else step()
        found.append((value[0].detach(), leaf.grad))
    for ours, theirs in zip(*found):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("look", [lambda x: x.item(), bool, float, lambda x: x.nonzero(), lambda x: x.cpu()])
def test_a_wait_would_be_seen(look, without_waiting) -> None:
    with pytest.raises(AssertionError, match="waits for the GPU"):
        without_waiting(lambda: look(torch.ones(())))
    assert torch.ones(()).item() == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: ltk.schedules.DRW(ltk.nn.LDAM(COUNTS), start=2),
        lambda: ltk.schedules.GradientAdjustment(ltk.nn.KPS(COUNTS), start=2),
        lambda: ltk.schedules.TLA(ltk.nn.VectorScaling(COUNTS), start=2),
    ],
    ids=["DRW", "GradientAdjustment", "TLA"],
)
def test_schedules_write_where_a_graph_reads(make) -> None:
    """A captured graph keeps addresses: every buffer stays where it is while its numbers change, and goes back again."""
    schedule = make()
    loss = schedule.loss
    before = {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in loss.named_buffers()}
    schedule.step(2)
    assert {name: buffer.data_ptr() for name, buffer in loss.named_buffers()} == {
        n: at for n, (at, _) in before.items()
    }
    assert any(not torch.equal(buffer, before[name][1]) for name, buffer in loss.named_buffers())
    # What the kernel is given is the buffer itself.
    given = []
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 4])
    run = _backends.cpu.adjusted_ce

    def seen(logits, call, out):
        given.extend(x.data_ptr() for x in call if isinstance(x, torch.Tensor))
        return run(logits, call, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "kernel", lambda backend: seen)
        patch.setattr(_backends, "plain_loss", lambda *_: None)  # the CPU's own way, which asks for no kernel
        loss(logits, target)
    changing = {getattr(loss, name).data_ptr() for name in schedule._after}
    assert changing <= set(given)
    schedule.step(0)
    assert all(torch.equal(buffer, before[name][1]) for name, buffer in loss.named_buffers())
