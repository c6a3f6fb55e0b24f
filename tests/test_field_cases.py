"""Promise: the cases that the field's own packages test their losses with hold for ours: torch's test_nn, OpInfo and module inputs, and,
written anew with the same intent, Liger's cross-entropy, mmpretrain's Seesaw loss, pytorch-metric-learning's CosFace and ArcFace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
HEAD = ltk.functional.linear_adjusted_cross_entropy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(actual: Tensor, expected: Tensor, leaves: list[Tensor], rtol: float = 1e-12) -> None:
    """Value, shape and gradients."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-14, equal_nan=True)
    upstream = torch.rand(expected.shape, generator=generator(9), dtype=expected.dtype)
    pairs = zip(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream, retain_graph=True),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=100 * rtol, atol=1e-14, equal_nan=True)


# ---- torch ------------------------------------------------------------------------------------------------------------


def test_opinfo_of_linear_cross_entropy() -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    infos = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]
    if not infos:
        pytest.skip("this torch has no linear_cross_entropy")
    compared = 0
    for info in infos:
        for case in info.sample_inputs("cpu", torch.float64, requires_grad=True):
            x, (weight, target) = case.input, case.args
            if weight.dim() != 2:  # classes by positions: no classifier of (..., D) features
                with pytest.raises(ValueError, match="weight has shape"):
                    HEAD(x, weight, target)
                continue
            theirs = {name: value for name, value in case.kwargs.items() if name != "options"}
            expected = F.linear_cross_entropy(x, weight, target, **theirs)
            ours = {"linear_bias": "bias", "weight": "class_weight"}
            options = {ours.get(name, name): value for name, value in theirs.items()}
            if options.get("ignore_index", 0) is None:
                del options["ignore_index"]
            leaves = [leaf for leaf in (x, weight, options.get("bias")) if leaf is not None and leaf.requires_grad]
            chunks = (None,) if target.is_floating_point() else (None, 2)
            for chunk_rows in chunks:
                same(HEAD(x, weight, target, chunk_rows=chunk_rows, **options), expected, leaves, 1e-10)
            compared += 1
    assert compared >= 60, compared


