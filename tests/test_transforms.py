"""Promise: whoever looks at a call sees torch's answer: forward-mode derivatives, function transforms, tracers, saved-tensor hooks, tensor
subclasses, export. Nothing is detached, dropped or read from a wrong address in silence.

The oracle is the same loss through torch's own operations (``backend="torch"``, checked against float64 elsewhere) in the plain mode that
the transform stands for.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import contract
import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
HEAD = ltk.functional.linear_adjusted_cross_entropy
N, C, D = 6, 5, 4
COUNTS = [500, 90, 30, 8, 2]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Z = torch.randn(N, C, generator=_generator(), dtype=torch.float64)
V = torch.randn(N, C, generator=_generator(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 4, 1])
Y2 = torch.tensor([1, 1, 0, 4, 2, 3])
LAM = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
SHIFT = torch.log(torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS))
MODULES = {name: loss for name, loss in ltk.LOSSES.items() if name not in contract.DRAWING}


def loss_of(name: str):
    """(loss of logits, logits in the range that the loss expects)."""
    module = MODULES[name].make(COUNTS).eval()  # evaluation: Seesaw does not count
    return (lambda z: module(z, Y)), torch.tanh(Z) if MODULES[name].logits == "cosine" else Z


def reverse(function, z: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


CALLS = {
    "plain": lambda z: CE(z, Y),
    "sum": lambda z: CE(z, Y, reduction="sum"),
    "batch_mean": lambda z: CE(z, Y, reduction="batch_mean"),
    "shift": lambda z: CE(z, Y, shift=SHIFT),
    "mixed": lambda z: CE(z, (Y, Y2, LAM), shift=SHIFT),
    "smoothed": lambda z: CE(z, Y, label_smoothing=0.1, focal_gamma=1.5),
    "pixels": lambda z: CE(z.reshape(2, 3, C).movedim(2, 1), Y.reshape(2, 3)),
    "none": lambda z: (CE(z, Y, reduction="none") * LAM).sum(),
    "announced": lambda z: CE(z, Y, grad_scale=4.0),
}


# ---- forward mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_forward_mode_of_every_loss(name) -> None:
    function, z = loss_of(name)
    exact = (reverse(function, z) * V).sum()
    assert exact != 0
    value, tangent = torch.func.jvp(function, (z,), (V,))
    assert torch.allclose(value, function(z), rtol=1e-6)
    assert torch.allclose(tangent, exact, rtol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_of_every_call(name) -> None:
    function = CALLS[name]
    gradient = reverse(function, Z)
    assert torch.allclose(torch.func.jacfwd(function)(Z), gradient, rtol=1e-9)
    with fwad.dual_level():
        tangent = fwad.unpack_dual(function(fwad.make_dual(Z, V))).tangent
    assert torch.allclose(tangent, (gradient * V).sum(), rtol=1e-9)
    jacobian = torch.autograd.functional.jacobian(function, Z, strategy="forward-mode", vectorize=True)
    assert torch.allclose(jacobian, gradient, rtol=1e-9)


@pytest.mark.parametrize("table", ["shift", "scale", "margin", "row_scale", "weight"])
def test_forward_mode_of_a_table(table) -> None:
    values = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
    direction = torch.linspace(-1, 1, C, dtype=torch.float64) ** 2

    def of_table(t: Tensor) -> Tensor:
        return CE(Z, Y, **{table: t})

    exact = (reverse(of_table, values) * direction).sum()
    assert exact != 0
    assert torch.allclose(torch.func.jvp(of_table, (values,), (direction,))[1], exact, rtol=1e-9)
    with fwad.dual_level():  # plain logits, a dual table
        tangent = fwad.unpack_dual(of_table(fwad.make_dual(values, direction))).tangent
    assert torch.allclose(tangent, exact, rtol=1e-9)


@pytest.mark.parametrize("chunk_rows", [0, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_forward_mode_of_the_head(chunk_rows, normalize) -> None:
    x = torch.randn(N, D, generator=_generator(2), dtype=torch.float64)
    w = torch.randn(C, D, generator=_generator(3), dtype=torch.float64)
    vx, vw = torch.randn(N, D, dtype=torch.float64), torch.randn(C, D, dtype=torch.float64)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return HEAD(x, w, Y, normalize=normalize, shift=SHIFT, **({"chunk_rows": chunk_rows} if plain else {}))

    plain = True
    leaves = (x.clone().requires_grad_(), w.clone().requires_grad_())
    gx, gw = torch.autograd.grad(function(*leaves), leaves)
    plain = False  # a chunk size is refused where all logits are needed
    tangent = torch.func.jvp(function, (x, w), (vx, vw))[1]
    assert torch.allclose(tangent, (gx * vx).sum() + (gw * vw).sum(), rtol=1e-9)


def test_gradcheck_in_all_modes() -> None:
    tables = [torch.linspace(0.5, 1.5, C, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(z: Tensor, shift: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return CE(z, Y, shift=shift, scale=scale, weight=weight)

    inputs = (Z.clone().requires_grad_(), *tables)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    unreduced = lambda z: CE(z, Y, reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(unreduced, inputs[:1], check_forward_ad=True, check_batched_grad=True)


# ---- function transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_func_grad_vjp_hessian(name) -> None:
    function = CALLS[name]
    gradient = reverse(function, Z)
    assert torch.allclose(torch.func.grad(function)(Z), gradient, rtol=1e-9)
    _, pull = torch.func.vjp(function, Z)
    assert torch.allclose(pull(torch.tensor(2.0, dtype=torch.float64))[0], 2 * gradient, rtol=1e-9)
    assert torch.allclose(torch.func.jacrev(function)(Z), gradient, rtol=1e-9)
    hessian = torch.func.hessian(function)(Z)
    assert torch.allclose(hessian, torch.autograd.functional.hessian(function, Z), rtol=1e-8, atol=1e-12)
    assert hessian.abs().max() > 0


@pytest.mark.parametrize("name", MODULES)
def test_func_grad_of_every_loss(name) -> None:
    function, z = loss_of(name)
    assert torch.allclose(torch.func.grad(function)(z), reverse(function, z), rtol=1e-6, atol=1e-9)


def test_per_sample_gradients() -> None:
    module = torch.nn.Linear(D, C, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(N, D, generator=_generator(4), dtype=torch.float64)

    def sample(parameters, x: Tensor, y: Tensor, loss=CE) -> Tensor:
        return loss(torch.func.functional_call(module, parameters, (x,)), y)

    ours = torch.func.vmap(torch.func.grad(sample), in_dims=(None, 0, 0))(parameters, x, Y)
    theirs = torch.func.vmap(torch.func.grad(lambda *a: sample(*a, loss=F.cross_entropy)), in_dims=(None, 0, 0))(
        parameters, x, Y
    )
    for name in parameters:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-9)
    batched = torch.func.vmap(lambda z, y: CE(z, y, shift=SHIFT))(Z, Y)
    assert torch.allclose(batched, F.cross_entropy(Z + SHIFT, Y, reduction="none"), rtol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learned", [False, True])
def test_batches_of_upstream_gradients(reduction, learned) -> None:
    z = Z.clone().requires_grad_()
    shift = SHIFT.clone().requires_grad_(learned)
    loss = CE(z, Y, shift=shift, reduction=reduction)
    ups = torch.randn(3, *loss.shape, generator=_generator(5), dtype=torch.float64)
    wanted = (z, shift) if learned else (z,)
    together = torch.autograd.grad(loss, wanted, ups, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(loss, wanted, up, retain_graph=True) for up in ups]
    for k in range(len(wanted)):
        assert torch.allclose(together[k], torch.stack([grads[k] for grads in each]), rtol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda z: CE(z, Y, reduction=reduction), Z, vectorize=True)
    assert torch.allclose(jacobian, torch.autograd.functional.jacobian(lambda z: CE(z, Y, reduction=reduction), Z))


def test_a_forced_kernel_is_not_replaced() -> None:
    for function in (lambda z: CE(z, Y, backend="cpu"), lambda z: CE(z, Y, inplace=True)):
        with pytest.raises(ValueError, match="torch.func|the torch backend serves"):
            torch.func.grad(function)(Z)
    with fwad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        CE(fwad.make_dual(Z, V), Y, backend="cpu")


# ---- compilers and tracers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_transforms(backend) -> None:
    torch._dynamo.reset()
    for name in ("plain", "shift", "mixed", "smoothed"):
        function = CALLS[name]
        gradient = reverse(function, Z)
        compiled = torch.compile(torch.func.grad(function), backend=backend)(Z)
        assert torch.allclose(compiled, gradient, rtol=1e-9), name
    compiled = torch.compile(lambda z, v: torch.func.jvp(CALLS["shift"], (z,), (v,))[1], backend=backend)(Z, V)
    assert torch.allclose(compiled, (reverse(CALLS["shift"], Z) * V).sum(), rtol=1e-9)
    compiled = torch.compile(torch.func.vmap(torch.func.grad(lambda z, y: CE(z, y))), backend=backend)(Z, Y)
    assert torch.allclose(compiled, torch.func.vmap(torch.func.grad(lambda z, y: CE(z, y)))(Z, Y), rtol=1e-9)


def test_floats_do_not_make_a_graph_a_value() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    for function in (
        lambda z, value: CE(z, Y, label_smoothing=value),
        lambda z, value: CE(z, Y, focal_gamma=value),
        lambda z, value: CE(z, (Y, Y2, value)),
        lambda z, value: CE(z, Y, grad_scale=value),
        lambda z, value: HEAD(z, torch.eye(C, dtype=torch.float64), Y, label_smoothing=value),
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for value in (0.1, 0.2, 0.3, 0.4, 0.5):
            z, same = Z.clone().requires_grad_(), Z.clone().requires_grad_()
            got, wanted = compiled(z, value), function(same, value)
            assert torch.allclose(got, wanted, rtol=1e-12)
            got.backward(), wanted.backward()
            assert torch.allclose(z.grad, same.grad, rtol=1e-12)
        assert counter.frame_count <= 2  # the first value, and all others


def test_fake_tensors_and_tracers() -> None:
    from functorch.compile import aot_function
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    for function in CALLS.values():
        with FakeTensorMode(allow_non_fake_inputs=True):
            z = torch.empty(N, C, dtype=torch.float64, requires_grad=True)
            loss = function(z)
            loss.backward()
            assert loss.shape == ()
            assert z.grad.shape == (N, C)
        graph = make_fx(lambda z: torch.autograd.grad(function(z), z)[0])(Z.clone().requires_grad_())  # noqa: B023
        assert torch.allclose(graph(V.clone().requires_grad_()), reverse(function, V), rtol=1e-9)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}):
        traced = aot_function(lambda z, y, shift: CE(z, y, shift=shift, **options), lambda graph, _: graph)  # noqa: B023
        z, shift = Z.clone().requires_grad_(), SHIFT.clone().requires_grad_()
        traced(z, Y, shift).backward()
        wanted = torch.autograd.grad(CE(z, Y, shift=shift, **options), (z, shift))
        assert torch.allclose(z.grad, wanted[0], rtol=1e-9)
        assert torch.allclose(shift.grad, wanted[1], rtol=1e-9)


@pytest.mark.parametrize("name", ["plain", "mixed", "none", "announced"])
def test_compiled_autograd(name) -> None:
    """An eager forward, its backward compiled without a graph break."""
    torch._dynamo.reset()
    z = Z.clone().requires_grad_()
    compiler = torch.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        z.grad = None
        loss = CALLS[name](z) * 3
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
        assert torch.allclose(z.grad, 3 * reverse(CALLS[name], Z), rtol=1e-9)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(D, C)
        self.loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.linear(x), y)


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_trainable(strict) -> None:
    model, x = Model(), torch.randn(N, D)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    program = torch.export.export(model, (x, Y), dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    loss = exported(x, Y)
    assert loss.requires_grad
    loss.backward()
    model(x, Y).backward()
    theirs = dict(exported.named_parameters())
    assert torch.allclose(theirs["linear.weight"].grad, model.linear.weight.grad, rtol=1e-5)
    more = torch.randn(3 * N, D)
    assert torch.allclose(exported(more, Y.repeat(3)), model(more, Y.repeat(3)))  # the batch stays dynamic


def test_export_of_a_joint_graph() -> None:
    from torch.export.experimental import _export_forward_backward

    model, x = Model(), torch.randn(N, D)
    joint = _export_forward_backward(torch.export.export(model, (x, Y), strict=True))
    model(x, Y).backward()
    given = {"x": x, "y": Y}
    inputs = [
        given.get(spec.arg.name) if spec.target is None else joint.state_dict[spec.target].detach()
        for spec in joint.graph_signature.input_specs
    ]
    outputs = dict(zip((spec.target for spec in joint.graph_signature.output_specs), joint.graph_module(*inputs)))
    assert torch.allclose(outputs["linear.weight"], model.linear.weight.grad, rtol=1e-5)
    assert torch.allclose(outputs["linear.bias"], model.linear.bias.grad, rtol=1e-5)


# ---- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensor_hooks_see_what_is_kept(name) -> None:
    seen = []
    z = Z.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t.clone(), lambda t: t):
        loss = CALLS[name](z * 1)
    assert seen
    loss.backward()
    assert torch.allclose(z.grad, reverse(CALLS[name], Z), rtol=1e-9)
    with torch.autograd.graph.save_on_cpu():
        loss = CALLS[name](z * 1)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.allclose(again, z.grad, rtol=1e-9)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("form", ["op", "head"])
def test_activation_checkpointing_drops_the_logits(form) -> None:
    """After forward nothing of the 64 MiB of logits is kept, neither they nor their gradient."""
    import ctypes

    from torch.utils.checkpoint import checkpoint

    rows, classes = 1024, 16384
    x = torch.randn(rows, 16, requires_grad=True)
    w = torch.randn(classes, 16, requires_grad=True)
    y = torch.arange(rows)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return CE(x @ w.t(), y) if form == "op" else HEAD(x, w, y, chunk_rows=0)

    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    checkpoint(step, x, w, use_reentrant=False).backward()  # warm
    wanted, x.grad, w.grad = (x.grad.clone(), w.grad.clone()), None, None
    trim(0)
    before = resident()
    loss = checkpoint(step, x, w, use_reentrant=False)
    trim(0)
    assert resident() - before < 24 << 20
    loss.backward()
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(w.grad, wanted[1])


# ---- other tensors -----------------------------------------------------------------------------------------------------


class Wrapped(Tensor):
    """A wrapper subclass without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(value):
            return value.inner if isinstance(value, Wrapped) else value

        tree = torch.utils._pytree.tree_map
        return function(*tree(plain, args), **tree(plain, kwargs or {}))


