"""Sections of the report that look behind the accuracies: further measures, classifier norms, the feature space, FDG."""

import heapq
from collections.abc import Sequence
from html import escape
from typing import Any

from ltkernels.train.metrics import GROUPS, group_of
from ltkernels.train.report import charts, plots
from ltkernels.train.report.parts import by_frequency, percent, table

_MOST_PAIRS = 40


def measures(summary: dict[str, Any]) -> str:
    """A table of one-number summaries; empty for the summary of an older run."""
    variants = [v for v in summary["variants"] if "g_mean" in v]
    if not variants:
        return ""
    head = ["variant", "worst class", "G-mean", "harmonic<br>mean", "macro-F1", "ECE"]
    head.append("variance of<br>row norms<small>classifier</small>")
    rows = []
    for v in variants:
        worst = v["worst_class"]
        norms = v.get("classifier_norm_variance")
        row = [
            escape(v["title"]),
            f"{percent(worst['accuracy'])}<small>{escape(summary['class_names'][worst['label']])}</small>",
        ]
        row += [percent(v[key]) for key in ("g_mean", "harmonic_mean", "macro_f1")]
        row += [percent(v.get("ece")), "&ndash;" if norms is None else f"{norms:.3g}"]
        rows.append(row)
    return f"<h2>Further measures</h2><p>Last epoch, in per cent, but for the variance.</p>{table(head, rows)}"


def classifier(summary: dict[str, Any]) -> str:
    """Norms of the classifiers' rows against the class counts."""
    variants = [(i, v) for i, v in enumerate(summary["variants"]) if v.get("classifier_norms")]
    if not variants:
        return ""
    counts, names = summary["class_counts"], summary["class_names"]
    series = []
    for _, v in variants:
        mean = sum(v["classifier_norms"]) / len(counts) or 1.0
        relative = [norm / mean for norm in v["classifier_norms"]]
        tips = [f"{names[c]}, {counts[c]} samples: {relative[c]:.2f}" for c in range(len(counts))]
        series.append((v["title"], list(zip(map(float, counts), relative)), tips))
    colors = [i for i, _ in variants]
    chart = plots.points(
        "classifier row norms",
        "training samples of the class",
        "norm over the mean norm of the classifier",
        series,
        colors,
        log_x=True,
        size=(900, 320),
    )
    legend = charts.legend([v["title"] for _, v in variants], colors)
    return (
        "<h2>Classifier norms against counts</h2><p>Plain training gives frequent classes longer rows, and with them "
        f"larger logits; a flat cloud has no such preference.</p>{legend}<div class=scroll>{chart}</div>"
    )


def feature_space(summary: dict[str, Any]) -> str:
    """Per-class diversity against counts, class similarity, and a plane of test features."""
    space = summary.get("features")
    if not space:
        return ""
    counts, names, order = summary["class_counts"], summary["class_names"], by_frequency(summary)
    known = [c for c in range(len(counts)) if space["class_diversity"][c] is not None]
    tips = [f"{names[c]}, {counts[c]} samples: {space['class_diversity'][c]:.2f}" for c in known]
    pairs = [(float(counts[c]), space["class_diversity"][c]) for c in known]
    diversity = plots.points(
        "feature diversity V of the classes",
        "training samples of the class",
        "V, log2 units",
        [("", pairs, tips)],
        [0],
        log_x=True,
    )
    # Features of different seeds live in different spaces: there is no mean of them.
    seed = f" Seed {summary['seeds'][0]} alone." if "seeds" in summary else ""
    if len(order) > charts.MOST_CELLS:
        similarity = _most_alike(space["class_similarity"], names)
    else:
        similarity = plots.matrix(
            "similarity of the classes",
            space["class_similarity"],
            names,
            order,
            "cosine of mean features, frequent classes first; blue: alike, brown: opposed",
        )
    return (
        f"<h2>Feature space</h2><p>Training features, before the classifier. V is how much a class holds, a count only how "
        f"often it occurs: classes of one size can differ widely.{seed}</p><div class=row>{diversity}{_embedding(summary)}</div>"
        f"<div class=scroll>{similarity}</div>"
    )