def test_module_inputs_of_cross_entropy() -> None:
    from torch.testing._internal.common_modules import module_db

    (info,) = [each for each in module_db if each.module_cls is torch.nn.CrossEntropyLoss]
    compared = 0
    for case in info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True):
        z, y = case.forward_input.args
        options = case.constructor_input.kwargs
        loss, theirs = ltk.nn.CrossEntropy(**options), torch.nn.CrossEntropyLoss(**options)
        same(loss(z, y), theirs(z, y), [z])
        compared += 1
    assert compared >= 60


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothed_indices_are_smoothed_probabilities(reduction: str, weighted: bool) -> None:
    """test_nn: label_smoothing_consistent_index_target_and_probs, label_smoothing_with_probs, one_hot_target."""
    z = torch.randn(10, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 4, (10,), generator=generator(1))
    weight = torch.tensor([1.0, 2.5, 0.2, 4.0], dtype=torch.float64) if weighted else None
    one_hot = F.one_hot(y, 4).double()
    said = {"weight": weight, "reduction": reduction}
    for smoothing in (0.0, 0.2, 1.0):
        probabilities = one_hot * (1 - smoothing) + smoothing / 4
        of_indices = F.cross_entropy(z, y, label_smoothing=smoothing, **said)
        of_rows = F.cross_entropy(z, one_hot, label_smoothing=smoothing, **said)
        same(CE(z, y, label_smoothing=smoothing, **said), of_indices, [z])
        same(CE(z, one_hot, label_smoothing=smoothing, **said), of_rows, [z])
        same(CE(z, probabilities, **said), of_rows, [z])
        # A weighted mean of indices divides by their weights, one of probabilities by the rows.
        assert torch.allclose(of_indices, of_rows) is not (weighted and reduction == "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_rows_that_are_not_there(reduction: str) -> None:
    """test_nn: label_smoothing_weight_ignore_indices; Liger: ignore_index within and without the classes."""
    z = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    weight = torch.tensor([0.3, 0.6], dtype=torch.float64)
    for ignored in (-100, 1, 0, -300):
        y = torch.tensor([0, ignored, 1 if ignored == 0 else 0])
        if ignored == 0:
            y = torch.tensor([1, 0, 1])
        keep = y != ignored
        said = {"weight": weight, "label_smoothing": 0.4, "reduction": reduction}
        whole, part = CE(z, y, ignore_index=ignored, **said), CE(z[keep], y[keep], **said)
        if reduction == "none":
            assert whole[~keep].eq(0).all()
            whole = whole[keep]
        torch.testing.assert_close(whole, part, rtol=1e-14, atol=0.0)


def test_nothing_to_divide_by() -> None:
    """test_nn: total_weight_is_zero, all_ignored, empty_tensor_reduction."""
    z, y = torch.randn(3, 5, generator=generator()), torch.tensor([1, 2, 4])
    for options in ({"weight": torch.zeros(5)}, {}):
        labels = torch.full_like(y, -100) if not options else y
        assert CE(z, labels, **options).isnan()
        assert CE(z, labels, reduction="sum", **options).item() == 0.0
        assert CE(z, labels, reduction="none", **options).tolist() == [0.0] * 3
    assert CE(z[:0], y[:0]).isnan()
    assert CE(z[:0], y[:0], reduction="sum").item() == 0.0
    assert CE(z[:0], y[:0], reduction="none").shape == (0,)


def test_what_torch_refuses_is_refused_to_the_same_except_clauses() -> None:
    """test_nn: invalid dimensions, mismatched batches, weights of another length, labels out of bounds, label smoothing out of range."""
    z, y = torch.randn(3, 5, generator=generator()), torch.tensor([1, 2, 4])
    wrong = [
        (z, y[:, None], {}), (z, y[:2], {}), (z, torch.tensor([1, 2, 5]), {}), (z, torch.tensor([1, -1, 2]), {}), (z[..., None], y, {}),
        (z, y, {"weight": torch.ones(4)}), (z, y, {"weight": torch.ones(1, 5)}), (z, y, {"label_smoothing": 1.2}),
        (z, y, {"reduction": "total"}), (z.long(), y, {}),
    ]  # fmt: skip
    for logits, target, options in wrong:
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.cross_entropy(logits, target, **options)
        with pytest.raises(Exception) as ours:  # noqa: PT011
            CE(logits, target, **options)
        caught = next(kind for kind in (IndexError, ValueError, RuntimeError) if isinstance(theirs.value, kind))
        assert isinstance(ours.value, caught), (target.shape, options, theirs.value, ours.value)


# ---- Liger ------------------------------------------------------------------------------------------------------------

LANGUAGE = [(2, 96, 1024), (3, 47, 3077), (1, 1, 129)]  # batch, positions, vocabulary


@pytest.mark.parametrize("shape", LANGUAGE, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "scale"),
    [(torch.float32, 1e-5, 1.0), (torch.bfloat16, 2e-2, 1.0), (torch.float32, 1e-4, 40.0)],
)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"ignore_index": -100}, {"ignore_index": 5}, {"ignore_index": -300, "label_smoothing": 0.1}, {"reduction": "sum"},
        {"weighted": True, "ignore_index": 7, "reduction": "mean"}, {"weighted": True, "label_smoothing": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_language_shapes(shape, dtype, tolerance, scale, options) -> None:
    """Liger: shapes with odd vocabularies, large logits, ignored positions, class weights, a loss that is not the last layer."""
    options = dict(options)
    batch, positions, vocabulary = shape
    z = (torch.randn(batch * positions, vocabulary, generator=generator()) * scale).to(dtype).requires_grad_()
    y = torch.randint(0, vocabulary, (batch * positions,), generator=generator(1))
    y[::3] = options.get("ignore_index", y[0].item())
    if y.numel() == 1:
        y[0] = 3
    if options.pop("weighted", False):
        options["weight"] = torch.rand(vocabulary, generator=generator(2)) + 0.1
    exact = z.detach().double().requires_grad_()
    double = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    (F.cross_entropy(exact, y, **double) * 3).backward()
    (CE(z, y, **options) * 3).backward()
    assert z.grad is not None
    assert exact.grad is not None
    assert (z.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_forward_alone_leaves_the_logits() -> None:
    z, y = torch.randn(8, 33, generator=generator()), torch.randint(0, 33, (8,), generator=generator(1))
    before = z.clone()
    with torch.no_grad():
        loss = CE(z, y)
    assert torch.equal(z, before)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(z, y))


def test_slices_of_a_larger_tensor() -> None:
    """Liger: logits of all but the last position, labels of all but the first, as a language model shifts them."""
    whole = torch.randn(2, 9, 65, generator=generator(), dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 65, (2, 9), generator=generator(1))
    shifted, next_labels = whole[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(shifted.reshape(-1, 65), next_labels.reshape(-1))
    for actual in (CE(shifted.reshape(-1, 65), next_labels.reshape(-1)), CE(shifted.movedim(-1, 1), next_labels)):
        same(actual, expected, [whole])


# ---- mmpretrain -------------------------------------------------------------------------------------------------------


def test_seesaw_over_a_sequence_of_batches() -> None:
    """Extreme logits, p = q = 0, and counts that grow with the batches, each counted before its own loss."""
    certain = torch.tensor([[-100.0, 100.0, -100.0, -100.0]])
    plain = ltk.nn.Seesaw(4, p=0.0, q=0.0)
    assert plain(certain, torch.tensor([1])).item() == pytest.approx(0.0, abs=1e-6)
    assert plain(certain, torch.tensor([0])).item() == pytest.approx(200.0)
    batches = [(torch.randn(5, 4, generator=generator(k), dtype=torch.float64), torch.randint(0, 4, (5,), generator=generator(k + 9)))
               for k in range(3)]  # fmt: skip
    loss = ltk.nn.Seesaw(4, p=0.8, q=2.0, eps=1e-2)
    counts = torch.zeros(4, dtype=torch.float64)
    for z, y in batches:
        counts += F.one_hot(y, 4).sum(0)
        n = counts.clamp(min=1)
        mitigation = (n[None, :] / n[y][:, None]).clamp(max=1) ** 0.8
        p = z.softmax(1)
        compensation = (p / p.gather(1, y[:, None]).clamp(min=1e-2)).clamp(min=1) ** 2.0
        factor = torch.where(F.one_hot(y, 4).bool(), 1.0, mitigation * compensation)
        expected = F.cross_entropy(z + factor.log(), y)
        torch.testing.assert_close(loss(z, y), expected, rtol=1e-9, atol=1e-12)


# ---- pytorch-metric-learning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_angular_margins_of_embeddings(name: str, dtype: torch.dtype) -> None:
    """Embeddings of any length, a weight matrix of classes, the margin in the angle or its cosine, gradients of both matrices."""
    x = torch.randn(32, 16, generator=generator(), dtype=dtype, requires_grad=True)
    w = torch.randn(10, 16, generator=generator(1), dtype=dtype, requires_grad=True)
    y = torch.randint(0, 10, (32,), generator=generator(2))
    m, s = (0.35, 64.0) if name == "cosface" else (math.radians(28.6), 64.0)
    loss = ltk.nn.CosFace(10, m=m, s=s) if name == "cosface" else ltk.nn.ArcFace(10, m=m, s=s)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, w)]
    cosine = F.linear(F.normalize(exact[0]), F.normalize(exact[1]))
    own = cosine.gather(1, y[:, None])
    theta = own.acos()
    moved = (
        own - m if name == "cosface" else torch.where(theta + m <= math.pi, (theta + m).cos(), own - m * math.sin(m))
    )
    F.cross_entropy(s * cosine.scatter(1, y[:, None], moved), y).backward()
    loss.from_features(x, w, y, normalize=True).backward()
    for ours, theirs in zip((x, w), exact):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() <= (
            1e-10 if dtype == torch.float64 else 1e-5
        ) * theirs.grad.norm()
