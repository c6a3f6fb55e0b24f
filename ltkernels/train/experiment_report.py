"""What the FDG experiment found: means with intervals, verdicts in words, the scatter of accuracy against FDG.

All intervals are 95 % by Student's t over the sets. A set has its own pools, clusters, batch order and initial weights;
the network behind the features and the test set are the same in all of them, and their share of the uncertainty is not in
the intervals.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
CAVEAT = (
    "Intervals cover the sets (pools, clusters, batch order, initial weights); the network, the held-out samples and the test "
    "set are one and the same in all of them, and several comparisons stand side by side."
)
# Of a level's rows: means over the sets.
_MEANS = ("fdg_tail", "held_out_accuracy", "held_out_log_loss")
_ARMS = {"random": "random samples", "full": "the whole pool", "none": "no augmentation"}
# Okabe and Ito's colours: told apart by everyone.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_MARKS = "osD^v"


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean, and half of its 95 % interval."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "half": float(half)}


def _by_set(rows: Sequence[Row], arm: str, level: int | None, key: str) -> list[float]:
    """Values of one arm in the order of the sets."""
    chosen = sorted((r for r in rows if r["arm"] == arm and r["level"] == level), key=lambda r: r["set"])
    return [r[key] for r in chosen]


def findings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each data set and method: levels and arms with intervals, the chosen level, and its differences to the arms."""
    results = []
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in rows):
        own = [r for r in rows if (r["data"], r["method"]) == (data, method)]
        results.append({"data": data, "method": method, **_finding(own)})
    return results


def _finding(rows: Sequence[Row]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    selected = [r for r in rows if r["arm"] == "fdg"]
    levels = []
    for level in sorted({r["level"] for r in selected}):
        of_sets = {key: _by_set(rows, "fdg", level, key) for key in (*_MEANS, "balanced_accuracy")}
        means = {key: mean(of_sets[key]) for key in _MEANS}
        levels.append({"level": level, **means, "accuracy": interval(of_sets["balanced_accuracy"])})
    chosen = min(levels, key=lambda entry: entry["held_out_log_loss"])["level"]
    best = max(levels, key=lambda entry: (entry["accuracy"]["mean"], -entry["level"]))["level"]
    ours = _by_set(rows, "fdg", chosen, "balanced_accuracy")
    arms, differences = {}, {}
    for arm in _ARMS:
        theirs = _by_set(rows, arm, None, "balanced_accuracy")
        gains = _by_set(rows, arm, None, "fdg_tail")
        arms[arm] = {"accuracy": interval(theirs), "fdg_tail": None if None in gains else mean(gains)}
        difference = interval([a - b for a, b in zip(ours, theirs)])
        low, high = difference["mean"] - difference["half"], difference["mean"] + difference["half"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        differences[arm] = {**difference, "verdict": verdict}
    pairs = [r["fdg_tail"] for r in selected], [r["balanced_accuracy"] for r in selected]
    # Of a constant it is not defined.
    correlation = float(spearmanr(*pairs).statistic) if all(len(set(values)) > 1 for values in pairs) else None
    return {
        "levels": levels,
        "chosen_level": chosen,
        "best_level_on_test": best,
        "arms": arms,
        "differences": differences,
        "spearman": correlation,
        "sets": len(ours),
    }


def sentences(result: dict[str, Any]) -> list[str]:
    """The result in plain words, one sentence for each comparison."""
    levels = result["levels"]
    chosen = next(entry for entry in levels if entry["level"] == result["chosen_level"])
    name = f"{result['data']}, {result['method']}"
    accuracy, rho = chosen["accuracy"], result["spearman"]
    correlated = "not defined" if rho is None else f"{rho:+.2f}"
    lines = [
        f"{name}: FDG-selected is level {result['chosen_level'] + 1} of {len(levels)} (FDG {chosen['fdg_tail']:.3f}, chosen on "
        f"held-out training samples, log-loss {chosen['held_out_log_loss']:.3f}): balanced accuracy "
        f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['half']:.1f} %; rank correlation of FDG and accuracy over all sets "
        f"{correlated}."
    ]
    words = {"better": "FDG-selected is better", "worse": "FDG-selected is worse"}
    for arm, title in _ARMS.items():
        d = result["differences"][arm]
        low, high = 100 * (d["mean"] - d["half"]), 100 * (d["mean"] + d["half"])
        lines.append(
            f"{name}: against {title} {100 * d['mean']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} over "
            f"{result['sets']} sets: {words.get(d['verdict'], d['verdict'])}."
        )
    return lines


def figure(path: Path, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> None:
    """Accuracy against FDG: a point for each set, level means with intervals, stars at the chosen levels, the arms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(r["data"] for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results))
    drawn = Figure(figsize=(3.6 * len(methods) + 0.6, 3.3 * len(datasets) + 0.9), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(len(datasets), len(methods), squeeze=False, sharey="row")
    for result in results:
        i, j = datasets.index(result["data"]), methods.index(result["method"])
        own = [r for r in rows if (r["data"], r["method"]) == (result["data"], result["method"])]
        _panel(axes[i][j], own, result, _COLORS[j % len(_COLORS)], _MARKS[j % len(_MARKS)])
        if j == 0:
            axes[i][j].set_ylabel(f"{result['data']}\nbalanced test accuracy, %")
        if i == len(datasets) - 1:
            axes[i][j].set_xlabel("FDG, mean over tail classes")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    drawn.savefig(path, dpi=150)


def _panel(axis: Any, rows: Sequence[Row], result: dict[str, Any], color: str, mark: str) -> None:
    selected = [r for r in rows if r["arm"] == "fdg"]
    points = [r["fdg_tail"] for r in selected], [100 * r["balanced_accuracy"] for r in selected]
    axis.scatter(*points, s=10, color=color, alpha=0.4, linewidths=0, label="one set")
    levels = result["levels"]
    x, y = [e["fdg_tail"] for e in levels], [100 * e["accuracy"]["mean"] for e in levels]
    half = [100 * e["accuracy"]["half"] for e in levels]
    axis.errorbar(x, y, half, color=color, marker=mark, ms=5, lw=1, capsize=2, label="level, mean and 95 % interval")
    at = result["chosen_level"]
    axis.plot(x[at], y[at], "*", ms=15, mfc="none", mec="#222", label="best level on held-out samples")
    at = result["best_level_on_test"]
    axis.plot(x[at], y[at], "o", ms=12, mfc="none", mec="#999", label="best level on the test set (optimistic)")
    for arm, marker in (("random", "P"), ("full", "X")):
        entry = result["arms"][arm]
        axis.errorbar(
            *(entry["fdg_tail"], 100 * entry["accuracy"]["mean"], 100 * entry["accuracy"]["half"]),
            fmt=marker,
            color="#D55E00",
            ms=7,
            capsize=2,
            label=_ARMS[arm],
        )
    none = result["arms"]["none"]["accuracy"]
    axis.axhline(100 * none["mean"], color="#777", lw=1, ls="--", label=_ARMS["none"])
    axis.set_title(result["method"], fontsize=10)
    axis.grid(alpha=0.25)