def _most_alike(similarity: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """The pairs of largest cosine, where a matrix would be too large."""
    pairs = ((similarity[a][b], a, b) for a in range(len(names)) for b in range(a))
    rows = [[escape(names[a]), escape(names[b]), f"{value:.2f}"] for value, a, b in heapq.nlargest(_MOST_PAIRS, pairs)]
    return f"<h3>The {len(rows)} pairs of classes most alike</h3>{table(['class', 'class', 'cosine of mean features'], rows)}"


def top_confusions(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The most frequent confusions as a table, where a matrix would be too large."""
    cells = ((count, t, p) for t, row in enumerate(matrix) for p, count in enumerate(row) if count and t != p)
    rows = [
        [escape(names[t]), escape(names[p]), str(count), percent(count / max(1, sum(matrix[t])))]
        for count, t, p in heapq.nlargest(_MOST_PAIRS, cells)
    ]
    return table(["true class", "predicted as", "samples", "% of the class"], rows)


def _embedding(summary: dict[str, Any]) -> str:
    if summary["features"]["embedding"] is None:
        return ""
    space, counts, names = summary["features"]["embedding"], summary["class_counts"], summary["class_names"]
    series, colors = [], []
    for i, group in enumerate(GROUPS):
        rows = [j for j, c in enumerate(space["label"]) if group_of(counts[c]) == group]
        if rows:
            placed = [(space["x"][j], space["y"][j]) for j in rows]
            series.append((group, placed, [names[space["label"][j]] for j in rows]))
            colors.append(i)
    chart = plots.points(
        "test features, plane of largest variance",
        "marks as in the legend; point at one for its class",
        "",
        series,
        colors,
        bare=True,
        radius=2.6,
    )
    legend = charts.legend(
        [f"classes with {_what(name)} training samples" for name, _, _ in series], colors, column=440
    )
    return f"<div>{chart}<br>{legend}</div>"


def _what(group: str) -> str:
    return {"many": "many (more than 100)", "medium": "a medium number of", "few": "few (fewer than 20)"}[group]


def tradeoff(summary: dict[str, Any]) -> str:
    """FDG of the completed tail against balanced accuracy, with the random repeats; empty where there is nothing to compare."""
    drawn = [(i, v) for i, v in enumerate(summary["variants"]) if v["fdg_tail"] is not None]
    repeats = [r for r in summary.get("random_repeats") or [] if r["fdg_tail"] is not None]
    if len(drawn) + len(repeats) < 3:
        return ""
    series: list[tuple[str, list[tuple[float, float]], list[str]]] = []
    colors, errors = [], []
    # Of one seed, the first repeat is the random variant itself; of several, that is their mean.
    others = [(r["fdg_tail"], 100 * r["balanced_accuracy"]) for r in (repeats if "seeds" in summary else repeats[1:])]
    random = next((i for i, v in drawn if v["name"] == "fdc-random"), None)
    if others and random is not None:
        series.append(("another random selection", others, _tips(others)))
        colors.append(random)
        errors.append([0.0] * len(others))
    for i, v in drawn:
        here = [(v["fdg_tail"], 100 * v["balanced_accuracy"])]
        series.append((v["title"], here, _tips(here)))
        colors.append(i)
        errors.append([100 * v["balanced_accuracy_se"]])
    chart = plots.points(
        "completed tails",
        "mean FDG of the tail classes",
        "balanced accuracy, %",
        series,
        colors,
        errors=errors,
        size=(640, 300),
    )
    names = [v["title"] for _, v in drawn]
    return (
        "<h2>FDG against accuracy</h2><p>Bars are one standard error from the finite test set; marks without a bar "
        f"are further random selections.</p>{charts.legend(names, [i for i, _ in drawn])}{chart}"
    )


def _tips(pairs: Sequence[tuple[float, float]]) -> list[str]:
    return [f"FDG {fdg:.3f}, {accuracy:.1f} %" for fdg, accuracy in pairs]