def test_every_argument_is_looked_at() -> None:
    shift, scale = SHIFT, torch.linspace(0.5, 1.5, C, dtype=torch.float64)
    given = {"shift": shift, "scale": scale, "margin": scale, "row_scale": scale, "weight": scale}
    exact = CE(Z, (Y, Y2, LAM), **given)
    for name, table in given.items():
        assert torch.allclose(CE(Z, (Y, Y2, LAM), **{**given, name: Wrapped(table)}), exact), name
        negative = torch._neg_view(-table)
        assert negative.is_neg()
        assert torch.allclose(CE(Z, (Y, Y2, LAM), **{**given, name: negative}), exact), name
    assert torch.allclose(CE(Wrapped(Z), (Y, Y2, LAM), **given), exact)
    assert torch.allclose(CE(torch._neg_view(-Z), (Y, Y2, LAM), **given), exact)
    imaginary = torch.complex(torch.zeros_like(Z), Z).conj().imag  # a negated view that public functions make
    assert torch.allclose(CE(imaginary, Y), CE(-Z, Y))
    assert torch.allclose(CE(Z, (Wrapped(Y), Y2, LAM), **given), exact)
    assert torch.allclose(CE(Z, (Y, Wrapped(Y2), LAM), **given), exact)
    assert torch.allclose(CE(Z, (Y, Y2, Wrapped(LAM)), **given), exact)
    assert torch.allclose(CE(Z, (Y, Y2, torch._neg_view(-LAM)), **given), exact)
    x, w, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (C, D), (C,)))
    exact = HEAD(x, w, Y, bias=b, shift=shift)
    for call in (
        lambda: HEAD(Wrapped(x), w, Y, bias=b, shift=shift),
        lambda: HEAD(x, torch._neg_view(-w), Y, bias=b, shift=shift),
        lambda: HEAD(x, w, Y, bias=Wrapped(b), shift=Wrapped(shift)),
        lambda: HEAD(x, w, Wrapped(Y), bias=b, shift=shift, chunk_rows=2),
    ):
        assert torch.allclose(call(), exact)


