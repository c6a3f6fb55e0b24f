"""`digits-lt`: the 1 797 real 8x8 digits inside scikit-learn's wheel (UCI Optical Recognition of Handwritten Digits).

Nothing is downloaded. The classes have 174 to 183 images; 50 of each are held out as a balanced test set, and the
rest is thinned to the profile: 124 images of digit 0 down to 6 of digit 9 at the default imbalance factor 20.
"""

import numpy as np

from ltkernels.train.data._dataset import DataRequest, Dataset

TEST_PER_CLASS = 50
DEFAULT_IMBALANCE = 20.0


def load(request: DataRequest) -> Dataset:
    """Load digits-lt. Raises ImportError naming the extra to install where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('data set digits-lt needs scikit-learn: pip install "ltkernels[train]"') from error
    bunch = load_digits()
    images, labels = bunch.images.astype(np.float32), bunch.target.astype(np.int64)

    # The held-out images come from their own stream, so that every imbalance and profile is tested on the same 500.
    rng = np.random.default_rng([request.seed, 10_000])
    held_out = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:TEST_PER_CLASS] for c in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    return Dataset.from_arrays(
        images[rest],
        labels[rest],
        images[held_out],
        labels[held_out],
        name="digits-lt",
        # One thread: on 8x8 images a second one gains nothing, and waits for its turn wherever the machine is busy.
        defaults={"epochs": 25, "batch_size": 32, "lr": 0.05, "threads": 1},
        **request.division(DEFAULT_IMBALANCE),
    )
