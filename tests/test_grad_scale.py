"""Promise: a factor on the loss that is announced (`grad_scale`) costs no pass over the gradient, changes no number beyond rounding, and
keeps small float16 gradients; a factor that is not announced is right as well."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
COUNTS = [900, 2, 310, 17, 55, 4, 120, 1200, 9, 33, 700]
FACTOR = 512.0
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def batch(rows: int = 9, classes: int = len(COUNTS)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    z = torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 1.8 - 0.9  # cosines suit every loss
    y = torch.randint(0, classes, (rows,), generator=generator)
    y[2] = -100
    return z, y


def gradient(call, z: torch.Tensor, y: torch.Tensor, upstream: float = FACTOR, **options) -> torch.Tensor:
    leaf = z.detach().clone().requires_grad_()
    torch.manual_seed(3)  # softmax equalization draws
    (call(leaf, y, **options) * upstream).backward()
    return leaf.grad


def passes(run) -> list[str]:
    """The multiplications of arrays that a call does."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    return [
        event.name
        for event in profile.events()
        if event.name in ("aten::mul", "aten::mul_", "aten::div", "aten::copy_")
        and event.input_shapes[:1] == [[9, len(COUNTS)]]
    ]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("name", sorted(ltk.LOSSES))
def test_every_loss(name: str, dtype: torch.dtype) -> None:
    z, y = batch()
    z = z.to(dtype)
    loss = ltk.LOSSES[name].make(COUNTS).eval()
    expected = gradient(loss, z.double(), y)
    largest = expected.abs().amax()
    assert largest > 0
    for options in ({}, {"grad_scale": FACTOR}, {"grad_scale": torch.tensor([FACTOR])}, {"grad_scale": FACTOR * 3}):
        got = gradient(loss, z, y, **options)
        assert got.dtype == dtype
        roundings = (
            2 if options.get("grad_scale") == FACTOR * 3 else 1
        )  # the gradient for another factor is rounded too
        atol = float(largest) * min(EPS[dtype], 1e-5)
        assert torch.allclose(got.double(), expected, rtol=roundings * EPS[dtype], atol=atol), options


def test_an_announced_factor_costs_no_pass() -> None:
    z, y = batch()
    for function in (
        CE,
        ltk.nn.Seesaw(COUNTS).eval(),
        ltk.nn.AdjustedCrossEntropy(learnable=("shift",), class_counts=COUNTS),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scaled = {"grad_scale": torch.tensor(FACTOR)}
            leaf = z.to(dtype).requires_grad_()
            assert passes(lambda: (function(leaf, y, **scaled) * FACTOR).backward()) == []  # noqa: B023
    leaf = z.float().requires_grad_()
    assert passes(lambda: (CE(leaf, y) * FACTOR).backward()) == ["aten::mul_"]
    assert passes(lambda: (CE(leaf, y, grad_scale=2.0) * FACTOR).backward())[:1] == ["aten::mul_"]


def test_small_float16_gradients_survive_a_loss_scaler() -> None:
    """1e-8 is 0 in float16; 65536 times as much is not. Rounding before the scaler's factor would lose it."""
    z = torch.zeros(256, 1000, dtype=torch.float16)
    z[:, 0] = 14.0
    y = torch.zeros(256, dtype=torch.int64)
    exact = torch.autograd.functional.jacobian(lambda x: F.cross_entropy(x, y), z.double())
    assert (exact.to(torch.float16)[:, 1:] == 0).all()  # what is at stake
    expected = (exact * 65536).to(torch.float16)
    assert (expected[:, 1:] > 0).all()
    for options in ({}, {"grad_scale": 65536.0}, {"grad_scale": 65536.0, "inplace": True}):
        leaf = z.clone().requires_grad_()
        (grad,) = torch.autograd.grad(CE(leaf * 1.0, y, **options) * 65536, leaf)
        assert torch.allclose(grad.double(), expected.double(), rtol=2**-10, atol=0), options


def test_the_loss_is_what_it_was() -> None:
    z, y = batch()
    for reduction in ("mean", "batch_mean", "sum", "none"):
        leaf = z.float().requires_grad_()
        assert torch.equal(CE(leaf, y, reduction=reduction, grad_scale=7.0), CE(leaf, y, reduction=reduction))


def test_second_backward_and_other_upstreams() -> None:
    z, y = batch()
    leaf = z.clone().requires_grad_()
    loss = CE(leaf, y, grad_scale=8.0)
    (eight,) = torch.autograd.grad(loss, leaf, torch.tensor(8.0).double(), retain_graph=True)
    kept = eight.clone()
    eight.zero_()
    (again,) = torch.autograd.grad(loss, leaf, torch.tensor(8.0).double(), retain_graph=True)
    (two,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0).double(), retain_graph=True)
    (nothing,) = torch.autograd.grad(loss, leaf, torch.tensor(0.0).double(), retain_graph=True)
    assert torch.equal(again, kept)
    assert torch.equal(4 * two, kept)
    assert torch.equal(nothing, torch.zeros_like(kept))
    (plain,) = torch.autograd.grad(CE(leaf, y), leaf)
    assert torch.allclose(kept, 8 * plain, rtol=1e-14)
    assert torch.autograd.gradgradcheck(lambda x: CE(x, y, grad_scale=8.0), (leaf,))


