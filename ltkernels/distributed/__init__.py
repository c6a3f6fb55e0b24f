"""Classifier and loss with the classes sharded over the ranks of a process group: `sharded_linear_adjusted_cross_entropy`.

Every rank holds some rows of the classifier. It computes the row statistics of its own classes (the first phase of
`ltkernels.losses._two_phase`), one exchange of four numbers a row makes them those of all classes, and the second phase gives the
gradient of the rank's own logits: exact, and no rank ever sees another's logits or weights. Backward reduces the feature gradient over
the ranks, once. `NegativeSampling` computes a random part of the classes only. Gloo and NCCL; all ranks must make the same calls.

    _loss.py        the public call: arguments in, their checks
    _placement.py   process groups, device meshes and DTensor weights
    _exchange.py    everything that crosses ranks
    _sampling.py    which classes are computed
    _autograd.py    forward and backward of one rank
"""

from ._loss import sharded_linear_adjusted_cross_entropy
from ._sampling import NegativeSampling

__all__ = ["NegativeSampling", "sharded_linear_adjusted_cross_entropy"]
