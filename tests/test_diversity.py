"""V, FDG and subset gains against numpy's slogdet, one matrix at a time, in float64; expected small values typed by
hand."""

from __future__ import annotations

import itertools
import math
import pathlib
import re

import numpy as np
import pytest
import torch

import ltkernels as ltk

CENTERINGS = ("joint", "separate", "none")


def volume(rows: np.ndarray, centre: bool, alpha: float) -> float:
    """log det(I + alpha / n F F^T) of rows (n, d), in nats, by LU of one matrix."""
    f = rows - rows.mean(0) if centre else rows
    return float(np.linalg.slogdet(np.eye(f.shape[1]) + alpha / len(f) * f.T @ f)[1])


def gain(original: np.ndarray, added: np.ndarray, centering: str, alpha: float) -> float:
    base = volume(original, centering != "none", alpha)
    if centering == "joint":
        return volume(np.vstack([original, added]), True, alpha) / base - 1.0
    if centering == "separate":
        parts = [original - original.mean(0)] + ([added - added.mean(0)] if len(added) else [])
        return volume(np.vstack(parts), False, alpha) / base - 1.0
    return volume(np.vstack([original, added]), False, alpha) / base - 1.0


def test_hand_values() -> None:
    # Two points at -1 and +1: variance 1, V = 1/2 log2(1 + 1).
    z = torch.tensor([[-1.0], [1.0]])
    assert float(ltk.diversity.feature_diversity(z)) == pytest.approx(0.5, abs=1e-15)
    assert float(ltk.diversity.feature_diversity(z, alpha=3.0)) == pytest.approx(1.0, abs=1e-15)
    # Four points on the axes at distance 1: variance 1/2 each way, V = 2/2 log2(1 + d/2) with alpha the width d = 2.
    cross = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert float(ltk.diversity.feature_diversity(cross, alpha=2.0)) == pytest.approx(1.0, abs=1e-15)
    # Two more at the mean: variance 1/2, log2(1.5) / log2(2) - 1.
    got = float(ltk.diversity.feature_diversity_gain(z, torch.zeros(2, 1)))
    assert got == pytest.approx(-0.4150374992788438, abs=1e-14)
    # One point at +3, joint: mean 1, squares 4 + 0 + 4 over 3: log2(1 + 8/3) - 1.
    got = float(ltk.diversity.feature_diversity_gain(z, torch.tensor([[3.0]])))
    assert got == pytest.approx(0.8744691179161410, abs=1e-14)
    # Separate: the point is its own mean, so the scatter stays 2 over 3 samples: log2(5/3) - 1.
    got = float(ltk.diversity.feature_diversity_gain(z, torch.tensor([[3.0]]), centering="separate"))
    assert got == pytest.approx(-0.2630344058337938, abs=1e-14)
    # None: squares 1 + 1 + 9 over 3: log2(1 + 11/3) - 1.
    got = float(ltk.diversity.feature_diversity_gain(z, torch.tensor([[3.0]]), centering="none"))
    assert got == pytest.approx(1.2223924213364480, abs=1e-14)
    assert ltk.diversity.fdg_lower_bound(50, 450) == -0.9
    # a = 1/2: log(1.5) / log(2) - 1, the value two points at the mean gave.
    assert ltk.diversity.fdg_infimum(z, 2) == pytest.approx(-0.4150374992788438, abs=1e-14)


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (7, 30), (30, 7), (12, 12), (150, 160)])
def test_gain_equals_brute_force(centering: str, n: int, d: int) -> None:
    rng = np.random.default_rng(n * d)
    for alpha in (0.2, 1.0, 9.0):
        z, x = rng.normal(size=(n, d)) + 2.0, 1.5 * rng.normal(size=(5, d)) + rng.normal(size=d)
        got = float(ltk.diversity.feature_diversity_gain(z, x, centering=centering, alpha=alpha))
        assert got == pytest.approx(gain(z, x, centering, alpha), rel=1e-10, abs=1e-12)
        got = float(ltk.diversity.feature_diversity(z, alpha=alpha))
        assert got == pytest.approx(volume(z, True, alpha) / (2 * math.log(2)), rel=1e-11)


