"""Promise: the vectors of a loss are learned with exact gradients, in the kernel's own pass, and cost nothing where they are not."""

from __future__ import annotations

import math

import contract
import oracle
import pytest
import torch

import ltkernels as ltk
from ltkernels._call import Call

CE = ltk.functional.adjusted_cross_entropy
HEAD = ltk.functional.linear_adjusted_cross_entropy
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One class, lanes and their tails, a register and one more, several slices of rows, blocks of columns and their tails.
SHAPES = [(1, 1), (5, 2), (40, 10), (1100, 7), (33, 31), (9, 33), (70, 365), (300, 97), (11, 2051), (3, 4099)]


def tables_of(classes: int, dtype: torch.dtype = torch.float64, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    low = {"shift": -2.0, "scale": 0.5, "margin": 0.1, "row_scale": 0.6, "weight": 0.2}
    real = torch.float64 if dtype == torch.float64 else torch.float32
    found = {name: (low[name] + 1.5 * torch.rand(classes, generator=generator)).to(real) for name in oracle.TABLES}
    return {name: found[name] for name in names or oracle.TABLES}


def batch(rows: int, classes: int, dtype: torch.dtype, mixed: bool = False) -> tuple[torch.Tensor, object]:
    generator = torch.Generator().manual_seed(rows)
    z = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3).to(dtype)
    first, second = torch.randint(0, classes, (2, rows), generator=generator)
    first[2::5] = -100
    if not mixed:
        return z, first
    return z, (first, second, torch.rand(rows, generator=generator, dtype=torch.float64).to(torch.float32))


def expected_gradients(z, target, tables, reduction="mean", upstream=1.0, **options):
    """{table: (gradient, sum of its terms' absolute values)} by the formulas of csrc/README.md from the oracle's rows, and the rows'
    largest |a|. All in float64, one label at a time; scale and row_scale not 0."""
    rows, classes = z.shape
    labels = [(target, torch.ones(rows, dtype=torch.float64))]
    if isinstance(target, tuple):
        lam = target[2].double()
        labels = [(target[0], lam), (torch.where(target[0] == -100, -100, target[1]), 1 - lam)]
    tables = {name: table.detach().double() for name, table in tables.items()}
    z, one = z.detach().double(), torch.ones(classes, dtype=torch.float64)
    beta, sigma, alpha = (tables.get(name, one) for name in ("scale", "row_scale", "weight"))
    u = beta * z + tables.get("shift", 0 * one)
    valid = labels[0][0] != -100
    denominator = {"sum": 1.0, "none": 1.0, "batch_mean": float(valid.sum())}.get(reduction)
    if denominator is None:
        denominator = sum(float((share * alpha[y.clamp_min(0)])[valid].sum()) for y, share in labels)
    coef = torch.as_tensor(upstream, dtype=torch.float64).expand(rows) / denominator
    total = 0.0
    sums = {
        name: (torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64))
        for name in oracle.TABLES
    }

    def add(name, index, terms):
        for at, each in zip(sums[name], (terms, terms.abs())):
            at.index_add_(0, index, each) if index is not None else at.add_(each.sum(0))

    for y, share in labels:
        loss, grad, size = oracle.adjusted_cross_entropy(
            z, y, reduction="none", upstream=coef * share, **tables, **options
        )
        plain, _, _ = oracle.adjusted_cross_entropy(z, y, reduction="none", **{**tables, "weight": one}, **options)
        at = y[valid]
        h, own = (grad / beta)[valid], torch.arange(len(at))
        add("shift", None, h)
        add("scale", None, h * z[valid])
        add("margin", at, -h[own, at])
        apart = u[valid] - u[valid][own, at][:, None] + tables.get("margin", 0 * one)[at][:, None]
        apart[own, at] = 0.0
        along = h * apart / sigma[at][:, None]
        sums["row_scale"][0].index_add_(0, at, along.sum(1))
        sums["row_scale"][1].index_add_(0, at, (h.abs() * (u[valid].abs() + apart.abs()) / sigma[at][:, None]).sum(1))
        add("weight", at, (coef * share * plain)[valid])
        total = total + float((loss * share * coef)[valid].sum())
    if reduction == "mean":  # sum alpha phi / sum alpha: the weights are below too
        for y, share in labels:
            add("weight", y[valid], -(total * coef * share)[valid])
    return sums, float(size.max())


