"""FDC: the moments of what it draws, the choice of the head class, and refusals."""

import pytest
import torch

from ltkernels.augment import fdc, most_similar_class


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
