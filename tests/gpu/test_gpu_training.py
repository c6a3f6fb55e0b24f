"""Public losses on a GPU: a whole training step in a CUDA graph, streams, devices, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

import ltkernels as ltk
from ltkernels import _backends

BACKENDS = [] if not torch.cuda.is_available() else [
    name for name, problem in (("cuda", _backends.cuda_problem()), ("triton", _backends.triton_problem("cuda"))) if not problem
]  # fmt: skip
pytestmark = [
    pytest.mark.skipif(not BACKENDS, reason="needs a GPU with the CUDA part of the build, or Triton"),
    pytest.mark.parametrize("backend", BACKENDS or ["none"]),
]
CLASSES, ROWS, WIDTH = 365, 64, 32
COUNTS = [max(1, int(1000 * 0.98**k)) for k in range(CLASSES)]
SCHEDULES = {
    "drw": lambda backend: ltk.schedules.DRW(ltk.nn.LDAM(COUNTS, backend=backend), start=2),
    "ga": lambda backend: ltk.schedules.GradientAdjustment(ltk.nn.KPS(COUNTS, backend=backend), start=2),
    "tla": lambda backend: ltk.schedules.TLA(ltk.nn.VectorScaling(COUNTS, backend=backend), start=2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_captured_step_follows_its_schedule(backend: str, name: str) -> None:
    """Forward, backward and SGD captured once, at epoch 0; replayed over four epochs, with the schedule's switch between them, it
    gives the numbers of the eager steps."""
    torch.manual_seed(0)
    schedule = SCHEDULES[name](backend)
    loss = schedule.loss.cuda()
    head = torch.nn.Linear(WIDTH, CLASSES).cuda()
    start = {key: value.clone() for key, value in head.state_dict().items()}
    x = torch.nn.functional.normalize(torch.randn(ROWS, WIDTH, device="cuda"))
    y = torch.randint(0, CLASSES, (ROWS,), device="cuda")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    value = torch.empty((), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        now = loss(head(x), y)
        now.backward()
        optimizer.step()
        value.copy_(now.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def train(run) -> tuple[list[float], torch.Tensor]:
        head.load_state_dict(start)
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
        losses = []
        for epoch in range(4):
            schedule.step(epoch)
            for _ in range(2):
                run()
                losses.append(value.item())
        return losses, head.weight.detach().clone()

    eager, replayed = train(step), train(graph.replay)
    assert replayed[0] == pytest.approx(eager[0], rel=1e-5)  # cuBLAS may choose another product in a graph
    torch.testing.assert_close(replayed[1], eager[1], rtol=1e-4, atol=1e-6)
    schedule.start = 99  # the switch matters: without it the last epochs are others
    assert train(graph.replay)[0][:4] == replayed[0][:4]
    assert train(graph.replay)[0][4:] != replayed[0][4:]


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_nothing_waits_for_the_device(backend: str, upstream: float) -> None:
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS, backend=backend).cuda()
    logits = torch.randn(ROWS, CLASSES, device="cuda", requires_grad=True)
    y = torch.randint(0, CLASSES, (ROWS,), device="cuda")
    factor = torch.tensor(upstream, device="cuda")
    loss(logits, y).backward(factor)  # compiles
    before, logits.grad = torch.cuda.get_sync_debug_mode(), None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(logits, y).backward(factor)
        with torch.no_grad():
            loss(logits, y)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    leaf = logits.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(leaf + loss.shift.double(), y) * upstream).backward()
    torch.testing.assert_close(logits.grad.double(), leaf.grad, rtol=1e-4, atol=1e-9)


def test_the_current_stream_is_used(backend: str) -> None:
    """On another stream the loss would not wait for the copy that a long sleep holds back."""
    source, y = torch.randn(ROWS, CLASSES, device="cuda"), torch.randint(0, CLASSES, (ROWS,), device="cuda")
    call = ltk.functional.adjusted_cross_entropy
    expected = call(source, y, backend=backend)
    z = torch.zeros_like(source, requires_grad=True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            z.copy_(source)
        value = call(z, y, backend=backend)
        value.backward(torch.full_like(value, 0.5))
    side.synchronize()
    assert value.item() == expected.item()
    leaf = source.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, y).backward()
    torch.testing.assert_close(z.grad, leaf.grad / 2, rtol=1e-4, atol=1e-8)


def test_the_tensors_device_is_used(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    z, y = torch.randn(4, 100, device="cuda:1", requires_grad=True), torch.arange(4, device="cuda:1")
    value = ltk.functional.adjusted_cross_entropy(z, y, backend=backend)
    value.backward(torch.full_like(value, 2.0))
    assert value.device == z.grad.device == torch.device("cuda:1")
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(z, y), rtol=1e-5, atol=0)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", sorted(ltk.LOSSES))
def test_every_loss_is_the_processors(backend: str, name: str) -> None:
    """Values and gradients of the CPU kernel, which has the oracle behind it, through the same public call."""
    generator = torch.Generator().manual_seed(0)
    loss = ltk.LOSSES[name].make(COUNTS).eval()
    z = (torch.rand(ROWS, CLASSES, generator=generator) - 0.5).requires_grad_()
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    expected = loss(z, y)
    expected.backward(torch.tensor(0.4))
    if loss.term_seed is None and loss._term is not None and loss._term[0] == "equalization":
        pytest.skip("draws a new mask at each call")
    there = z.detach().cuda().requires_grad_()
    loss = loss.cuda()
    loss.backend = backend
    try:
        ltk.explain(loss, there, y.cuda())
    except ValueError:
        loss.backend = None  # which has no kernel for it: another back end's, or torch
    value = loss(there, y.cuda())
    value.backward(torch.tensor(0.4, device="cuda"))
    torch.testing.assert_close(value.cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.grad.cpu(), z.grad, rtol=1e-4, atol=1e-8)


def _experts(coupling: str):
    return lambda z, other, y: ltk.functional.experts_cross_entropy([z, other, z + other], y, coupling=coupling)


TRITONS = {
    "probabilities": lambda z, other, y: ltk.functional.adjusted_cross_entropy(z, other.softmax(1)),
    "distillation": lambda z, other, y: ltk.functional.distillation(z, other, 2.0),
    "multi-label": lambda z, other, y: ltk.functional.sigmoid_cross_entropy(z, other > 1, focal_gamma=1.0),
    "labels": lambda z, other, y: ltk.functional.sigmoid_cross_entropy(z, y, threshold=0.4, reduction="sum"),
    **{coupling: _experts(coupling) for coupling in ("mean_kl", "mutual_kl", "sum")},
}


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [100, 365, 5000])
@pytest.mark.parametrize("name", TRITONS)
def test_what_has_no_cuda_kernel(backend: str, name: str, classes: int, dtype: torch.dtype) -> None:
    """Whatever back end serves the rest: values and gradients of the CPU's kernels, and no wait for the device."""
    generator = torch.Generator().manual_seed(0)
    z, other = (torch.randn(ROWS, classes, generator=generator).to(dtype) for _ in range(2))
    y = torch.randint(0, classes, (ROWS,), generator=generator)
    found = []
    before = torch.cuda.get_sync_debug_mode()
    for device in ("cpu", "cuda"):
        given = [each.to(device) for each in (z, other, y)]
        leaf = given[0].requires_grad_()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else before)
        try:
            value = TRITONS[name](leaf, *given[1:])
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        found.append((value.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-5, atol=1e-6)
    near = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=near, atol=near * float(found[0][1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", ["plain", "odd width", "mixed", "bias alone"])
def test_the_head_is_the_reference(backend: str, case: str, normalize: bool, dtype: torch.dtype) -> None:
    """In float64, of the inputs as they are; in chunks, and in Triton's tiles."""
    width = 61 if case == "odd width" else 64
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((150, width), (CLASSES, width), (CLASSES,))
    )
    y = torch.randint(0, CLASSES, (150,), generator=generator)
    target = (y, y.flip(0), 0.3) if case == "mixed" else y
    loss = ltk.nn.VectorScaling(COUNTS)
    wants = (False, False, True) if case == "bias alone" else (True, True, True)
    leaves = [each.double().requires_grad_(want) for each, want in zip((x, w, b), wants)]
    features, weight = (torch.nn.functional.normalize(v) if normalize else v for v in leaves[:2])
    expected = loss(features @ weight.T + leaves[2], target)
    expected.backward(torch.tensor(0.4, dtype=torch.float64))
    there = [each.cuda().requires_grad_(want) for each, want in zip((x, w, b), wants)]
    loss = loss.cuda()
    loss.backend = backend
    moved = tuple(t.cuda() if isinstance(t, torch.Tensor) else t for t in target) if case == "mixed" else y.cuda()
    # The logits of chunks, of up to 40, have the inputs' dtype.
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for chunk_rows in (64, None) if backend == "triton" else (64,):
        value = loss.from_features(*there[:2], moved, bias=there[2], normalize=normalize, chunk_rows=chunk_rows)
        found = torch.autograd.grad(
            value, [each for each in there if each.requires_grad], torch.tensor(0.4, device="cuda")
        )
        assert value.item() == pytest.approx(expected.item(), rel=limit)
        for got, exact in zip(found, (each.grad for each in leaves if each.grad is not None), strict=True):
            assert float((got.cpu().double() - exact).norm()) <= limit * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_announced_factor_stays_on_the_device(backend: str, dtype: torch.dtype) -> None:
    """A loss scaler's factor, announced or not: the CPU kernel's gradient, the small float16 entries too, and no wait."""
    torch.manual_seed(0)
    z, y = torch.randn(ROWS, CLASSES).to(dtype), torch.randint(0, CLASSES, (ROWS,))
    on_cpu = z.clone().requires_grad_()
    (ltk.nn.LogitAdjustedCrossEntropy(COUNTS)(on_cpu, y, grad_scale=4096.0) * 4096.0).backward()
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS, backend=backend).cuda()
    factor, labels = torch.full((), 4096.0, device="cuda"), y.cuda()
    for said in ({}, {"grad_scale": factor}, {"grad_scale": 2 * factor}, {"grad_scale": factor.view(1)}):
        leaf = z.cuda().requires_grad_()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (loss(leaf, labels, **said) * factor).backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        rtol = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert torch.allclose(leaf.grad.cpu().float(), on_cpu.grad.float(), rtol=rtol, atol=1e-6), said


@pytest.mark.parametrize("columns", [CLASSES, CLASSES + 3])
def test_inplace_gradient(backend: str, columns: int) -> None:
    """The logits' own memory where their rows follow each other; a view with gaps gets memory of its own."""
    torch.manual_seed(0)
    base, y = (
        torch.randn(ROWS, columns, device="cuda", requires_grad=True),
        torch.randint(0, CLASSES, (ROWS,), device="cuda"),
    )
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS, backend=backend).cuda()
    (expected,) = torch.autograd.grad(loss(base[:, :CLASSES], y) * 3.0, base)
    loss.inplace = True
    (found,) = torch.autograd.grad(loss((base * 1.0)[:, :CLASSES], y) * 3.0, base)
    assert torch.allclose(found, expected, rtol=1e-6)
