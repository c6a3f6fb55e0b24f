"""Feature diversity V and Feature Diversity Gain (FDG): what an augmented set adds to the spread of a class's features.

Source: "data-centric long-tailed recognition by Feature Diversity Gain", Definitions 2-4 and Principles 1-2. With F the
(d, n) matrix of mean-centred features,

    V(F) = 1/2 log2 det(I + (alpha / n) F F^T),        FDG(Z, Z') = V([Z, Z']) / V(Z) - 1.

``alpha = 1`` is the paper's form; ``alpha = d / eps**2`` is the rate of maximal coding rate reduction (MCR2).

What Definition 4 means by "perform mean normalization on Z, Z' and F" is open, so the reading is an argument,
``centering``:

* ``"joint"`` (default): F = [Z, Z'] is centred by its own mean. With d = mean(Z') - mean(Z) the covariance of F is

      N / (N+N') C_Z + N' / (N+N') C_Z' + N N' / (N+N')^2 d d^T,

  so that FDG sees where Z' lies with a weight of N N' / (N+N')^2: a quarter at N' = N, 1 % for 54 samples with 5346
  added. With N' >> N, FDG is V(Z') / V(Z) - 1 and location is lost; `standardized_offset` is its companion.
* ``"separate"``: Z and Z' are each centred by their own mean before they are put side by side, which is what the
  paper's proof uses. Moving the whole of Z' by a vector changes nothing.
* ``"none"``: nothing is subtracted; both sets are taken as they are given, the original's V too. Subtract the mean of Z
  from both beforehand to have everything centred on the original set.

The paper's lower bound -N'/(N+N') holds for all three and is never attained; `fdg_infimum` is the tight one.

Determinants come from Cholesky factors in float64. LU is not used anywhere: torch's batched CPU ``slogdet`` returns
log-determinants that are wrong by several nats from d of about 150 on, with two threads or more and no error (pytorch
#142815, torch 2.13).
"""

from ._classes import ClassStatistics, class_diversities
from ._measures import (
    FAR,
    fdg_infimum,
    fdg_lower_bound,
    feature_diversity,
    feature_diversity_gain,
    standardized_offset,
)
from ._representatives import select_representatives
from ._stream import FeatureStatistics
from ._target import FdgTarget, NoHeadClass, fdg_target

__all__ = [
    "FAR",
    "ClassStatistics",
    "FdgTarget",
    "FeatureStatistics",
    "NoHeadClass",
    "class_diversities",
    "fdg_infimum",
    "fdg_lower_bound",
    "fdg_target",
    "feature_diversity",
    "feature_diversity_gain",
    "select_representatives",
    "standardized_offset",
]
