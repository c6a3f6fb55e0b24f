"""The data-centric audit: what a labelled set of features holds, before anything is trained on it.

    from ltkernels.train.report import audit, render_audit
    page = render_audit(audit(features, labels, class_names=names))

Counts and diversity per class, samples whose label looks wrong (with cleanlab, where it is installed), and how far the classes
moved between two sets of features, such as last month's data and today's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltkernels._arrays import each_once
from ltkernels._features import as_tensor, check_integers, check_reals, check_seed
from ltkernels.diversity import FeatureStatistics, feature_diversity
from ltkernels.train.features import derived_seed
from ltkernels.train.metrics import feature_drift
from ltkernels.train.report.charts import points
from ltkernels.train.report.page import by_frequency, page, percent, table
from ltkernels.train.rundir import check_file, write_text
from ltkernels.train.select import check_labelled, load_features

FOLDS = 5
_MAX_SUSPECTS = 100
# Rows looked at together: a memory-mapped file is never read whole.
_BLOCK = 1 << 16


def out_of_sample_probabilities(features: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """(n, C) float64: each sample's class probabilities from a logistic regression that has not seen it.

    Up to 5 stratified folds, as many as the rarest class has samples; features are standardised in each. Raises ImportError
    without scikit-learn, ValueError where a class has one sample.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError('probabilities from folds need scikit-learn: pip install "ltkernels[train]"') from error
    rarest = int(torch.bincount(labels, minlength=num_classes).min())
    if rarest < 2:
        raise ValueError("every class needs 2 samples: one to learn from, one to look at")
    x, y = features.double().cpu().numpy(), labels.cpu().numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    seed = check_seed(seed)
    if seed >= 2**32:  # more than scikit-learn takes
        seed = derived_seed(seed) % 2**32
    folds = StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed)
    return torch.from_numpy(cross_val_predict(model, x, y, cv=folds, method="predict_proba"))


def suspected_label_errors(labels: Tensor, probabilities: Tensor) -> list[dict[str, Any]] | None:
    """Samples whose label cleanlab (Northcutt et al. 2021) takes for wrong, least credible first: {index, label, suggested,
    confidence}, the confidence being the probability of the label given. None where cleanlab is not installed.

    `probabilities` (n, C) must come from models that have not seen the samples.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        return None
    given, p = labels.cpu().numpy(), probabilities.double().cpu().numpy()
    ranked = find_label_issues(given, p, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [
        {"index": int(i), "label": int(given[i]), "suggested": int(p[i].argmax()), "confidence": float(p[i, given[i]])}
        for i in ranked
    ]


def audit(
    features: Any,
    labels: Any,
    *,
    class_names: Sequence[Any] | None = None,
    probabilities: Any = None,
    other: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Audit a labelled set of features; plain values, ready for JSON and for `render_audit`.

    Args:
        features: (n, d) floating, memory-mapped if you like: counts, diversity and drift go through them a class at a time
            (finding label errors without `probabilities` takes a float64 copy); labels: (n,) integers, every class 0..C-1 with
            at least one sample; tensors or NumPy arrays, all of them.
        class_names: C different names, text or bytes; None numbers them.
        probabilities: (n, C) out-of-sample class probabilities of your own; None takes `out_of_sample_probabilities`.
        other: a second set (features (m, d), labels (m,)) to look for drift in; None leaves that out.
        seed: of the folds.

    Returns:
        class_names, class_counts, class_diversity; label_errors (None: not looked for) with label_errors_note, which says why
        not or how; drift (None without `other`), as `metrics.feature_drift`. Raises TypeError or ValueError naming the argument.
    """
    features, labels = as_tensor(features, "features"), check_integers(labels, "labels")
    _check("features", features, labels)
    counts = torch.bincount(labels).tolist()
    num_classes = len(counts)
    if 0 in counts:
        raise ValueError(f"labels holds no sample of class {counts.index(0)}")
    names = [str(c) for c in range(num_classes)] if class_names is None else list(each_once(class_names))
    if len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} entries, labels has {num_classes} classes")
    probabilities = None if probabilities is None else check_reals(probabilities, "probabilities")
    if probabilities is not None and probabilities.shape != (len(labels), num_classes):
        raise ValueError(
            f"probabilities has shape {tuple(probabilities.shape)}; it must be ({len(labels)}, {num_classes})"
        )
    check_seed(seed)
    drift = None
    if other is not None:
        other = as_tensor(other[0], "other"), check_integers(other[1], "other")
        _check("other", *other)
        if other[0].shape[1] != features.shape[1] or int(other[1].max()) >= num_classes:
            raise ValueError(f"other must have {features.shape[1]} features and labels below {num_classes}")
        drift = feature_drift((features, labels), other, num_classes)
    errors, note = _label_errors(features, labels, counts, probabilities, seed)
    return {
        "class_names": names,
        "class_counts": counts,
        "class_diversity": _class_diversity(features, labels, counts),
        "label_errors": errors,
        "label_errors_note": note,
        "drift": drift,
    }


