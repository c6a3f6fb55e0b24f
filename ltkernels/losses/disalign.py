"""DisAlign: calibrates the logits of a trained classifier, as much as the sample's features say it is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from .._errors import ArgumentError, DTypeError


class DisAlign(nn.Module):
    """Distribution alignment (DisAlign), Zhang et al. 2021 (arXiv:2103.16370): a second stage that learns a scale and a shift of each class
    and when to use them: ``a = c (alpha z + beta) + (1 - c) z`` with the confidence ``c = sigmoid(v . x)`` of the features x.

    Network and classifier stay frozen: logits and features come in without a gradient, or get one; alpha, beta and v alone are learned,
    at first 1, 0 and 0. The loss is cross-entropy with the weights of `class_weights`. The authors train 10 epochs with a learning rate of
    0.1 and batches of 256. In plain torch: a second stage of C and D parameters has nothing to gain from a kernel.

    Args:
        num_features: D.
        num_classes: C.

    Attributes:
        scale, shift: (C,) Parameters alpha and beta.
        confidence: (D,) Parameter v.

    Shape:
        logits (N, C), features (N, D); output (N, C).

    Dtype:
        logits and features float32, float64, bfloat16 or float16; output in the logits' dtype, computed in float32 or float64.

    Raises:
        TypeError: logits or features that are not floating-point.
        ValueError: shapes that do not fit.

    Predict with: its output, as it is.

    Example:
        >>> align = ltk.nn.DisAlign(num_features=64, num_classes=3)
        >>> criterion = ltk.nn.CrossEntropy(weight=ltk.nn.DisAlign.class_weights([6, 3, 1]))
        >>> logits, features = torch.randn(8, 3), torch.randn(8, 64)
        >>> criterion(align(logits, features), torch.arange(8) % 3).backward()
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        classes = _checks.num_classes(num_classes)
        width = _checks.integer("num_features", num_features)
        if width < 1:
            raise ArgumentError(f"num_features is {width}; it must be at least 1")
        self.scale = nn.Parameter(torch.empty(classes))
        self.shift = nn.Parameter(torch.empty(classes))
        self.confidence = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """alpha 1, beta 0, v 0: the logits as they are, and a confidence of 1/2."""
        self.scale.fill_(1.0)
        self.shift.zero_()
        self.confidence.zero_()

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        """The calibrated logits (N, C)."""
        for name, value, width in (("logits", logits, self.scale), ("features", features, self.confidence)):
            if not isinstance(value, Tensor) or value.dtype not in _checks.FLOATING:
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise DTypeError(f"{name} is {found}; it must be a float32, float64, bfloat16 or float16 tensor")
            if value.dim() != 2 or value.shape[1] != len(width):
                raise ArgumentError(f"{name} has shape {tuple(value.shape)}; it must be (N, {len(width)})")
        if len(logits) != len(features):
            raise ArgumentError(f"logits has {len(logits)} rows, features {len(features)}; both must have one a sample")
        real = torch.promote_types(_checks.real_dtype(logits.dtype), self.scale.dtype)
        c = torch.sigmoid(features.to(real) @ self.confidence.to(real)).unsqueeze(1)
        # z + c ((alpha - 1) z + beta), in the order that keeps z where c is 0.
        z = logits.to(real)
        return (z + c * ((self.scale - 1) * z + self.shift)).to(logits.dtype)

    @staticmethod
    def class_weights(class_counts: _checks.ClassCounts, rho: float = 1.5, *, empty: str = "error") -> Tensor:
        """(C,) float32: the paper's generalised re-weighting ``(N / n)^rho``, scaled to sum to the number of non-empty classes.

        Args:
            class_counts: (C,) training samples per class, as in every loss.
            rho: at least 0; 1.5 in the paper, 1.2 in the authors' released configuration.
            empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.

        Raises:
            TypeError, ValueError: as every loss of class counts.

        Example:
            >>> ltk.nn.DisAlign.class_weights([6, 3, 1])
            tensor([0.1619, 0.4580, 2.3800])
        """
        counts = _checks.class_counts(class_counts, empty)
        rho = _checks.number("rho", rho, low=0.0)
        weight = torch.softmax((-rho * counts.n.log()).masked_fill(counts.empty, -torch.inf), dim=0)
        return (weight * (~counts.empty).sum()).float()

    def extra_repr(self) -> str:
        return f"num_features={len(self.confidence)}, num_classes={len(self.scale)}"
