"""Data derived from data, and the category-similarity study on the digits."""

import numpy as np
import pytest
import torch

from ltkernels.experiments.similarity import similarity_study, toy_counts
from ltkernels.train import data
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset, mix_categories, with_counts


def _data() -> Dataset:
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(3), [20, 10, 5]))
    return Dataset.from_arrays(rng.normal(size=(35, 4)), y, rng.normal(size=(6, 4)), np.arange(6) % 3)


def test_with_counts_keeps_samples_and_standardisation():
    whole = _data()
    part = with_counts(whole, [7, 10, 1], seed=3)
    assert part.class_counts == [7, 10, 1]
    rows = {x.numpy().tobytes(): int(y) for x, y in zip(whole.x_train, whole.y_train)}
    assert all(rows[x.numpy().tobytes()] == int(y) for x, y in zip(part.x_train, part.y_train))
    assert part.mean is whole.mean
    assert torch.equal(with_counts(whole, [7, 10, 1], seed=3).x_train, part.x_train)
    assert not torch.equal(with_counts(whole, [7, 10, 1], seed=4).x_train, part.x_train)
    for counts, message in (([7, 11, 1], "11 samples of class 1"), ([1, 1], "2 entries"), ([0, 1, 1], "class 0")):
        with pytest.raises(ValueError, match=message):
            with_counts(whole, counts)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixing_replaces_the_share_it_says(lam):
    whole = _data()
    mixed = mix_categories(whole, 0, 2, 0.25, lam, seed=1)
    assert torch.equal(mixed.y_train, whole.y_train)
    assert torch.equal(mixed.x_test, whole.x_test)
    changed = (mixed.x_train != whole.x_train).any(1).nonzero().flatten()
    assert len(changed) == (0 if lam == 1.0 else 5)
    partners = whole.x_train[whole.y_train == 2]
    for row in changed.tolist():
        assert whole.y_train[row] == 0
        wanted = lam * whole.x_train[row] + (1 - lam) * partners
        assert (mixed.x_train[row] - wanted).abs().amax(1).min() < 1e-6


def test_larger_shares_replace_the_same_samples_and_more():
    whole = _data()
    small, large = (mix_categories(whole, 0, 1, rho, 0.5, seed=2).x_train for rho in (0.2, 0.6))
    changed = (small != whole.x_train).any(1)
    assert int(changed.sum()) == 4
    assert torch.equal(small[changed], large[changed])
    assert int((large != whole.x_train).any(1).sum()) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 0.5, 0.5), "minority is 3"),
        ((1, 1, 0.5, 0.5), "both class 1"),
        ((0, 1, 1.5, 0.5), "rho"),
        ((0, 1, 1, -1), "lam"),
    ],
)
def test_bad_mixtures_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mix_categories(_data(), *arguments)


def test_toy_counts():
    assert toy_counts(10, 5000, 100, fixed="rare")[:2] == [5000, 3066]
    assert toy_counts(10, 5000, 100, fixed="rare")[-2:] == [100, 100]
    assert toy_counts(4, 80, 20, fixed="frequent") == [80, 40, 20, 80]
    with pytest.raises(ValueError, match="rare or frequent"):
        toy_counts(10, 5000, 100, fixed="tail")


def test_study_shows_that_similarity_hurts_the_minority():
    config = Config(model="mlp", loss="ce", epochs=6, batch_size=32, lr=0.05, threads=1)
    digits = data.load("digits-lt")
    seen = []
    rows = similarity_study(
        config,
        digits,
        majority=0,
        minority=6,
        rhos=[0.0, 0.5],
        lams=[1.0, 0.0],
        progress=lambda d, t: seen.append((d, t)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(row["rho"], row["lam"]) for row in rows] == [(0.0, 1.0), (0.0, 0.0), (0.5, 1.0), (0.5, 0.0)]
    plain, repeated, unmoved, copied = (row["minority_accuracy"] for row in rows)
    assert plain == repeated == unmoved
    assert copied < plain - 0.2
    with pytest.raises(ValueError, match="at least one value"):
        similarity_study(config, digits, majority=0, minority=6, rhos=[], lams=[1.0])
