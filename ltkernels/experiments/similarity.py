"""The category-similarity study: is it scarcity that hurts a minority class, or that another class looks like it?"""

from collections.abc import Callable, Sequence
from typing import Any

from ltkernels.train.config import Config
from ltkernels.train.data import Dataset, mix_categories
from ltkernels.train.jobs import load_data, train


def toy_counts(num_classes: int, n_max: int, n_min: int, *, fixed: str) -> list[int]:
    """The toy study's counts: all classes but the last from n_max down to n_min on an exponential, the last at n_min
    (`fixed="rare"`) or at n_max (`fixed="frequent"`, the reverse). Raises ValueError naming the argument."""
    if fixed not in ("rare", "frequent"):
        raise ValueError(f"fixed must be rare or frequent, got {fixed!r}")
    if num_classes < 3 or not 1 <= n_min <= n_max:
        raise ValueError(f"need at least 3 classes and 1 <= n_min <= n_max, got {num_classes}, {n_min} and {n_max}")
    falling = [round(n_max * (n_min / n_max) ** (i / (num_classes - 2))) for i in range(num_classes - 1)]
    return [*falling, n_min if fixed == "rare" else n_max]


def similarity_study(
    config: Config,
    data: Dataset | None = None,
    *,
    majority: int,
    minority: int,
    rhos: Sequence[float],
    lams: Sequence[float],
    seeds: Sequence[int] = (0,),
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One training for each rho, lam and seed on the data of `mix_categories`; nothing is written.

    Returns rows of rho, lam, seed, majority_accuracy, minority_accuracy and balanced_accuracy (fractions of the unchanged
    test set, last epoch). rho = 0 is the same data for every lam: it is trained once a seed, and its numbers are repeated.
    `progress(done, total)` counts trainings asked for. Raises what `mix_categories` and `train` raise, and ValueError for
    an empty list.
    """
    if not (rhos and lams and seeds):
        raise ValueError("rhos, lams and seeds must each hold at least one value")
    data = load_data(config) if data is None else data
    rows, unmixed = [], {}
    total = len(rhos) * len(lams) * len(seeds)
    for rho in rhos:
        for lam in lams:
            mixed = mix_categories(data, majority, minority, rho, lam, config.data_seed)
            for seed in seeds:
                summary = unmixed.get(seed) if rho == 0 else None
                if summary is None:
                    summary = train(config.replace(seed=seed), mixed)
                    if rho == 0:
                        unmixed[seed] = summary
                recall = summary["per_class_accuracy"]
                accuracies = {"majority_accuracy": recall[majority], "minority_accuracy": recall[minority]}
                balanced = {"balanced_accuracy": summary["balanced_accuracy"]}
                rows.append({"rho": rho, "lam": lam, "seed": seed, **accuracies, **balanced})
                if progress:
                    progress(len(rows), total)
    return rows
