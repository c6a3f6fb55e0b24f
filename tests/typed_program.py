"""A user's program. tests/test_typing.py checks it with mypy --strict, and runs it. Every `type: ignore` stands at a mistake that a type
checker must find: an ignore without one is an error itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import assert_type

import ltkernels as ltk
from ltkernels import adjustments, inference, nn, schedules, selection
from ltkernels.functional import adjusted_cross_entropy, isda_head, lader, linear_adjusted_cross_entropy, sinkhorn

COUNTS = [500, 5, 50]


def losses(logits: Tensor, target: Tensor) -> Tensor:
    built = adjustments.ldam(COUNTS, max_margin=0.3)
    assert_type(built.margin, Tensor | None)
    assert_type(nn.LDAM(COUNTS, s=20.0, reduction="sum")(logits, target), Tensor)
    criterion = nn.LogitAdjustedCrossEntropy(class_counts=COUNTS, tau=1.5, label_smoothing=0.1)
    mixed = criterion(logits, (target, target.flip(0), 0.3))
    assert_type(mixed, Tensor)
    schedules.DRW(criterion, start=2).step(3)
    assert_type(criterion.weight, Tensor | None)
    assert_type(nn.Seesaw(3).seen, Tensor)
    assert_type(ltk.LOSSES["kps"].make(COUNTS)(logits, target), Tensor)
    kps = nn.KPS(torch.tensor(COUNTS), table_dtype=torch.float32)
    own = torch.ones(len(target))
    mixed = mixed + nn.ALA(COUNTS)(logits, target, sample_weight=own) + nn.LOS(smoothing=0.9)(logits, target)
    mixed = mixed + adjusted_cross_entropy(
        logits, target, sample_weight=own, label_smoothing=torch.zeros(3), label_scale=own[:3]
    )
    mixed = mixed + nn.InfluenceBalanced(COUNTS, detach=True)(logits, target, features=logits)
    mixed = mixed + nn.GCL(COUNTS, noise=0.3, seed=1)(torch.tanh(logits), target)
    mixed = mixed + nn.LADE(COUNTS, lam=0.1, importance="sample")(logits, target)
    mixed = mixed + lader(logits, target, torch.tensor([0.9, 0.02, 0.08]))
    weights = nn.DisAlign.class_weights(COUNTS, rho=1.2)
    mixed = mixed + nn.CrossEntropy(weight=weights)(nn.DisAlign(3, 3)(logits, logits), target)
    assert_type(sinkhorn(logits, [0.5, 0.2, 0.3]).iterations, int)
    hot = torch.nn.functional.one_hot(target, 3).bool()
    loss, gradients = ltk.functional.sigmoid_cross_entropy(logits, hot, statistics=True, positive=own[:3])
    assert_type(gradients, Tensor)
    assert_type(ltk.functional.sigmoid_cross_entropy(logits, target, threshold=0.5), Tensor)
    mixed = mixed + loss + nn.EQLv2(3)(logits, hot) + nn.ECM(COUNTS)(logits, target) + nn.ACSL(0.6)(logits, target)
    contrast = nn.ProCo(COUNTS, 3)
    mixed = mixed + contrast([logits, logits], target) + nn.DistributionBalanced(COUNTS, 600)(logits, hot)
    contrast.next_epoch()
    return mixed + kps(logits, target) + adjusted_cross_entropy(logits, target, shift=built.shift)


def head(features: Tensor, target: Tensor) -> Tensor:
    classifier = nn.CosineLinear(in_features=8, num_classes=3)
    assert_type(classifier(features), Tensor)
    criterion = nn.LDAM(COUNTS)
    held = criterion.from_features(features, classifier.weight, target, normalize=True)
    variances = nn.ClassVariances(8, 3).update(features, target)
    wide, weights = isda_head(features, classifier.weight, target, variances.variance, lam=0.5)
    held = held + linear_adjusted_cross_entropy(wide, weights, target)
    teacher, teacher_weight = torch.randn(len(target), 5), torch.randn(3, 5)
    apart = ltk.functional.linear_distillation(features, classifier.weight, teacher, teacher_weight, 2.0, chunk_rows=4)
    assert_type(apart, Tensor)
    held = held + apart + ltk.functional.linear_distillation(features, classifier.weight, teacher @ teacher_weight.T)
    return held + linear_adjusted_cross_entropy(features, classifier.weight, target, normalize=True, chunk_rows=4)


def data(features: Tensor) -> float:
    gain = ltk.diversity.feature_diversity_gain(features[:20], features[20:], centering="separate")
    picked = selection.select_subsets(features[:20], features[20:], [0, 10, 20, 44], m=2, mode="max")
    assert_type(picked, selection.Selection)
    images, mixed = ltk.augment.mixup(features, torch.zeros(len(features), dtype=torch.int64))
    assert_type(images, Tensor)
    _ = mixed
    knn = ltk.neighbors.KNeighborsClassifier(features, torch.arange(len(features)) % 3, k=3, balance=1.0)
    assert_type(knn.predict(features), Tensor)
    assert_type(ltk.neighbors.nearest_neighbors(features, features, 2), ltk.neighbors.Neighbors)
    assert_type(selection.sample_k_dpp(features, 2, seed=1), Tensor)
    logits = inference.logit_adjust(features[:, :3], COUNTS, tau=1.0)
    return float(gain) + float(logits.sum())


def training() -> str:
    config = ltk.train.Config(loss="ldam", head="cosine", epochs=3, schedule="drw")
    assert_type(config.epochs, int | None)
    return config.loss


if TYPE_CHECKING:

    def mistakes(logits: Tensor, target: Tensor) -> None:
        ltk.nn.LDAM()  # type: ignore[call-arg]
        ltk.nn.LDAM(COUNTS, max_margn=0.3)  # type: ignore[call-arg]
        ltk.nn.LDAMM(COUNTS)  # type: ignore[attr-defined]
        ltk.adjustments.ldamm(COUNTS)  # type: ignore[attr-defined]
        ltk.nn.Focal(gamma="2")  # type: ignore[arg-type]
        ltk.nn.LDAM(COUNTS, reduction=1)  # type: ignore[arg-type]
        ltk.nn.LDAM(COUNTS, margin=0.3)  # type: ignore[call-arg]
        ltk.nn.CosFace(COUNTS)  # type: ignore[arg-type]
        ltk.nn.LDAM(COUNTS)(logits)  # type: ignore[call-arg]
        _ = ltk.adjustments.kps(COUNTS).margins  # type: ignore[attr-defined]
        ltk.schedules.DRW(ltk.nn.LDAM, start=1)  # type: ignore[arg-type]
        _ = ltk.schedule  # type: ignore[attr-defined]
        ltk.train.Config(loss=3)  # type: ignore[arg-type]
        ltk.selection.select_subsets(logits, logits, [0, 1], mode="max")  # type: ignore[call-arg]
        ltk.nn.GCL(COUNTS, noise="a")  # type: ignore[arg-type]
        ltk.nn.LADE(COUNTS, lamb=0.1)  # type: ignore[call-arg]
        text: str = ltk.nn.LDAM(COUNTS)(logits, target)  # type: ignore[assignment]
        print(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 1])
    print(losses(torch.randn(4, 3, requires_grad=True), labels).item(), head(torch.randn(4, 8), labels).item())
    print(data(torch.randn(64, 8)), training())