def audit_file(
    path: str | Path, *, out: str | Path, other: str | Path | None = None, force: bool = False, seed: int = 0
) -> dict[str, Any]:
    """`audit` of an .npz file with `features` (n, d) and `labels` (n,), and optionally `class_names` (C,) and `probabilities`
    (n, C); writes the page to the file `out`.

    `other` is a second such file to look for drift in. Raises FileExistsError where `out` is there and `force` is not given,
    FileNotFoundError, or ValueError naming the file; nothing has been written then.
    """
    path, out = Path(path), Path(out)
    check_file(out, force)
    arrays = load_features(path, None, ("probabilities",))
    labelled, second = check_labelled(path, arrays, "features", "labels"), None
    if other is not None:
        second = check_labelled(Path(other), load_features(Path(other)), "features", "labels")
    try:
        result = audit(
            *labelled,
            class_names=arrays["class_names"].ravel().tolist() if "class_names" in arrays else None,
            probabilities=_probabilities(arrays),
            other=second,
            seed=seed,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render_audit(result, f"Data audit: {path.name}"))
    return result


def _class_diversity(features: Tensor, labels: Tensor, counts: Sequence[int]) -> list[float]:
    """V of every class: from statistics that its rows are streamed into, or at once where it has fewer rows than features."""
    values = []
    for own in torch.argsort(labels, stable=True).split(list(counts)):
        if len(own) < features.shape[1]:
            values.append(float(feature_diversity(features[own])))
            continue
        statistics = FeatureStatistics(features.shape[1])
        for part in own.split(_BLOCK):
            statistics.update(features[part])
        values.append(float(statistics.diversity()))
    return values


def _probabilities(arrays: dict[str, np.ndarray]) -> Tensor | None:
    if "probabilities" not in arrays:
        return None
    if arrays["probabilities"].dtype.kind != "f":
        raise ValueError(f"probabilities must be floating, got {arrays['probabilities'].dtype}")
    return torch.from_numpy(arrays["probabilities"].astype(np.float64))


def _label_errors(
    features: Tensor, labels: Tensor, counts: Sequence[int], probabilities: Tensor | None, seed: int
) -> tuple[list[dict[str, Any]] | None, str]:
    how = "from probabilities that were given"
    if probabilities is None:
        if min(counts) < 2:
            return None, "not looked for: a class has a single sample, which no other can judge"
        how = f"from a logistic regression on the features in {min(FOLDS, *counts)} folds"
    try:
        import cleanlab
    except ImportError:
        return None, "not looked for: cleanlab is not installed (pip install cleanlab)"
    if probabilities is None:
        probabilities = out_of_sample_probabilities(features, labels, len(counts), seed)
    return suspected_label_errors(labels, probabilities), f"cleanlab {cleanlab.__version__}, {how}"


def _check(name: str, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
        raise ValueError(f"{name}: features must be floating (n, d), got {features.dtype} {tuple(features.shape)}")
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1] or int(labels.min()) < 0:
        raise ValueError(f"{name}: labels must be ({len(features)},) int64 and not negative")
    if int(labels.max()) >= len(labels):
        # Before a table of all classes is made: one forged label would make it as large as it likes.
        raise ValueError(f"{name}: labels reach {int(labels.max())}, of {len(labels)} samples: some class has none")
    if not all(bool(torch.isfinite(part).all()) for part in features.split(_BLOCK)):
        raise ValueError(f"{name}: features holds NaN or infinite values")


def render_audit(result: dict[str, Any], title: str = "Data audit") -> str:
    """The audit as one self-contained HTML page."""
    names, counts, errors = result["class_names"], result["class_counts"], result["label_errors"]
    pairs = list(zip(counts, result["class_diversity"]))
    head = ["sample", "label", "looks like", "probability of its label, %"]
    suspects = [
        [str(e["index"]), names[e["label"]], names[e["suggested"]], percent(e["confidence"])]
        for e in (errors or [])[:_MAX_SUSPECTS]
    ]
    return page(
        "audit.html",
        title=title,
        intro=f"{sum(counts)} samples in {len(counts)} classes, {max(counts)} to {min(counts)} a class.",
        chart=points("diversity against counts", "samples of the class", "V, log2 units", [("", pairs, 0)], log_x=True),
        classes=_classes(result),
        note=result["label_errors_note"],
        found=len(errors or []),
        suspects=None if errors is None else table("suspected label errors", head, suspects),
        drift=None if result["drift"] is None else _drift(names, result["drift"]),
    )


def _classes(result: dict[str, Any]) -> dict[str, Any]:
    names, counts, diversity = result["class_names"], result["class_counts"], result["class_diversity"]
    known, wrong = result["label_errors"] is not None, [0] * len(counts)
    for suspect in result["label_errors"] or []:
        wrong[suspect["label"]] += 1
    rows = [
        [
            names[c],
            {"text": counts[c], "key": counts[c], "bar": counts[c] / max(counts)},
            f"{diversity[c]:.2f}",
            wrong[c] if known else "\u2013",
        ]
        for c in by_frequency(counts)
    ]
    return table("classes", ["class", "samples", "V", "suspected label errors"], rows, sortable=True)


def _drift(names: Sequence[str], drift: dict[str, Any]) -> dict[str, Any]:
    def shown(value: float | None, digits: int = 2) -> dict[str, Any]:
        return {"text": "n/a", "key": -1} if value is None else {"text": f"{value:.{digits}f}", "key": value}

    rows = [
        [
            names[c],
            shown(drift["shift"][c], 1),
            shown(drift["diversity_ratio"][c]),
            percent(drift["share_before"][c]),
            percent(drift["share_after"][c]),
        ]
        for c in sorted(range(len(names)), key=lambda c: -(drift["shift"][c] or 0.0))
    ]
    head = ["class", "shift", "V after / before", "share before, %", "share after, %"]
    return table("drift", head, rows, sortable=True)