def test_both_forms_agree() -> None:
    # Sylvester: padding with zero features switches from the d x d to the n x n form and changes nothing.
    z = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = torch.cat([z, torch.zeros(20, 30, dtype=torch.float64)], 1)
    torch.testing.assert_close(
        ltk.diversity.feature_diversity(z), ltk.diversity.feature_diversity(wide), rtol=1e-13, atol=0.0
    )


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("d", [1, 6, 33])
def test_subset_gains_equal_brute_force(centering: str, ragged: bool, d: int) -> None:
    rng = np.random.default_rng(d + ragged)
    # Size 40 is above d: its determinant is taken in the d x d form.
    sizes = [1, 2, 2, 7, 40, 3] if ragged else [4] * 6
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    z, x = rng.normal(size=(9, d)) + 5.0, rng.normal(size=(offsets[-1], d)) + 4.0
    got = ltk.selection.subset_gains(z, x, offsets, centering=centering, alpha=1.7)
    want = [gain(z, x[b:e], centering, 1.7) for b, e in itertools.pairwise(offsets)]
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("centering", CENTERINGS)
def test_principle_1_nothing_added(centering: str) -> None:
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
    assert float(ltk.diversity.feature_diversity_gain(z, z[:0], centering=centering)) == 0.0


@pytest.mark.parametrize("centering", CENTERINGS)
def test_bounds_are_never_crossed(centering: str) -> None:
    rng = np.random.default_rng(3)
    for case in range(100):
        n, extra, d = rng.integers(2, 30), rng.integers(1, 30), rng.integers(1, 20)
        z = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-1, 3)
        x = rng.normal(size=(extra, d)) * (0.0 if case % 4 == 0 else rng.random())
        if centering != "none":
            x += z.mean(0)
        value = float(ltk.diversity.feature_diversity_gain(z, x, centering=centering))
        infimum = ltk.diversity.fdg_infimum(z, int(extra), centering=centering)
        assert value >= infimum - 1e-12 * (1 + abs(infimum))
        assert infimum > ltk.diversity.fdg_lower_bound(int(n), int(extra))
        if case % 4 == 0:
            assert value == pytest.approx(infimum, rel=1e-9)


def test_translation() -> None:
    rng = np.random.default_rng(4)
    z, x = rng.normal(size=(20, 6)), rng.normal(size=(8, 6))
    values = {c: float(ltk.diversity.feature_diversity_gain(z, x, centering=c)) for c in CENTERINGS}
    for centering in ("joint", "separate"):
        # A shift common to both sets changes nothing.
        moved = float(ltk.diversity.feature_diversity_gain(z + 100.0, x + 100.0, centering=centering))
        assert moved == pytest.approx(values[centering], rel=1e-9)
    # A shift of the added set alone: unseen by "separate", seen by "joint".
    assert float(ltk.diversity.feature_diversity_gain(z, x + 3.0, centering="separate")) == pytest.approx(
        values["separate"], rel=1e-10
    )
    assert float(ltk.diversity.feature_diversity_gain(z, x + 3.0)) > values["joint"] + 0.01
    # "none" on features centred on the original set is not "joint": there the added samples move the mean.
    mean = z.mean(0)
    about = float(ltk.diversity.feature_diversity_gain(z - mean, x - mean + 3.0, centering="none"))
    assert about > float(ltk.diversity.feature_diversity_gain(z, x + 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_computed_in_float64(dtype: torch.dtype) -> None:
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(5)).to(dtype)
    value = ltk.diversity.feature_diversity(z)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(volume(z.double().numpy(), True, 1.0) / (2 * math.log(2)), rel=1e-13)


def test_diversity_is_differentiable() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    assert torch.autograd.gradcheck(ltk.diversity.feature_diversity, (z,))


def bad(rows: int, value: float) -> torch.Tensor:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(7))
    x[rows:, 1] = value
    return x


