"""The page: sections of prose, tables and charts. Every name that comes from data goes through `escape`."""

import math
from collections.abc import Sequence
from html import escape
from statistics import mean, stdev
from typing import Any

from ltkernels.train.metrics import FEW_BELOW, GROUPS, MANY_ABOVE, RECALL_FLOOR
from ltkernels.train.report import analysis, charts
from ltkernels.train.report.parts import by_frequency, page, percent, table

# More small charts than this make a page that nobody reads; the table below them lists every class.
_MAX_PATHS = 12


def render(summary: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    """The page as a string, from the content of summary.json and the records of metrics.jsonl."""
    config = summary["config"]
    title = f"ltkernels {summary['command']}: {config['data']}, {config['loss']}"
    counts = summary["class_counts"]
    intro = (
        f"{sum(counts)} training samples in {len(counts)} classes, {max(counts)} to {min(counts)} a class; "
        f"{sum(summary['test_counts'])} test samples; seed {summary['seed']}; {summary['seconds']:.1f} s."
    )
    sections = [
        f"<h1>{escape(title)}</h1><p class=sub>{escape(intro)}</p>",
        _result(summary),
        _classes(summary),
        analysis.measures(summary),
        _selection(summary) if summary.get("tail", {}).get("classes") else "",
        analysis.tradeoff(summary),
        _confusions(summary),
        analysis.classifier(summary),
        analysis.feature_space(summary),
        _curves(summary, metrics),
        _what_was_run(summary),
        _definitions(summary),
    ]
    return page(title, sections)


def _compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    """A sentence on b against a: the difference with its standard error, and whether that is more than noise."""
    difference = b["balanced_accuracy"] - a["balanced_accuracy"]
    error = math.hypot(a["balanced_accuracy_se"], b["balanced_accuracy_se"])
    verdict = "beyond" if abs(difference) > 2 * error else "within"
    return (
        f"<li><b>{escape(b['title'])}</b> against <b>{escape(a['title'])}</b>: {100 * difference:+.1f} points "
        f"({percent(b['balanced_accuracy'])} against {percent(a['balanced_accuracy'])}), {verdict} twice the "
        f"standard error of {100 * error:.1f} points.</li>"
    )


def _result(summary: dict[str, Any]) -> str:
    variants = summary["variants"]
    groups = summary["groups"]
    head = ["variant", "balanced<br>accuracy", "± s.e.", "top-1"]
    head += [f"{name}<small>{_classes_in(groups[name])}</small>" for name in GROUPS]
    head += ["FDG tail", "best epoch<small>on test</small>"]
    rows = []
    for v in variants:
        fdg = "&ndash;" if v["fdg_tail"] is None else f"{v['fdg_tail']:.3f}"
        row = [escape(v["title"]), f"<b>{percent(v['balanced_accuracy'])}</b>", percent(v["balanced_accuracy_se"])]
        row += [percent(v["top1"]), *(_group(v["groups"][name]) for name in GROUPS)]
        rows.append([*row, fdg, percent(v["best_balanced_accuracy"])])
    chosen = next(i for i, v in enumerate(variants) if v["name"] == summary["chosen"])
    by_name = {v["name"]: v for v in variants}
    comparisons = []
    if summary["chosen"] != "ce" and "ce" in by_name:
        comparisons.append(_compare(by_name["ce"], variants[chosen]))
    if "retrained" in by_name:
        comparisons += [_compare(by_name["retrained"], v) for v in variants if v["fdg_tail"] is not None]
        selected = [v for v in variants if v["fdg_tail"] is not None and v["name"] != "fdc-random"]
        comparisons += [_compare(by_name["fdc-random"], v) for v in selected if "fdc-random" in by_name]
    return (
        "<h2>Result</h2><p>Last epoch, balanced test accuracy and its parts in per cent.</p>"
        f"{table(head, rows, chosen)}<ul>{''.join(comparisons)}</ul>{_random_spread(summary)}"
        "<p class=note>One seed shows what this run did, not what the method does. The standard error covers the "
        "finite test set alone (it treats the two results as independent, which overstates it on a shared test set); "
        "another seed changes initialisation, batch order and synthesis, often by as much. Repeat with several "
        "<code>--seed</code> values before you prefer one variant; the test set stays the same.</p>"
    )


def _group(group: dict[str, Any]) -> str:
    error = group.get("se")
    return percent(group["accuracy"]) + ("" if error is None else f"<small>± {percent(error)}</small>")


def _classes_in(group: dict[str, Any]) -> str:
    size = len(group["classes"])
    return f"{size} class{'' if size == 1 else 'es'}"


def _random_spread(summary: dict[str, Any]) -> str:
    repeats = summary.get("random_repeats") or []
    if len(repeats) < 2 or not summary["tail"]["classes"]:
        return ""
    accuracy = [100 * r["balanced_accuracy"] for r in repeats]
    fdg = [r["fdg_tail"] for r in repeats]
    return (
        f"<p>{len(repeats)} random selections from the same pools: balanced accuracy {mean(accuracy):.1f} ± "
        f"{stdev(accuracy):.1f} ({min(accuracy):.1f} to {max(accuracy):.1f}), FDG tail {mean(fdg):.3f} ± "
        f"{stdev(fdg):.3f} (mean ± standard deviation). The table shows the first of them.</p>"
    )


def _classes(summary: dict[str, Any]) -> str:
    variants = [(v["title"], v["per_class_accuracy"]) for v in summary["variants"]]
    chart = charts.counts_and_accuracy(summary["class_names"], summary["class_counts"], by_frequency(summary), variants)
    return (
        "<h2>Class counts and per-class accuracy</h2>"
        f"{charts.legend([title for title, _ in variants])}<div class=scroll>{chart}</div>"
    )


def _selection(summary: dict[str, Any]) -> str:
    tail, names = summary["tail"], summary["class_names"]
    arms = list(dict.fromkeys([tail["selected"], "random-0"]))
    # The augmented variants come last and in the order of the arms; an arm has its variant's colour.
    colors = list(range(len(summary["variants"]) - len(arms), len(summary["variants"])))
    labels = [summary["variants"][color]["title"] for color in colors]
    rows, paths = [], []
    for entry in tail["classes"]:
        count = summary["class_counts"][entry["label"]]
        rows.append(
            [
                *(escape(str(v)) for v in (names[entry["label"]], count, entry["need"], entry["pool"])),
                *(escape(names[entry["similar_head"]]), *(_gain(entry["arms"][arm]) for arm in arms)),
            ]
        )
        if len(paths) < _MAX_PATHS:
            series = [(arm, [(0.0, 0.0), *map(tuple, entry["arms"][arm]["path"])]) for arm in arms]
            title = f"class {names[entry['label']]} ({count} samples)"
            paths.append(charts.lines(title, "synthetic samples added", series, colors, width=310))
    head = ["tail class", "samples", "added", "pool", "spread of<small>head class</small>"]
    head += [f"FDG<small>{escape(arm)}</small>" for arm in arms]
    targets = [entry["target"]["fdg"] for entry in tail["classes"] if entry.get("target")]
    cap = (
        f" FDG is capped at what real samples of head classes bring, {min(targets):.3f} to {max(targets):.3f}."
        if targets
        else ""
    )
    offset = (
        " The offset is the distance of the added samples' mean from the real ones' in standard errors of that mean: FDG hardly "
        "sees it, a classifier does; above 3 it is called far."
    )
    shown = (
        "" if len(tail["classes"]) <= _MAX_PATHS else f" The first {_MAX_PATHS} of {len(tail['classes'])} are drawn."
    )
    return (
        "<h2>Completing the tail: feature diversity gain</h2>"
        f"<p>{len(tail['head_classes'])} head classes hold more than {percent(summary['config']['head_ratio'], 0)} % "
        f"of the samples. Each tail class gets a pool of synthetic features (FDC, in the feature space of the "
        f"{escape(tail['features_from'])} training), from which it is filled up to the largest class.{cap}{offset}{shown}</p>"
        f"{charts.line_legend(labels, colors)}<div class=row>{''.join(paths)}</div>{table(head, rows)}"
    )


def _gain(arm: dict[str, Any]) -> str:
    """FDG of an arm with its offset, which FDG does not see; runs of older versions have no offset."""
    if "offset" not in arm:
        return f"{arm['fdg']:.3f}"
    return f"{arm['fdg']:.3f}<small>offset {arm['offset']:.1f}{' (far)' if arm['far'] else ''}</small>"


def _confusions(summary: dict[str, Any]) -> str:
    order, names = by_frequency(summary), summary["class_names"]
    if len(order) > charts.MOST_CELLS:
        chosen = next(v for v in summary["variants"] if v["name"] == summary["chosen"])
        return (
            f"<h2>Confusions</h2><p>The most frequent of {escape(chosen['title'])}; all are in tables/confusion.csv.</p>"
            f"{analysis.top_confusions(chosen['confusion'], names)}"
        )
    drawn = "".join(charts.confusion(v["title"], v["confusion"], names, order) for v in summary["variants"])
    return (
        "<h2>Confusion matrices</h2><p>Classes from the most to the least frequent in training; counts of test "
        f"samples, shaded by their share of the row.</p><div class=row>{drawn}</div>"
    )


def _curves(summary: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    names = {v["name"]: i for i, v in enumerate(summary["variants"])}
    panels = []
    for stage, title in (("train", "training"), ("retrain", "classifier's retraining")):
        phases = {f"{stage}/{name}": color for name, color in names.items()}
        series: dict[str, list[dict[str, Any]]] = {}
        for record in metrics:
            if record["phase"] in phases:
                series.setdefault(record["phase"], []).append(record)
        for key, what, factor in (
            ("test_balanced_accuracy", "balanced test accuracy, %", 100),
            ("train_loss", "training loss", 1),
        ):
            drawn = [
                (p, [(float(r["epoch"]), factor * r.get(key, r.get("val_balanced_accuracy"))) for r in records])
                for p, records in series.items()
            ]
            if drawn:
                panels.append(charts.lines(f"{title}: {what}", "epoch", drawn, [phases[p] for p in series]))
    legend = charts.line_legend([v["title"] for v in summary["variants"]], list(names.values()))
    return (
        f"<h2>Training curves</h2>{legend}<div class=row>{''.join(panels)}</div>"
        "<p class=note>Training losses of different variants are different functions; compare their shapes only.</p>"
    )


def _what_was_run(summary: dict[str, Any]) -> str:
    config = [[escape(k), "&ndash;" if v is None else escape(str(v))] for k, v in summary["config"].items()]
    half = (len(config) + 1) // 2
    machine = [[escape(k), escape(str(v))] for k, v in summary["environment"].items()]
    times = [
        (v["title"], (v["seconds"] - v["evaluation_seconds"], v["evaluation_seconds"], 0.0))
        for v in summary["variants"]
    ]
    rest = max(0.0, summary["seconds"] - sum(v["seconds"] for v in summary["variants"]))
    times.append(("all else: data, selection, further runs", (0.0, 0.0, rest)))
    return (
        "<h2>What was run</h2><div class=row>"
        f"{table(['setting', 'value'], config[:half])}{table(['setting', 'value'], config[half:])}"
        f"<div>{table(['environment', ''], machine)}</div></div>"
        f"<h2>Where the time went</h2><div class=scroll>{charts.times(times, ('training steps', 'evaluation', 'other'))}</div>"
    )


def _definitions(summary: dict[str, Any]) -> str:
    terms = {
        "balanced accuracy": "mean over classes of the share of the class's test samples predicted right. Last epoch.",
        "± s.e.": "standard error of the balanced accuracy from the finite test set (binomial per class), in points.",
        "top-1": "share of all test samples predicted right; equal to balanced accuracy on a balanced test set.",
        "best epoch": "the highest balanced accuracy of any epoch. It is chosen on the test set: optimistic, and no "
        "result; shown to tell overfitting from failure.",
        "worst class": "the lowest per-class accuracy, and whose it is.",
        "G-mean, harmonic mean": "geometric and harmonic mean of the per-class accuracies; an accuracy below "
        f"{percent(RECALL_FLOOR)} % counts as {percent(RECALL_FLOOR)} %, or one hopeless class would make the mean 0.",
        "macro-F1": "mean over classes of 2 TP / (2 TP + FP + FN).",
        "ECE": "expected calibration error: how far confidence is from accuracy, mean over 15 bins of confidence. Of softmax "
        "over the logits that the classifier predicts with; n/a where these are bare cosines.",
        "variance of row norms": "variance of the L2 norms of the classifier's rows, one row a class; none for a "
        "cosine classifier, which divides by them.",
        "many, medium, few": f"classes with more than {MANY_ABOVE}, {FEW_BELOW} to {MANY_ABOVE}, and fewer than "
        f"{FEW_BELOW} training samples; mean of their classes' accuracies, ± its standard error as above; n/a for an empty "
        "group.",
        "feature diversity V": "V(F) = ½ log2 det(I + F Fᵀ / n) of n mean-centred feature vectors F.",
    }
    if "tail" in summary:
        terms |= {
            "head and tail": "the head is the shortest run of largest classes that holds more than head_ratio of the "
            "training samples; the rest is the tail.",
            "FDG": "feature diversity gain: V(original and added) / V(original) - 1, centred by the joint mean. 0: the "
            "added samples change nothing; positive: they widen the class; negative: they narrow it.",
            "FDG tail": "mean of FDG over the tail classes.",
            "FDC": "synthetic features of a tail class: Gaussian with the class's own mean and the covariance of the "
            "most similar head class.",
            "classifier retrained, no augmentation": "the control: the same features, the same retraining, no "
            "synthetic samples. What an augmented variant gains over it is due to the augmentation.",
        }
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<h2>Definitions</h2><dl>{items}</dl>"