def gradients(z, target, tables, **options):
    """(loss, gradient of the logits, {table: gradient}); every table is learned."""
    leaf = z.detach().requires_grad_()
    learned = {name: table.detach().requires_grad_() for name, table in tables.items()}
    upstream = options.pop("upstream", None)
    loss = CE(leaf, target, **learned, **options)
    grad, *found = torch.autograd.grad(loss, [leaf, *learned.values()], upstream)
    return loss.detach(), grad, dict(zip(learned, found))


def check(z, target, tables, cond: float = 1.0, **options) -> None:
    sums, size = expected_gradients(z, target, tables, **options)
    _, _, found = gradients(z, target, tables, **options)
    for name, grad in found.items():
        oracle.assert_sums(grad, *sums[name], size, cond)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype) -> None:
    z, y = batch(*shape, dtype)
    tables = tables_of(shape[1], dtype)
    assert (
        ltk.explain(CE, z, y, **{name: table.requires_grad_() for name, table in tables.items()}).backend[:4] == "cpu-"
    )
    check(z, y, tables, reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("classes", [7, 65])
def test_reductions(classes, mixed, reduction) -> None:
    z, target = batch(23, classes, torch.float32, mixed)
    upstream = torch.linspace(-1, 2, 23) if reduction == "none" else 1.0
    options = {"upstream": upstream} if reduction == "none" else {}
    cond = 2.0 if mixed else 1.0  # the labels' terms have opposite signs at each other's place
    check(z, target, tables_of(classes, torch.float32), cond, reduction=reduction, **options)
    check(z, target, tables_of(classes, torch.float32), cond, reduction=reduction, focal_gamma=1.5, **options)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("classes", [7, 65])
def test_label_smoothing(classes, mixed) -> None:
    z, target = batch(23, classes, torch.float32, mixed)
    names = ("shift", "scale", "margin", "row_scale")  # the weight is the torch reference's
    # G P_j - c_j is a difference of two numbers of one size.
    check(z, target, tables_of(classes, torch.float32, *names), 4.0, label_smoothing=0.2)
    weight = tables_of(classes, torch.float32, "weight")["weight"].requires_grad_()
    explanation = ltk.explain(CE, z, target, weight=weight, label_smoothing=0.2)
    assert explanation == ("torch", "gradient with respect to the class weight under label smoothing")


@pytest.mark.parametrize("name", oracle.TABLES)
def test_each_table_alone(name) -> None:
    """Whatever else is wanted changes no bit, and the logits' gradient has the bits it has without learned vectors."""
    for classes in (10, 130):
        z, y = batch(60, classes, torch.float32)
        tables = tables_of(classes, torch.float32)
        loss, grad, found = gradients(z, y, tables)
        fixed = {key: table for key, table in tables.items() if key != name}
        one = tables[name].clone().requires_grad_()
        alone = CE(z, y, **fixed, **{name: one})
        assert torch.equal(torch.autograd.grad(alone, one)[0], found[name])
        leaf = z.clone().requires_grad_()
        plain = CE(leaf, y, **tables)
        assert torch.equal(plain, loss)
        assert torch.equal(alone, loss)
        assert torch.equal(torch.autograd.grad(plain, leaf)[0], grad)


@pytest.mark.parametrize("name", oracle.TABLES)
def test_gradcheck(name) -> None:
    for classes in (4, 37):
        z, y = batch(9, classes, torch.float64)
        tables = tables_of(classes)
        for reduction in ("mean", "none"):
            options = {"focal_gamma": 1.5, "reduction": reduction, "label_smoothing": 0.0 if name == "weight" else 0.1}

            def loss(table, z=z, y=y, tables=tables, options=options):
                return CE(z, y, **{**tables, name: table}, **options)

            assert torch.autograd.gradcheck(loss, tables[name].requires_grad_())
            assert torch.autograd.gradgradcheck(loss, tables[name].requires_grad_())


def test_scale_and_row_scale_of_zero() -> None:
    """A division of the logits' gradient would give NaN."""
    z, y = batch(9, 5, torch.float64)
    for classes in (5, 40):
        z, y = batch(9, classes, torch.float64)
        for name in ("scale", "row_scale"):
            table = tables_of(classes)[name]
            table[::2] = 0.0
            others = tables_of(classes, torch.float64, "shift", "margin")
            assert torch.autograd.gradcheck(
                lambda t, n=name, o=others, z=z, y=y: CE(z, y, **{n: t}, **o), table.requires_grad_()
            )


@pytest.mark.parametrize("classes", [5, 40, 2100])
def test_masked_classes_learn_nothing(classes) -> None:
    """-inf in a logit or in the shift: probability 0 and gradient 0, not 0 times infinity."""
    z, y = torch.randn(6, classes), torch.tensor([0, 1, -100, 1, 2, 2])
    z[:, 3] = -math.inf
    tables = tables_of(classes, torch.float32)
    tables["shift"][4] = -math.inf
    z[2] = math.nan  # ignored
    _, _, found = gradients(z, y, tables)
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        assert torch.equal(grad[3:5], torch.zeros(2)), name
        assert grad.abs().max() > 0, name


def test_layouts() -> None:
    """Views with any strides, images, one sample: the sums of the same rows."""
    z, y = batch(24, 10, torch.float32)
    tables = tables_of(10, torch.float32)
    _, _, truth = gradients(z, y, tables)
    wide = torch.empty(24, 30)[:, ::3].copy_(z)
    for view in (z.t().contiguous().t(), wide, torch.cat([z, z], 1)[:, :10]):
        for name, grad in gradients(view, y, tables)[2].items():
            assert torch.equal(grad, truth[name])
    image = z.reshape(2, 3, 4, 10).movedim(3, 1)
    for name, grad in gradients(image, y.reshape(2, 3, 4), tables)[2].items():
        assert torch.equal(grad, truth[name])
    single = gradients(z[0], y[0], tables)[2]
    for name, grad in gradients(z[:1], y[:1], tables)[2].items():
        assert torch.equal(grad, single[name])
    rows = torch.randn(10).expand(24, 10)
    for name, grad in gradients(rows, y, tables)[2].items():
        assert torch.equal(grad, gradients(rows.contiguous(), y, tables)[2][name])


@pytest.mark.parametrize("shape", [(0, 5), (0, 300), (4, 5), (4, 300)], ids=str)
def test_nothing_to_learn_from(shape) -> None:
    """No rows, or ignored ones alone."""
    z, y = torch.full(shape, math.nan), torch.full(shape[:1], -100)
    for reduction in ("mean", "batch_mean", "sum"):
        _, grad, found = gradients(z, y, tables_of(shape[1], torch.float32), reduction=reduction)
        assert torch.equal(grad, torch.zeros(shape))
        assert all(torch.equal(each, torch.zeros(shape[1])) for each in found.values())


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        for shape in ((2000, 9), (500, 300), (40, 5000)):
            z, target = batch(*shape, torch.float32, mixed=shape[0] == 500)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(gradients(z, target, tables_of(shape[1], torch.float32))[2])
            for name in oracle.TABLES:
                assert all(torch.equal(each[name], results[0][name]) for each in results)
    finally:
        torch.set_num_threads(before)


def test_backward_contract() -> None:
    """Two backwards with other upstreams, gradients that the caller edits, accumulation, clipping, in-place."""
    z, y = batch(12, 9, torch.float32)
    loss = CE(
        z.requires_grad_(), y, **(tables := {k: v.requires_grad_() for k, v in tables_of(9, torch.float32).items()})
    )
    inputs = [z, *tables.values()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [each.clone() for each in first]
    for each in first:
        each.mul_(10)
    third = torch.autograd.grad(loss, inputs, torch.tensor(3.0))
    for each, three in zip(kept, third):
        assert torch.equal(each * 3, three)
    for _ in range(2):
        CE(z, y, **tables).backward()
    for each, once in zip(inputs, kept):
        assert torch.equal(each.grad, once * 2)
    torch.nn.utils.clip_grad_norm_(inputs, 1e-3)
    torch.optim.SGD(inputs, lr=0.1).zero_grad(set_to_none=False)
    assert not any(each.grad.any() for each in inputs)

    doubled = z * 1.0
    loss = CE(doubled, y, inplace=True, **tables)
    assert doubled._version == 1
    for each, once in zip(torch.autograd.grad(loss, inputs, torch.tensor(0.5)), kept):
        assert torch.equal(each, once * 0.5)
    with pytest.raises(RuntimeError, match="double backward needs the logits"):
        torch.autograd.grad(CE(z * 1.0, y, inplace=True, **tables), inputs, create_graph=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(reduction) -> None:
    torch._dynamo.reset()
    loss = ltk.nn.KPS([300, 100, 30, 10, 3], reduction=reduction, learnable=("scale", "shift", "margin"))
    compiled = torch.compile(lambda z, y: loss(z * 2, y), fullgraph=True, backend="aot_eager")
    z, y = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, -100, 3, 4, 4])
    results = []
    for call in (loss, compiled):
        value = call(z * 2, y) if call is loss else call(z, y)
        results.append((value, *torch.autograd.grad(value.sum() * 0.37, [z, *loss.parameters()])))
    for eager, traced in zip(*results):
        assert torch.equal(eager, traced)


def test_autocast() -> None:
    features, weight = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True)
    loss = ltk.nn.AdjustedCrossEntropy(ltk.adjustments.Adjustment(scale=torch.ones(9)), learnable=("scale",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = features @ weight.t()
        value = loss(logits, torch.arange(6))
    value.backward()
    assert logits.dtype == torch.bfloat16
    assert loss.scale.grad.dtype == torch.float32
    sums, size = expected_gradients(logits, torch.arange(6), {"scale": loss.scale})
    oracle.assert_sums(loss.scale.grad, *sums["scale"], size)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head(reduction, biased, normalize) -> None:
    """The chunks' gradients are those of the held logits, for each table alone and for all."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, 6, generator=generator, dtype=torch.float64, requires_grad=True) for n in (11, 14))
    bias = torch.randn(14, generator=generator, dtype=torch.float64, requires_grad=True) if biased else None
    y = torch.randint(0, 14, (11,), generator=generator)
    y[3] = -100
    tables = tables_of(14)
    weight = tables.pop("weight")
    options = {"bias": bias, "normalize": normalize, "reduction": reduction, "class_weight": weight}
    for names in (*((name,) for name in tables), tuple(tables)):
        learned = {name: table.clone().requires_grad_(name in names) for name, table in tables.items()}
        inputs = [learned[name] for name in names] + ([x, w] if len(names) > 1 else []) + ([bias] if biased else [])
        results = []
        for chunk_rows in (0, 4):
            loss = HEAD(x, w, y, chunk_rows=chunk_rows, **learned, **options)
            results.append([loss, *torch.autograd.grad(loss.sum() * 0.37, inputs, retain_graph=True)])
            results[-1] += torch.autograd.grad(loss.sum(), inputs)
        for held, chunked in zip(*results):
            assert torch.allclose(chunked, held, rtol=1e-10, atol=1e-13)
            assert held.abs().max() > 0
    assert torch.autograd.gradgradcheck(
        lambda t: HEAD(x.detach(), w.detach(), y, chunk_rows=4, normalize=normalize, scale=t),
        tables["scale"].requires_grad_(),
    )


def test_head_explains() -> None:
    x, w, y = torch.randn(300, 8), torch.randn(5000, 8), torch.zeros(300, dtype=torch.int64)
    table = torch.ones(5000, requires_grad=True)
    explanation = ltk.explain(HEAD, x, w, y, shift=table)
    assert explanation.backend.startswith("cpu-")
    assert "logits in chunks" in explanation.reason
    assert "class_weight needs the loss of all rows" in ltk.explain(HEAD, x, w, y, class_weight=table).reason
    with pytest.raises(ValueError, match="chunk_rows=4 is not possible: the gradient of class_weight"):
        HEAD(x, w, y, class_weight=table, chunk_rows=4)


def test_closed_forms_and_explanations() -> None:
    """What the kernel does not do is the torch reference's, and says so."""
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 2])
    weight = torch.ones(5, requires_grad=True)
    closed = "gradient with respect to a table of a closed form"
    seesaw = {**ltk.adjustments.seesaw([5, 4, 3, 2, 1])._asdict(), "weight": weight}
    assert ltk.explain(CE, z, y, **seesaw) == ("torch", closed)
    assert ltk.explain(ltk.nn.EQL([5, 4, 3, 2, 1], weight=weight, learnable=("weight",)), z, y) == ("torch", closed)
    assert CE(z, y, **seesaw).requires_grad
    with torch.no_grad():
        assert ltk.explain(CE, z, y, **seesaw).backend.startswith("cpu-")
    assert ltk.explain(CE, z, y, shift=weight, backend="torch") == ("torch", "asked for")
    assert "CPU kernel alone" in ltk.explain(CE, z.to("meta"), y.to("meta"), shift=weight.to("meta")).reason


