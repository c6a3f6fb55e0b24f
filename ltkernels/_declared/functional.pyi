# Written by `python -m ltkernels._declared` from the records of ltkernels.losses; do not edit.

from collections.abc import Sequence

from torch import Tensor

from ..losses._core import Target

def arcface(
    logits: Tensor,
    target: Target,
    *,
    m: float = 0.5,
    s: float = 64.0,
    gradient: str = "exact",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """ArcFace, Deng et al. 2019 (arXiv:1801.07698), equation 3: the label's logit is ``s cos(theta + m)``, the others ``s cos``.

    The logits are cosines (`ltkernels.nn.CosineLinear`). Where ``theta + m > pi`` the label's logit goes on as
    ``s (cos theta - m sin m)``, which stays decreasing in theta (the convention of the authors' code).

    Args:
        m: margin in radians, in [0, pi / 2].
        s: temperature, above 0.
        gradient: ``"exact"``, ``s sin(theta + m) / sin(theta)`` at the label, with ``sin(theta)`` taken as 1e-3 at least, so that
            it stays finite at ``cos = 1`` (the slope there is ``cos m + 1000 cos(theta) sin m``); or ``"straight_through"``,
            ``s``, the gradient of the cosine itself.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the cosines, without margin.
    """

def class_balanced(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    beta: float | None = 0.9999,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Class-balanced softmax loss, Cui et al. 2019 (arXiv:1901.05555), equation 10: weight ``(1 - beta) / (1 - beta^n)``.

    The weights are scaled to sum to the number of non-empty classes. The paper divides the batch's loss by its number of rows:
    that is ``reduction="batch_mean"``; torch's ``"mean"`` divides by the sum of the batch's weights.

    Args:
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def cross_entropy(
    logits: Tensor,
    target: Target,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Softmax cross-entropy: every vector at its neutral value.

    Shared arguments:
        logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.

        weight: (C,) class weights, where the loss has none of its own.
        label_smoothing, ignore_index, reduction, inplace, backend: as in
            `ltkernels.functional.adjusted_cross_entropy`.

    Predict with: the logits as they are.
    """

def focal(
    logits: Tensor,
    target: Target,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Softmax focal loss, Lin et al. 2017 (arXiv:1708.02002), equation 4: ``(1 - p_y)^gamma * -log p_y``.

    Args:
        gamma: focusing parameter, at least 0; 0 is cross-entropy. The gradient is exact for gamma < 1 and p_y = 1 too.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def kps(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    max_margin: float = 0.2,
    s: float = 15.0,
    gradient_adjustment: bool = False,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """KPS, Li, Cheung and Hu 2022 (doi:10.1109/TPAMI.2022.3196044): scale ``s r``, margin ``s m`` with
    ``r = log(50 n / n_min) / log 50`` and ``m = max_margin * log(50 n_max / n) / log(50 n_max / n_min)``.

    With gradient adjustment the row's temperature depends on its label: scale ``r``, margin ``m``, row scale
    ``clamp(s * log(50 n_max / n) / log 50, s, 50)``. The logits are cosines (`ltkernels.nn.CosineLinear`).

    The vectors come from the counts. The authors' code reverses r by class index instead, which is right only where the class
    ids are sorted by count.

    Args:
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, in (0, 50].
        gradient_adjustment: the second stage of the published schedule, from epoch 120 of 200.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale and margin.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the cosines, without r and margin.
    """

def kps_ga(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    max_margin: float = 0.2,
    s: float = 15.0,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """`kps` with ``gradient_adjustment=True``: the second stage of the published schedule. Arguments as there.

    Shared arguments:
        logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
        class_counts: (C,) training samples per class, integers.

        weight: (C,) class weights, where the loss has none of its own.
        label_smoothing, ignore_index, reduction, inplace, backend: as in
            `ltkernels.functional.adjusted_cross_entropy`.

    Predict with: the cosines, without r and margin.
    """

def logit_adjusted_cross_entropy(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    tau: float = 1.0,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Logit-adjusted cross-entropy, Menon et al. 2021 (arXiv:2007.07314), equation 10: shift ``tau * log(n / N)``.

    Args:
        tau: strength of the prior; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the raw logits, without the prior.
    """

def balanced_softmax(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Balanced softmax, Ren et al. 2020 (arXiv:2007.10740), equation 3: shift ``log n``. Equals logit adjustment with tau = 1.

    Args:
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the raw logits, without the prior.
    """

def logit_adjusted_adaptive_margin(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Logit adjustment with an adaptive margin: shift ``log(n / N)``, margin ``(n / N)^(-1/4)``.

    Args:
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0 and the rarest class' margin.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the raw logits, without the prior.
    """

def ldam(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    max_margin: float = 0.5,
    s: float = 30.0,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """LDAM, Cao et al. 2019 (arXiv:1906.07413), equation 13: margin ``max_margin * (n_min / n)^(1/4)``, row scale ``s``.

    The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        max_margin: margin of the rarest class, in units of the cosine.
        s: temperature, above 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' margin.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the cosines, without margin.
    """

def cosface(
    logits: Tensor,
    target: Target,
    *,
    m: float = 0.35,
    s: float = 64.0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """CosFace, Wang et al. 2018 (arXiv:1801.09414), equation 4: one margin for every class, row scale ``s``.

    The logits are cosines (`ltkernels.nn.CosineLinear`).

    Args:
        m: margin, in units of the cosine.
        s: temperature, above 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the cosines, without margin.
    """

def seesaw(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 0.01,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Seesaw loss, Wang et al. 2021 (arXiv:2008.10032): softmax cross-entropy of ``z + D`` with
    ``D_ij = p min(0, log n_j - log n_y) + q max(0, log P_ij - log max(P_iy, eps))``, ``P = softmax(z)`` held constant.

    The paper counts the samples seen so far in training; `ltkernels.nn.Seesaw` does that.

    Args:
        p: exponent of the mitigation factor, at least 0: rarer classes than the label are punished less.
        q: exponent of the compensation factor, at least 0: classes that outweigh the label are punished more.
        eps: floor of the label's probability in the compensation, in (0, 1].
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` counts it as 1, as the authors' code.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def class_balanced_sigmoid(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    beta: float | None = 0.9999,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Class-balanced sigmoid cross-entropy, Cui et al. 2019 (arXiv:1901.05555), sigmoid form: the row's sum of binary
    cross-entropies times the label's weight ``(1 - beta) / (1 - beta^n)``, as in `class_balanced`.

    The paper divides by the number of rows: ``reduction="batch_mean"``. It also starts the classifier's bias at ``-log(C - 1)``.

    Args:
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def class_balanced_focal(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    beta: float | None = 0.9999,
    gamma: float = 1.0,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Class-balanced focal loss, Cui et al. 2019 (arXiv:1901.05555), focal form: `class_balanced_sigmoid` with each binary
    cross-entropy times ``(1 - p_t)^gamma``, p_t the probability of what is true of that class.

    Args:
        beta: in [0, 1); None for its limit 1, weights ``1 / n``.
        gamma: focusing parameter, at least 0.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def eql(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    tail_frequency: float | None = None,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Equalization loss, Tan et al. 2020 (arXiv:2003.05176): sigmoid cross-entropy without the negative terms of
    tail classes, so that head samples do not discourage them. Every row counts as foreground.

    Args:
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def softmax_equalization(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    gamma: float = 0.9,
    tail_frequency: float | None = None,
    seed: int | None = None,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Softmax equalization loss, Tan et al. 2020 (arXiv:2003.05176), softmax form: each tail class but the label is
    removed from a row's softmax with probability `gamma`. The label is never removed.

    The mask is a function of (seed, row, class): the 32-bit hash lowbias32, applied as `ltkernels.losses._terms.equalization_mask`
    spells out. The kernel, its backward pass and the torch reference therefore see one mask.

    Args:
        gamma: probability of the mask, in [0, 1].
        tail_frequency: lambda, in [0, 1]: classes with ``n / N`` below it are tail classes. None stands for ``0.3 / C``,
            which is the paper's 3e-3 for CIFAR-100-LT.
        seed: None draws a seed from torch's generator at each call, so ``torch.manual_seed`` governs it; a number repeats one
            mask at every call.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` makes it a tail class.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the logits as they are.
    """

def cdt(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    gamma: float = 0.3,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Class-dependent temperatures, Ye et al. 2020 (arXiv:2001.01385): scale ``(n / n_max)^gamma``.

    Args:
        gamma: exponent, at least 0; 0 is cross-entropy.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it the rarest class' scale.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the raw logits, without scale.
    """

def vector_scaling(
    logits: Tensor,
    target: Target,
    class_counts: Sequence[int] | Tensor,
    *,
    gamma: float = 0.3,
    tau: float = 1.0,
    empty: str = "error",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """VS loss, Kini et al. 2021 (arXiv:2103.01550): scale ``(n / n_max)^gamma``, shift ``tau * log(n / N)``.

    Args:
        gamma: exponent of the multiplicative part, at least 0.
        tau: strength of the additive part.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.

        Shared arguments:
            logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.
            class_counts: (C,) training samples per class, integers.

            weight: (C,) class weights, where the loss has none of its own.
            label_smoothing, ignore_index, reduction, inplace, backend: as in
                `ltkernels.functional.adjusted_cross_entropy`.

        Predict with: the raw logits, without scale and prior.
    """