def test_tensors_without_memory_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"logits is Tensor of shape \(6, 5\) without memory"):
        CE(torch._efficientzerotensor(N, C), Y)
    freed = torch.zeros(C, dtype=torch.float64)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shift is Tensor of shape \(5,\) without memory"):
        CE(Z, Y, shift=freed)
    with pytest.raises(TypeError, match="logits has layout torch.sparse_coo"):
        CE(Z.to_sparse(), Y)
    with pytest.raises(TypeError, match="weight has layout torch.sparse_coo"):
        CE(Z, Y, weight=torch.ones(C, dtype=torch.float64).to_sparse())
    meta = CE(Z.to("meta"), Y.to("meta"))
    assert meta.device.type == "meta"
    for bad in (lambda: CE(Z, Y.to("meta")), lambda: CE(Z, Y, shift=SHIFT.to("meta"))):
        with pytest.raises(ValueError, match="both must be on one device"):
            bad()


def test_a_device_context_changes_no_call() -> None:
    exact = CE(Z, Y, shift=SHIFT)
    big = torch.randn(64, 5000)
    labels = torch.arange(64)
    wanted = CE(big, labels)
    with torch.device("meta"):
        assert torch.equal(CE(Z, Y, shift=SHIFT), exact)
        assert torch.equal(CE(big, labels), wanted)  # with scratch from torch
        leaf = big.clone().requires_grad_()
        CE(leaf, labels, grad_scale=2.0).backward()
        assert leaf.grad.device.type == "cpu"
        learned = torch.zeros(5000, device="cpu", requires_grad=True)
        CE(big, labels, scale=torch.ones(5000, device="cpu", requires_grad=True), margin=learned).backward()
        assert learned.grad.abs().max() > 0