@pytest.mark.parametrize("name", sorted(set(ltk.LOSSES) - {"seesaw"}))
def test_every_module_learns(name) -> None:
    """The Parameters start at the loss' own tables, get the reference's gradient and lower the loss."""
    record, counts = ltk.LOSSES[name], [300, 100, 30, 10, 3]
    options = contract.seeded(name)
    fixed = record.make(counts, **options)
    fields = record.adjustment(counts, **options)
    own = [table for table in oracle.TABLES if getattr(fields, table, None) is not None]
    if not own:
        if record.first != "class_counts" and name != "eql_v2":  # whose form takes a shift
            with pytest.raises(ValueError, match="learnable names|does not have"):
                record.make(counts, learnable=("shift",))
        return
    loss = record.make(counts, learnable=own, **options)
    assert set(dict(loss.named_parameters())) == set(own)
    assert set(loss.state_dict()) == set(fixed.state_dict())
    z, y = torch.randn(40, 5).tanh(), torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loss(z, y), fixed(z, y), rtol=1e-6)
    reference = record.make(counts, learnable=own, backend="torch", **options)
    for module in (loss, reference):
        module(z, y).backward()
    for ours, theirs in zip(loss.parameters(), reference.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    before = float(loss(z, y).detach())
    with torch.no_grad():
        norm = sum(float(p.grad.square().sum()) for p in loss.parameters())
        for parameter in loss.parameters():
            parameter -= 1e-2 * min(1.0, before / max(norm, 1e-12)) * parameter.grad
    assert float(loss(z, y).detach()) < before


def test_modules_keep_their_parameters() -> None:
    counts = [50, 20, 5]
    loss = ltk.nn.LogitAdjustedCrossEntropy(counts, learnable=("shift", "scale"))
    assert "learnable=[shift, scale]" in repr(loss)
    assert loss.half().shift.dtype == torch.float32
    assert isinstance(loss.double().scale, torch.nn.Parameter)
    with torch.no_grad():
        loss.shift += 1.0
    other = ltk.nn.LogitAdjustedCrossEntropy(counts, learnable=("shift", "scale"))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.shift, loss.shift)
    fixed = ltk.nn.AdjustedCrossEntropy(ltk.adjustments.Adjustment(shift=torch.zeros(3)), class_counts=counts)
    fixed.load_state_dict({k: v for k, v in loss.state_dict().items() if k != "scale"})
    assert torch.equal(fixed.shift, loss.shift)
    features, weight = torch.randn(6, 4), torch.randn(3, 4)
    loss.from_features(features, weight, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert loss.scale.grad.abs().max() > 0
    with pytest.raises(ValueError, match="loss learns its scale"):
        ltk.schedules.GradientAdjustment(ltk.nn.KPS(counts, learnable=("scale",)), 1)


def test_bad_arguments() -> None:
    make = ltk.nn.AdjustedCrossEntropy
    with pytest.raises(ValueError, match="learnable is 'shift'"):
        make(class_counts=[1, 2], learnable="shift")
    with pytest.raises(ValueError, match=r"learnable is \('prior',\)"):
        make(class_counts=[1, 2], learnable=("prior",))
    with pytest.raises(ValueError, match="nothing tells the number of classes"):
        make(learnable=("scale",))
    with pytest.raises(ValueError, match=r"shift\[1\] is -inf; a learnable vector must start finite"):
        ltk.nn.LogitAdjustedCrossEntropy([3, 0], empty="ignore", learnable=("shift",))
    with pytest.raises(ValueError, match="closed form 'sigmoid' does not have"):
        ltk.nn.EQL([3, 2], learnable=("margin",))
    bad = torch.tensor([1.0, math.nan], requires_grad=True)
    with pytest.raises(ValueError, match=r"scale\[1\] is nan"):
        CE(torch.randn(2, 2), torch.tensor([0, 1]), scale=bad)
    with pytest.raises(ValueError, match="label 7 in row 1"):
        CE(torch.randn(2, 2), torch.tensor([0, 7]), scale=torch.ones(2, requires_grad=True))


def test_a_temperature_is_learned() -> None:
    """One temperature for all classes, through expand: a model that is three times too sure of itself is told so."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 6, generator=generator)
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    log_t = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = CE(3 * z, y, scale=torch.exp(-log_t).expand(6))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert log_t.detach().exp().item() == pytest.approx(3.0, rel=0.1)


def test_opcheck() -> None:
    y = torch.tensor([0, 2, -100, 4])
    tables = tables_of(5, torch.float32)
    call = Call(y).with_tables(tuple(tables.values()))
    some, every = [False, True, False, False, True], [True] * 5
    for z in (torch.randn(4, 5), torch.randn(5, 4).t(), torch.randn(4, 9)[:, 2:7].bfloat16()):
        for reduction, need_grad, needs in ((0, True, some), (1, False, some), (1, True, every)):
            operands = call._replace(reduction=reduction)
            torch.library.opcheck(torch.ops.ltkernels.adjusted_ce.default, (z, *operands, need_grad, needs))
        learned = call._replace(scale=tables["scale"].clone().requires_grad_())  # keeps the gradient
        torch.library.opcheck(torch.ops.ltkernels.adjusted_ce.default, (z, *learned, False, [False] * 5))
        torch.library.opcheck(torch.ops.ltkernels.adjusted_ce_.default, (z.clone(), *call, every))