GOOD = torch.randn(6, 3, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("original", "added", "keywords", "error", "message"),
    [
        (bad(4, math.nan), GOOD, {}, ValueError, "original holds NaN or infinity, first in row 4"),
        (GOOD, bad(2, math.inf), {}, ValueError, "augmented holds NaN or infinity, first in row 2"),
        (GOOD[:1], GOOD, {}, ValueError, "N = 1"),
        (GOOD[:0], GOOD, {}, ValueError, "original is empty"),
        (torch.ones(5, 3), GOOD, {}, ValueError, "all 5 samples of original are equal"),
        (torch.full((5, 3), 0.1), GOOD, {}, ValueError, "all 5 samples of original are equal"),
        (torch.zeros(5, 3), GOOD, {"centering": "none"}, ValueError, "all 5 samples of original are zero"),
        (GOOD, GOOD[:, :2], {}, ValueError, "augmented has 2 features per sample, original has 3"),
        (GOOD, GOOD[0], {}, ValueError, r"augmented must have shape \(samples, features\), got \(3,\)"),
        (GOOD, GOOD.int(), {}, TypeError, "augmented must be float16, .* got torch.int32"),
        (GOOD, GOOD, {"alpha": 0.0}, ValueError, "alpha must be above 0, got 0.0"),
        (GOOD, GOOD, {"alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        (GOOD, GOOD, {"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        (GOOD, GOOD, {"centering": "both"}, ValueError, "unknown centering 'both'; known: joint, separate, none"),
    ],
)
def test_bad_input(original, added, keywords, error, message) -> None:
    with pytest.raises(error, match=message):
        ltk.diversity.feature_diversity_gain(original, added, **keywords)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([1, 3, 6], ValueError, r"offsets must start at 0, got offsets\[0\] = 1"),
        ([0, 3, 3, 6], ValueError, "subset 1 is empty"),
        ([0, 4, 3, 6], ValueError, r"offsets must increase: offsets\[1\] = 4, offsets\[2\] = 3"),
        ([0, 3, 5], ValueError, r"offsets must end at the 6 rows of candidates, got offsets\[2\] = 5"),
        ([0], ValueError, r"offsets must have shape \(subsets \+ 1,\)"),
        ([0.0, 6.0], TypeError, "offsets must be integers"),
    ],
)
def test_bad_offsets(offsets, error, message) -> None:
    with pytest.raises(error, match=message):
        ltk.selection.subset_gains(GOOD, GOOD, offsets)


def test_empty_pool() -> None:
    with pytest.raises(ValueError, match="candidates is empty"):
        ltk.selection.subset_gains(GOOD, GOOD[:0], [0])


def test_batched_lu_is_not_used() -> None:
    # torch's batched slogdet on CPU returned log-determinants wrong by several nats (pytorch #142815).
    package = pathlib.Path(ltk.__file__).parent
    calls = re.compile(r"\.(slogdet|logdet|det|lu_factor\w*|lu|inv)\(")
    for path in [*(package / "diversity").glob("*.py"), *(package / "selection").glob("*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not calls.search(line), f"{path.name}:{number}: {line.strip()}"


def test_our_log_dets_hold_where_batched_lu_failed() -> None:
    # Batch of several at d = 192 with two threads, the case of pytorch #142815; numpy takes one matrix at a time.
    threads = torch.get_num_threads()
    rng = np.random.default_rng(9)
    z, x = rng.normal(size=(40, 192)), rng.normal(size=(6 * 200, 192))
    offsets = list(range(0, 1201, 200))
    try:
        torch.set_num_threads(2)
        got = ltk.selection.subset_gains(z, x, offsets).numpy()
    finally:
        torch.set_num_threads(threads)
    want = [gain(z, x[b : b + 200], "joint", 1.0) for b in offsets[:-1]]
    np.testing.assert_allclose(got, want, rtol=1e-10)
