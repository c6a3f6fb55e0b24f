"""FDC: the moments of what it draws, the choice of the head class, and refusals. SMOTE: where its samples lie."""

import pytest
import torch

from ltkernels.augment import calibrate, fdc, most_similar_class, smote


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 near class 2 in distance, class 1 aligned with class 2 in direction."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.5]], dtype=torch.float64)
    head = torch.randn(4000, 3, generator=generator, dtype=torch.float64) @ spread + torch.tensor([1.0, 1.0, 0.0])
    far = 0.1 * torch.randn(4000, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 20.0, 0.0])
    tail = torch.tensor([[0.0, 1.9, 0.0], [0.0, 2.1, 0.0]], dtype=torch.float64)
    return torch.cat([head, far, tail]), torch.tensor([0] * 4000 + [1] * 4000 + [2] * 2)


def test_similar_class_by_distance_and_by_direction():
    features, labels = _features()
    assert most_similar_class(features, labels, 2, [0, 1]) == 0
    assert most_similar_class(features, labels, 2, [0, 1], similarity="cosine") == 1
    assert most_similar_class(features, labels, 2, [2, 1]) == 1


def test_draws_have_the_tail_mean_and_the_head_covariance():
    features, labels = _features()
    drawn = fdc(
        features, labels, 2, 200_000, head_classes=[0, 1], shrinkage=0.0, generator=torch.Generator().manual_seed(1)
    )
    # 200 000 draws: standard errors of the means below 0.005, of the covariances below 0.015.
    assert drawn.mean(0).tolist() == pytest.approx([0.0, 2.0, 0.0], abs=0.02)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(features[labels == 0].T), atol=0.06)


def test_shrinkage_moves_the_covariance_to_its_mean_variance():
    features, labels = _features()
    drawn = fdc(
        features, labels, 2, 200_000, head_classes=[0], shrinkage=1.0, generator=torch.Generator().manual_seed(1)
    )
    mean_variance = float(torch.cov(features[labels == 0].T).diagonal().mean())
    assert torch.allclose(torch.cov(drawn.T), mean_variance * torch.eye(3, dtype=torch.float64), atol=0.06)


def test_sample_center_draws_around_real_samples():
    features, labels = _features()
    head = 1e-3 * features[labels == 0]
    points = torch.cat([head, torch.tensor([[-5.0, 0, 0], [5.0, 0, 0]], dtype=torch.float64)])
    marks = torch.tensor([0] * 4000 + [2] * 2)
    near = fdc(points, marks, 2, 100, head_classes=[0], center="sample", generator=torch.Generator().manual_seed(0))
    assert set(near[:, 0].round().tolist()) == {-5.0, 5.0}
    mean = fdc(points, marks, 2, 100, head_classes=[0], generator=torch.Generator().manual_seed(0))
    assert mean[:, 0].abs().max() < 0.1


def test_few_samples_in_many_dimensions_spread_in_all_of_them():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 64, generator=generator)
    labels = torch.tensor([0] * 30 + [1] * 2)
    drawn = fdc(features, labels, 1, 500, head_classes=[0], generator=generator)
    assert drawn.dtype == torch.float32
    assert int(torch.linalg.matrix_rank(drawn - drawn.mean(0))) == 64


def test_same_generator_same_draws():
    features, labels = _features()
    a, b, c = (
        fdc(features, labels, 2, 5, head_classes=[0], generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail_class": 7}, "no sample of class 7"),
        ({"head_classes": [2]}, "other than tail_class"),
        ({"n": 0}, "n must be at least 1"),
        ({"shrinkage": 2.0}, "shrinkage"),
        ({"center": "median"}, "class_mean, sample"),
        ({"similarity": "dot"}, "euclidean, cosine"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must have shape"),
        ({"features": torch.full((8002, 3), float("nan"))}, "NaN"),
        ({"features": torch.zeros(8002, 3)}, "all equal"),
    ],
)
def test_bad_arguments_are_named(change, message):
    features, labels = _features()
    arguments = {"features": features, "labels": labels, "tail_class": 2, "n": 5, "head_classes": [0, 1]}
    with pytest.raises(ValueError, match=message):
        fdc(**{**arguments, **change})


def test_a_calibration_draws_what_fdc_draws():
    features, labels = _features()
    once = calibrate(features, labels, 2, head_classes=[0, 1], center="sample")
    drawn = once.sample(7, torch.Generator().manual_seed(5))
    again = fdc(
        features, labels, 2, 7, head_classes=[0, 1], center="sample", generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(drawn, again)


def _line() -> tuple[torch.Tensor, torch.Tensor]:
    """Class 1: five samples on a line, two of them equal; class 0 in between, to be left alone."""
    own = torch.tensor([[0.0], [0.0], [1.0], [3.0], [10.0]], dtype=torch.float64)
    return torch.cat([own, own + 0.5]), torch.tensor([1] * 5 + [0] * 5)


def test_smote_draws_between_neighbours_of_the_class():
    features, labels = _line()
    drawn = smote(features, labels, 1, 5000, k=1, generator=torch.Generator().manual_seed(0)).flatten()
    # With one neighbour: 0-0 (the duplicates, twice), 1-0, 3-1, 10-3.
    spans = [int(((drawn >= a) & (drawn < b)).sum()) for a, b in ((0, 1e-12), (1e-12, 1), (1, 3), (3, 10.001))]
    assert spans == [2000, 1000, 1000, 1000]
    # Uniform along the segment from 10 to 3: mean 6.5, standard deviation 7 / sqrt(12); 1000 draws.
    assert float(drawn[drawn > 3].mean()) == pytest.approx(6.5, abs=4 * 7 / 12**0.5 / 1000**0.5)


def test_smote_neighbours_are_never_the_sample_itself():
    features, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0])
    drawn = smote(features, labels, 0, 1000, k=5, generator=torch.Generator().manual_seed(0)).flatten()
    # A sample interpolated with itself would stay at 0 or 1: a quarter of the draws each.
    assert int(((drawn == 0) | (drawn == 1)).sum()) <= 1
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tail_class": 2}, "no sample of class 2"), ({"k": 0}, "k must be"), ({"n": 0}, "n and k must be"),
     ({"labels": torch.tensor([1] + [0] * 9)}, "one sample")],
)  # fmt: skip
def test_smote_refusals(change, message):
    features, labels = _line()
    with pytest.raises(ValueError, match=message):
        smote(**{"features": features, "labels": labels, "tail_class": 1, "n": 3, **change})
