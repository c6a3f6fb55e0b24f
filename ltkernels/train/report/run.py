"""report.html: what a run found, from summary.json and the records of metrics.jsonl alone."""

import heapq
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ltkernels.diversity import FAR
from ltkernels.selection._arms import arm_name
from ltkernels.train.metrics import FEW_BELOW, GROUPS, MANY_ABOVE, RECALL_FLOOR, difference, group_of
from ltkernels.train.report import charts
from ltkernels.train.report.drawing import Chart, readable
from ltkernels.train.report.page import bar, by_frequency, page, percent, table

# More small charts than this make a page that nobody reads; the table below them lists every class.
_MAX_PATHS = 12
_MOST_PAIRS = 40
_DASH = "\u2013"

Summary = dict[str, Any]


def render(summary: Summary, metrics: Sequence[dict[str, Any]]) -> str:
    """The page as a string, from the content of summary.json and the records of metrics.jsonl."""
    config, counts = summary["config"], summary["class_counts"]
    seeds = summary.get("seeds")
    of = f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {summary['seed']}"
    drawn = _charts(summary, metrics)
    return page(
        "run.html",
        title=f"ltkernels {summary['command']}: {config['data']}, {config['loss']}",
        intro=f"{sum(counts)} training samples in {len(counts)} classes, {max(counts)} to {min(counts)} a class; "
        f"{sum(summary['test_counts'])} test samples; {of}; {summary['seconds']:.1f} s.",
        notes=summary.get("notes", []),
        seeds=seeds,
        charts=drawn,
        results=_results(summary),
        comparisons=_comparisons(summary),
        selections=_selections(summary),
        class_table=_class_table(summary),
        measures=_measures(summary),
        tail=_tail(summary) if _has_tail(summary) else None,
        confusions=None if drawn["confusions"] else _top_confusions(summary),
        space=_space(summary, drawn) if summary.get("features") else None,
        times=_times(summary),
        settings=table("settings", ["setting", "value"], [[k, _DASH if v is None else v] for k, v in config.items()]),
        environment=table("environment", ["environment", "|"], [[k, v or _DASH] for k, v in summary["environment"].items()]),
        head_ratio=config.get("head_ratio"),
        recall_floor=RECALL_FLOOR,
        many_above=MANY_ABOVE,
        few_below=FEW_BELOW,
    )  # fmt: skip