# ---- exceptions and imports --------------------------------------------------------------------------------------------


def test_exceptions_are_caught_as_torchs_are() -> None:
    """Whatever torch raises for an input, an ``except`` clause for it catches ours too."""
    z = torch.randn(4, 5)
    bad = {
        "label out of range": (z, torch.tensor([0, 1, 2, 5])),
        "negative label": (z, torch.tensor([0, -1, 2, 3])),
        "too few labels": (z, torch.tensor([0, 1, 2])),
        "labels of two dimensions": (z, torch.zeros(4, 1, dtype=torch.int64)),
        "labels of another type": (z, torch.zeros(4, dtype=torch.bool)),
        "probabilities of another shape": (z, torch.rand(4, 4)),
        "integer logits": (torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)),
        "no dimension": (torch.tensor(1.0), torch.tensor(0)),
        "no class": (torch.randn(4, 0), torch.zeros(4, dtype=torch.int64)),
        "weights of another length": (z, torch.tensor([0, 1, 2, 3]), torch.ones(4)),
        "integer weights": (z, torch.tensor([0, 1, 2, 3]), torch.ones(5, dtype=torch.int64)),
        "probabilities of integers": (z, torch.zeros(4, 5, dtype=torch.int64)),
    }
    for what, (logits, target, *weight) in bad.items():
        options = {"weight": weight[0]} if weight else {}
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.cross_entropy(logits, target, **options)
        with pytest.raises((ValueError, TypeError)) as ours:
            CE(logits, target, **options)
        kinds = [kind for kind in (IndexError, RuntimeError, ValueError, TypeError) if isinstance(theirs.value, kind)]
        assert kinds, what
        assert any(isinstance(ours.value, kind) for kind in kinds), (what, theirs.value, ours.value)
    with pytest.raises(RuntimeError):
        CE(z, torch.tensor([0, 1, 2, 3]), reduction="median")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_class_at_all_is_as_torch(reduction) -> None:
    logits, probabilities = torch.randn(5, 0), torch.rand(5, 0)
    theirs = F.cross_entropy(logits, probabilities, reduction=reduction)
    assert torch.allclose(CE(logits, probabilities, reduction=reduction), theirs, equal_nan=True)
    empty = torch.zeros(0, dtype=torch.int64)
    theirs = F.cross_entropy(logits[:0], empty, reduction=reduction)
    assert torch.allclose(CE(logits[:0], empty, reduction=reduction), theirs, equal_nan=True)


def test_the_import_is_light(tmp_path: Path) -> None:
    program = (
        "import os, sys, torch; before = dict(os.environ); known = set(sys.modules); import ltkernels;"
        "assert dict(os.environ) == before, set(os.environ) ^ set(before);"
        "new = set(sys.modules) - known; heavy = [m for m in new if m.startswith(('torch._dynamo', 'torch._inductor', 'sympy', 'onnx'))];"
        "assert not heavy, heavy; print(len(new))"
    )
    # From another folder: here `python -c` would find the sources, which have no compiled module unless installed in place.
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 120


def test_a_seed_is_not_drawn_by_a_question() -> None:
    loss = ltk.nn.SoftmaxEqualization(COUNTS)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ltk.explain(loss, Z, Y)
    assert torch.equal(torch.get_rng_state(), state)