def test_unreduced_losses_and_the_reference_take_it() -> None:
    z, y = batch()
    for options in ({"reduction": "none"}, {"backend": "torch"}):
        one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        (CE(one, y, grad_scale=FACTOR, **options).sum() * FACTOR).backward()
        (CE(other, y, **options).sum() * FACTOR).backward()
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_learned_vectors(inplace: bool) -> None:
    z, y = batch()
    found = []
    for options in ({}, {"grad_scale": FACTOR, "inplace": inplace}, {"grad_scale": 2.0, "inplace": inplace}):
        leaf = z.clone().requires_grad_()
        shift, scale = torch.zeros(len(COUNTS)).requires_grad_(), torch.ones(len(COUNTS)).requires_grad_()
        loss = CE(leaf * 1.0, y, shift=shift, scale=scale, **options)
        found.append(torch.autograd.grad(loss * FACTOR, (leaf, shift, scale)))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert torch.allclose(a, b, rtol=1e-5)


def test_inplace_gives_the_logits_own_memory_once() -> None:
    z, y = batch()
    for dtype, upstream in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 3.0)):
        base = z.to(dtype).requires_grad_()
        logits = base * 1.0
        address = logits.data_ptr()
        got = []
        logits.register_hook(lambda grad: got.append(grad.data_ptr()))  # noqa: B023
        loss = CE(logits, y, inplace=True)
        (loss * upstream).backward(retain_graph=True)
        assert got == [address]
        expected = gradient(CE, z.to(dtype), y, upstream)
        assert torch.equal(base.grad, expected)
        with pytest.raises(RuntimeError, match="a second backward needs the logits, and inplace=True"):
            loss.backward()


def test_compiled() -> None:
    z, y = batch()
    for dtype in (torch.float32, torch.float16):

        def step(leaf: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return CE(leaf, y, grad_scale=factor) * factor

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        one, other = (z.to(dtype).requires_grad_() for _ in range(2))
        factor = torch.tensor(FACTOR)
        a, b = step(one, factor), compiled(other, factor)
        a.backward()
        b.backward()
        assert torch.equal(a, b)
        assert torch.equal(one.grad, other.grad)


def test_compiled_with_a_learned_vector() -> None:
    z, y = batch()

    def step(leaf: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return CE(leaf, y, shift=shift, grad_scale=factor) * 3.0

    for factor in (3.0, 2.0):
        found = []
        for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            inputs = z.float().requires_grad_(), torch.zeros(len(COUNTS)).requires_grad_()
            call(*inputs, torch.tensor(factor)).backward()
            found.append([each.grad for each in inputs])
        for a, b in zip(*found):
            assert a.abs().max() > 0
            assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activation_checkpointing(dtype: torch.dtype, learned: bool) -> None:
    """It lets backward unpack each saved tensor once."""
    z, y = batch()
    found = []
    for options in ({}, {"inplace": True}, {"grad_scale": 3.0}, {"grad_scale": 3.0, "inplace": True}):
        if dtype == torch.float16 and options == {"inplace": True}:
            continue  # rounds before the factor
        shift = torch.zeros(len(COUNTS), requires_grad=learned)
        leaf = z.to(dtype).requires_grad_()
        run = lambda x: CE(x * 1.0, y, shift=shift, **options)  # noqa: B023, E731
        (checkpoint(run, leaf, use_reentrant=False) * 3.0).backward()
        found.append(leaf.grad)
    for grad in found[1:]:
        assert torch.allclose(grad, found[0], rtol=2 * torch.finfo(dtype).eps)


def test_a_factor_that_changes_before_backward_is_refused() -> None:
    z, y = batch()
    for shift in (None, torch.zeros(len(COUNTS), requires_grad=True)):
        factor = torch.tensor(2.0)
        loss = CE(z.float().requires_grad_(), y, shift=shift, grad_scale=factor)
        factor.mul_(0.5)  # as a loss scaler's update does
        with pytest.raises(RuntimeError, match="grad_scale was changed in place"):
            loss.backward()
    with torch.inference_mode():
        factor = torch.tensor(2.0)
    leaf = z.float().requires_grad_()
    (CE(leaf, y, grad_scale=factor) * 2.0).backward()
    assert torch.equal(leaf.grad, gradient(CE, z.float(), y, 2.0))


def test_inplace_leaves_a_leafs_gradient_memory_of_its_own() -> None:
    z, y = batch()
    for view in (lambda x: x, lambda x: x.view(x.shape)):
        leaf = z.float().requires_grad_()
        for _ in range(2):
            leaf.data.copy_(z)
            CE(view(leaf), y, inplace=True).backward()
        assert leaf.grad.data_ptr() != leaf.data_ptr()
        assert torch.allclose(leaf.grad, gradient(CE, z.float(), y, 2.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "grad_scale is 0.0; it must be above 0.0"),
        (-2.0, "grad_scale is -2.0; it must be above 0.0"),
        (float("nan"), "grad_scale is nan; it must be finite"),
        (torch.tensor(0.0), "grad_scale is 0.0; it must be above 0.0"),
        (torch.tensor([torch.inf]), "grad_scale is inf; it must be finite"),
        (1e-46, r"grad_scale is 1e-46; it must lie in \[1.17"),
        (1e39, r"grad_scale is 1e\+39; it must lie in"),
        (torch.tensor(1e300, dtype=torch.float64), r"grad_scale is 1e\+300; it must lie in"),
        (torch.ones(2), r"grad_scale has shape \(2,\)"),
        (torch.tensor(3), "dtype torch.int64; it must be one floating-point number"),
        (torch.ones((), device="meta"), "grad_scale is on meta, logits on cpu"),
        ("65536", "grad_scale is '65536'; it must be a number"),
    ],
)
def test_bad_values(value, words: str) -> None:
    z, y = batch()
    with pytest.raises((ValueError, TypeError), match=words):
        ltk.nn.LogitAdjustedCrossEntropy(COUNTS)(z.float(), y, grad_scale=value)