def save_pngs(summary: Summary, metrics: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every chart of a run's page to `folder` (made where missing) as NN-title.png; returns the paths.

    Files of the same names are replaced. A class whose name is in letters that no font of this machine has is shown by its number.
    Raises OSError where the folder cannot be written.
    """
    drawn = _charts({**summary, "class_names": readable(summary["class_names"])}, metrics)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for found in drawn.values():
        for chart in found if isinstance(found, list) else [] if found is None else [found]:
            slug = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")[:60]
            paths.append(folder / f"{len(paths) + 1:02d}-{slug or 'chart'}.png")
            chart.png(paths[-1])
    return paths


def _charts(summary: Summary, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every chart of the page, by its place there; None or an empty list where the run has nothing for it."""
    names, counts, variants = summary["class_names"], summary["class_counts"], summary["variants"]
    order = by_frequency(counts)
    space = summary.get("features") or {}
    matrices = len(order) <= charts.MOST_CELLS
    recalls = [(v["title"], v["per_class_accuracy"]) for v in variants]
    return {
        "classes": charts.classes("class counts beside per-class accuracy", names, counts, order, recalls),
        "reliability": _reliability(summary),
        "paths": _paths(summary) if _has_tail(summary) else [],
        "tradeoff": _tradeoff(summary),
        "confusions": [
            charts.matrix_of_confusions(f"confusions of {v['title']}", v["confusion"], names, order)
            for v in (variants if matrices else [])
        ],
        "norms": _norms(summary),
        "diversity": _diversity(counts, space["class_diversity"]) if space else None,
        "plane": _plane(space["embedding"], counts) if space and space["embedding"] is not None else None,
        "similarity": charts.matrix_of_cosines("similarity of the classes", space["class_similarity"], names, order)
        if space and matrices
        else None,
        "curves": _curves(summary, metrics),
    }  # fmt: skip


def _has_tail(summary: Summary) -> bool:
    return bool(summary.get("tail", {}).get("classes"))


def _results(summary: Summary) -> dict[str, Any]:
    variants, groups = summary["variants"], summary["groups"]
    head = ["variant", "balanced accuracy", "± s.e.", "top-1", *(f"{g}|{_classes_in(groups[g])}" for g in GROUPS)]
    rows = []
    for v in variants:
        spread = v.get("std", {}).get("balanced_accuracy")
        headline = {"text": percent(v["balanced_accuracy"]), "strong": True}
        if spread is not None:
            headline["small"] = f"± {percent(spread)}"
        parts = [_group(v["groups"][name]) for name in GROUPS]
        fdg = _DASH if v["fdg_tail"] is None else f"{v['fdg_tail']:.3f}"
        best = percent(v["best_balanced_accuracy"])
        rows.append([v["title"], headline, percent(v["balanced_accuracy_se"]), percent(v["top1"]), *parts, fdg, best])
    chosen = next(i for i, v in enumerate(variants) if v["name"] == summary["chosen"])
    return table("results", [*head, "FDG tail", "best epoch|on test"], rows, marked=chosen)


def _group(group: dict[str, Any]) -> dict[str, Any]:
    error = group.get("se")
    return {"text": percent(group["accuracy"]), **({} if error is None else {"small": f"± {percent(error)}"})}


def _classes_in(group: dict[str, Any]) -> str:
    size = len(group["classes"])
    return f"{size} class{'' if size == 1 else 'es'}"


def _comparisons(summary: Summary) -> list[dict[str, Any]]:
    """Differences with their standard errors, and whether they are more than noise."""
    by_name = {v["name"]: v for v in summary["variants"]}
    pairs = []
    if summary["chosen"] != "ce" and "ce" in by_name:
        pairs.append((by_name["ce"], by_name[summary["chosen"]]))
    completed = [v for v in summary["variants"] if v["fdg_tail"] is not None]
    if "retrained" in by_name:  # the chosen selection is the first of them
        pairs += [(by_name["retrained"], v) for v in completed[:1]]
    found = []
    for theirs, ours in pairs:
        more = ours["balanced_accuracy"] - theirs["balanced_accuracy"]
        error = math.hypot(theirs["balanced_accuracy_se"], ours["balanced_accuracy_se"])
        beyond = "beyond" if abs(more) > 2 * error else "no difference shown: within"
        found.append({"ours": ours, "theirs": theirs, "difference": 100 * more, "beyond": beyond, "error": error})
    return found


def _selections(summary: Summary) -> dict[str, Any] | None:
    """Every way to choose the added samples, its draws against random ones and against none; None where nothing was completed."""
    repeats, seeds = summary.get("repeats"), summary.get("seeds")
    if not repeats or not _has_tail(summary):
        return None
    control = next(v for v in summary["variants"] if v["name"] == "retrained")
    random = _of_draws(repeats["random"], "balanced_accuracy")
    none = [control["balanced_accuracy"]] * len(random)
    if seeds:
        none = [v["balanced_accuracy"] for run in summary["runs"] for v in run["variants"] if v["name"] == "retrained"]
    tail = [control["per_class_accuracy"][entry["label"]] for entry in summary["tail"]["classes"]]
    rows: list[list[Any]] = [["no augmentation", percent(mean(none)), _DASH, _DASH, percent(mean(tail)), _DASH, _DASH]]
    for (mode, draws), (_, title, _) in zip(repeats.items(), _arms(summary)):
        accuracy, offset = _of_draws(draws, "balanced_accuracy"), mean(_of_draws(draws, "offset_tail"))
        against = _DASH if mode == "random" else _paired(accuracy, random)
        row: list[Any] = [title, percent(mean(accuracy)), against, _paired(accuracy, none)]
        row += [percent(mean(_of_draws(draws, "tail_accuracy"))), f"{mean(_of_draws(draws, 'fdg_tail')):.3f}"]
        rows.append([*row, {"text": f"{offset:.1f}", **({"small": "far"} if offset > FAR else {})}])
    head = ["selection", "balanced accuracy", "against random|points", "against none|points", "tail classes|accuracy"]
    drawn = f"Means over {len(random)} {'seeds, each of its draws' if seeds else 'draws of each selection from the same pools'}"
    text = f"{drawn}; the classifier was retrained on every draw. "
    if len(random) < 2:
        text += "One draw has no interval (--random-repeats)."
    else:
        what = "seeds" if seeds else "draws alone: network, pools and test set are one and the same"
        text += f"Differences are paired, with their 95 % interval (Student's t), which covers the {what}."
    return {
        "text": text,
        "table": table("selections side by side", [*head, "FDG|tail", "offset|standard errors"], rows),
    }


def _of_draws(draws: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [draw[key] for draw in draws]


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """A cell with the mean difference and, of two draws or more, its interval and verdict."""
    if len(ours) < 2:
        return {"text": f"{100 * (ours[0] - theirs[0]):+.2f}"}
    found = difference(ours, theirs)
    return {"text": f"{100 * found['mean']:+.2f} ± {100 * found['half']:.2f}", "small": found["verdict"]}


def _class_table(summary: Summary) -> dict[str, Any]:
    counts, variants = summary["class_counts"], summary["variants"]
    rows = [
        [
            summary["class_names"][c],
            {"text": counts[c], "key": counts[c], "bar": counts[c] / max(counts)},
            summary["test_counts"][c],
            *(bar(v["per_class_accuracy"][c]) for v in variants),
        ]
        for c in by_frequency(counts)
    ]
    head = ["class", "training samples", "test samples", *(f"{v['title']}|accuracy, %" for v in variants)]
    return table("accuracy of every class", head, rows, sortable=True)


def _measures(summary: Summary) -> dict[str, Any] | None:
    """One-number summaries; None for the summary of an older run."""
    rows = []
    for v in (v for v in summary["variants"] if "g_mean" in v):
        worst, norms = v["worst_class"], v.get("classifier_norm_variance")
        row = [v["title"], {"text": percent(worst["accuracy"]), "small": summary["class_names"][worst["label"]]}]
        row += [percent(v[key]) for key in ("g_mean", "harmonic_mean", "macro_f1")]
        rows.append([*row, percent(v.get("ece")), _DASH if norms is None else f"{norms:.3g}"])
    head = ["variant", "worst class", "G-mean", "harmonic mean", "macro-F1", "ECE", "variance of row norms|classifier"]
    return table("further measures", head, rows) if rows else None


def _reliability(summary: Summary) -> Chart | None:
    """Of plain cross-entropy and the chosen variant: more lines nobody tells apart. None for the summary of an older run."""
    shown = [(i, v) for i, v in enumerate(summary["variants"]) if v["name"] in ("ce", summary["chosen"])]
    series = [(v["title"], v["reliability"], i) for i, v in shown if "reliability" in v]
    return charts.reliability("reliability of the probabilities", series) if series else None


def _arms(summary: Summary) -> list[tuple[str, str, int]]:
    """The arms that are shown: name, title and number of its variant. The augmented variants come last, in the order of the arms."""
    arms = [arm_name(mode) for mode in summary.get("repeats") or {}]
    first = len(summary["variants"]) - len(arms)
    return [(arm, summary["variants"][first + i]["title"], first + i) for i, arm in enumerate(arms)]


def _paths(summary: Summary) -> list[Chart]:
    found = []
    for entry in summary["tail"]["classes"][:_MAX_PATHS]:
        series = []
        for arm, title, number in _arms(summary):
            path = [tuple(point) for point in entry["arms"][arm]["path"]]
            # Rows that are taken together, and not one after the other, have an end and no path.
            series.append((title, [(0.0, 0.0), *path] if len(path) > 1 else path, number))
        title = f"class {summary['class_names'][entry['label']]} ({summary['class_counts'][entry['label']]} samples)"
        found.append(charts.lines(title, "synthetic samples added", "FDG", series, width=2.7))
    return found


def _tail(summary: Summary) -> dict[str, Any]:
    tail, names, arms = summary["tail"], summary["class_names"], _arms(summary)
    rows = []
    for entry in tail["classes"]:
        row = [names[entry["label"]], summary["class_counts"][entry["label"]], entry["need"], entry["pool"]]
        rows.append([*row, names[entry["similar_head"]], *(_gain(entry["arms"][arm]) for arm, _, _ in arms)])
    targets = [entry["target"]["fdg"] for entry in tail["classes"] if entry.get("target")]
    head = ["tail class", "samples", "added", "pool", "spread of|head class", *(f"FDG|{arm}" for arm, _, _ in arms)]
    return {**tail, "targets": targets, "table": table("completion of the tail", head, rows, sortable=True)}


def _gain(arm: dict[str, Any]) -> dict[str, Any]:
    """FDG of an arm with its offset, which FDG does not see; runs of older versions have no offset."""
    shown = {"text": f"{arm['fdg']:.3f}", "key": arm["fdg"]}
    return (
        {**shown, "small": f"offset {arm['offset']:.1f}{' (far)' if arm['far'] else ''}"} if "offset" in arm else shown
    )


def _tradeoff(summary: Summary) -> Chart | None:
    """FDG of the completed tail against balanced accuracy, a mark for each draw; None where there is nothing to compare."""
    if not summary.get("repeats") or not _has_tail(summary):
        return None
    none = next(i for i, v in enumerate(summary["variants"]) if v["name"] == "retrained")
    series = [("no augmentation", [(0.0, 100 * summary["variants"][none]["balanced_accuracy"])], none)]
    for draws, (_, title, number) in zip(summary["repeats"].values(), _arms(summary)):
        series.append((title, [(d["fdg_tail"], 100 * d["balanced_accuracy"]) for d in draws], number))
    return charts.points("completed tails", "mean FDG of the tail classes", "balanced accuracy, %", series, width=4.6)


def _top_confusions(summary: Summary) -> dict[str, Any]:
    """The most frequent confusions as a table, where a matrix would be too large."""
    names = summary["class_names"]
    chosen = next(v for v in summary["variants"] if v["name"] == summary["chosen"])
    matrix = chosen["confusion"]
    cells = ((count, t, p) for t, row in enumerate(matrix) for p, count in enumerate(row) if count and t != p)
    rows = [
        [names[t], names[p], count, percent(count / max(1, sum(matrix[t])))]
        for count, t, p in heapq.nlargest(_MOST_PAIRS, cells)
    ]
    head = ["true class", "predicted as", "samples", "% of the class"]
    return {"of": chosen["title"], "table": table("most frequent confusions", head, rows, sortable=True)}


def _norms(summary: Summary) -> Chart | None:
    """Norms of the classifiers' rows against the class counts."""
    counts, series = summary["class_counts"], []
    for i, v in enumerate(summary["variants"]):
        if v.get("classifier_norms"):
            scale = sum(v["classifier_norms"]) / len(counts) or 1.0
            series.append((v["title"], [(n, norm / scale) for n, norm in zip(counts, v["classifier_norms"])], i))
    if not series:
        return None
    x, y = "training samples of the class", "norm over the classifier's mean"
    return charts.points("classifier row norms", x, y, series, log_x=True, width=4.6)


def _diversity(counts: Sequence[int], values: Sequence[float | None]) -> Chart | None:
    known = [(n, v) for n, v in zip(counts, values) if v is not None]
    return charts.points(
        "feature diversity V of the classes",
        "training samples of the class",
        "V, log2 units",
        [("", known, 0)],
        log_x=True,
    )


def _plane(embedding: dict[str, Any], counts: Sequence[int]) -> Chart:
    words = {"many": "many (more than 100)", "medium": "a medium number of", "few": "few (fewer than 20)"}
    series = []
    for i, group in enumerate(GROUPS):
        rows = [j for j, c in enumerate(embedding["label"]) if group_of(counts[c]) == group]
        if rows:
            name = f"classes with {words[group]} training samples"
            series.append((name, [(embedding["x"][j], embedding["y"][j]) for j in rows], i))
    return charts.points("test features, plane of largest variance", "", "", series, bare=True)


def _space(summary: Summary, drawn: dict[str, Any]) -> dict[str, Any]:
    similarity, names = summary["features"]["class_similarity"], summary["class_names"]
    # Features of different seeds live in different spaces: there is no mean of them.
    seed = f" Seed {summary['seeds'][0]} alone." if "seeds" in summary else ""
    if drawn["similarity"] is not None:
        return {"seed": seed, "alike": None}
    pairs = ((similarity[a][b], a, b) for a in range(len(names)) for b in range(a))
    rows = [[names[a], names[b], f"{value:.2f}"] for value, a, b in heapq.nlargest(_MOST_PAIRS, pairs)]
    head = ["class", "class", "cosine of mean features"]
    return {"seed": seed, "alike": table("classes most alike", head, rows, sortable=True)}


def _curves(summary: Summary, metrics: Sequence[dict[str, Any]]) -> list[Chart]:
    found = []
    validated = any("val_balanced_accuracy" in record for record in metrics)
    accuracy = f"balanced {'validation' if validated else 'test'} accuracy, %"
    for stage, title in (("train", "training"), ("retrain", "classifier's retraining")):
        series: dict[int, list[dict[str, Any]]] = {}
        for i, v in enumerate(summary["variants"]):
            if records := [r for r in metrics if r["phase"] == f"{stage}/{v['name']}"]:
                series[i] = records
        if not series:
            continue
        for what in (accuracy, "training loss"):
            drawn = [
                (summary["variants"][i]["title"], [(r["epoch"], _plotted(r, what)) for r in rs], i)
                for i, rs in series.items()
            ]
            found.append(charts.lines(f"{title}: {what}", "epoch", "", drawn))
    return found


def _plotted(record: dict[str, Any], what: str) -> float:
    if what == "training loss":
        return record["train_loss"]
    return 100 * record.get("test_balanced_accuracy", record.get("val_balanced_accuracy"))


def _times(summary: Summary) -> dict[str, Any]:
    rows, spent = [], 0.0
    longest = max(summary["seconds"], 1e-9)
    for v in summary["variants"]:
        parts = (v["seconds"] - v["evaluation_seconds"], v["evaluation_seconds"])
        rows.append([v["title"], *({"text": f"{s:.2f} s", "bar": s / longest} for s in parts)])
        spent += v["seconds"]
    rest = max(0.0, summary["seconds"] - spent)
    rows.append(["all else: data, selection, further runs", {"text": f"{rest:.2f} s", "bar": rest / longest}, _DASH])
    return table("where the time went", ["", "work", "evaluation"], rows)
