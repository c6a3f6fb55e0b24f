"""What the FDG experiment found: differences to random draws with intervals, verdicts in words, accuracy against FDG.

All intervals are 95 % by Student's t over the sets. A set has its own pools and draws; its arms are compared with the mean of
the random draws of the same size from the same pools, or with no augmentation under the same loss.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ltkernels.diversity import FAR
from ltkernels.experiments.protocol import ARMS
from ltkernels.train.metrics import difference, interval

Row = dict[str, Any]
CAVEAT = (
    "Intervals cover the sets (pools and draws, and the networks where there are several); the long-tailed subset and the test "
    "set are one and the same in all of them, and several comparisons stand side by side."
)
_TITLES = {**ARMS, "real": "unseen real samples"}
# Okabe and Ito's colours: told apart by everyone.
_COLORS = {
    "random": "#000000",
    "mean": "#56B4E9",
    "match": "#0072B2",
    "match-uncapped": "#999999",
    "fdg": "#E69F00",
    "items": "#CC79A7",
    "clusters-target": "#F0E442",
    "clusters-max": "#D55E00",
    "clusters-min": "#882255",
    "real": "#009E73",
}


def findings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each data set, method and share: every arm's accuracy, FDG and offset, and its differences with intervals."""
    results = []
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in rows):
        own = [r for r in rows if (r["data"], r["method"]) == (data, method)]
        none = {r["set"]: r for r in own if r["arm"] == "none"}
        for share in dict.fromkeys(r["share"] for r in own if r["arm"] != "none"):
            part = [r for r in own if r["share"] == share and r["arm"] != "none"]
            results.append({"data": data, "method": method, "share": share, **_finding(part, none)})
    return results


def _finding(rows: Sequence[Row], none: dict[int, Row]) -> dict[str, Any]:
    sets = sorted(none)
    tables: dict[str, dict[int, list[Row]]] = {}
    for r in rows:
        arm = "random" if r["arm"].startswith("random-") else r["arm"]
        tables.setdefault(arm, {}).setdefault(r["set"], []).append(r)

    def of(arm: str, key: str) -> list[float]:
        return [mean(r[key] for r in tables[arm][i]) for i in sets]

    arms = {}
    for arm, by_set in tables.items():
        if set(by_set) != set(sets):
            continue
        accuracy = of(arm, "balanced_accuracy")
        arms[arm] = {
            "accuracy": interval(accuracy),
            "fdg_tail": mean(of(arm, "fdg_tail")),
            "offset_tail": mean(of(arm, "offset_tail")),
            "minus_none": difference(accuracy, [none[i]["balanced_accuracy"] for i in sets]),
        }
        if arm != "random":
            arms[arm]["minus_random"] = difference(accuracy, of("random", "balanced_accuracy"))
            arms[arm]["minus_random_tail"] = difference(of(arm, "tail_accuracy"), of("random", "tail_accuracy"))
    if "match" in arms and "mean" in arms:
        arms["match"]["minus_mean"] = difference(of("match", "balanced_accuracy"), of("mean", "balanced_accuracy"))
    accuracy = interval([none[i]["balanced_accuracy"] for i in sets])
    return {"sets": len(sets), "none": {"accuracy": accuracy}, "arms": arms}


def sentences(result: dict[str, Any]) -> list[str]:
    """The result in plain words, one sentence for each arm."""
    share = "completed counts" if result["share"] is None else f"share {result['share']:g}"
    name = f"{result['data']}, {result['method']}, {share}"
    arms, sets = result["arms"], result["sets"]
    random = arms["random"]
    far = f"; that is above {FAR:g}: FDG does not see it" if random["offset_tail"] > FAR else ""
    lines = [
        f"{name}: random samples reach {_percent(random['accuracy'])} %, no augmentation {_percent(result['none']['accuracy'])} %; "
        f"FDG {random['fdg_tail']:.3f}, offset {random['offset_tail']:.2f}{far}."
    ]
    for arm, entry in arms.items():
        if arm == "random" or arm.startswith("level-"):
            continue
        d = entry["minus_random"]
        lines.append(
            f"{name}: {_TITLES[arm]} ({arm}) against random samples {100 * d['mean']:+.2f} ± {100 * d['half']:.2f} points over "
            f"{sets} sets: {d['verdict']}; FDG {entry['fdg_tail']:.3f}, offset {entry['offset_tail']:.2f}."
        )
    return lines


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['half']:.1f}"


def figure(path: Path, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> None:
    """Accuracy over random draws against FDG: levels with intervals, and the arms; a panel for each method and share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys((r["data"], r["share"]) for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results))
    drawn = Figure(figsize=(3.2 * len(methods) + 0.6, 2.9 * len(lines) + 0.9), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(len(lines), len(methods), squeeze=False, sharey="row")
    for result in results:
        i, j = lines.index((result["data"], result["share"])), methods.index(result["method"])
        _panel(axes[i][j], result)
        if j == 0:
            share = "" if result["share"] is None else f", share {result['share']:g}"
            axes[i][j].set_ylabel(f"{result['data']}{share}\npoints over random draws")
        if i == len(lines) - 1:
            axes[i][j].set_xlabel("FDG, mean over tail classes")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    drawn.savefig(path, dpi=130)


def _panel(axis: Any, result: dict[str, Any]) -> None:
    arms = result["arms"]
    levels = [entry for arm, entry in arms.items() if arm.startswith("level-")]
    if levels:
        y, half = ([100 * e["minus_random"][key] for e in levels] for key in ("mean", "half"))
        axis.errorbar(
            [e["fdg_tail"] for e in levels],
            y,
            half,
            color="#777",
            lw=1,
            marker=".",
            capsize=2,
            label="levels of FDG, by tilt",
        )
    for arm, color in _COLORS.items():
        if arm not in arms:
            continue
        d = arms[arm].get("minus_random", {"mean": 0.0, "half": 0.0})
        style = {"mfc": color, "mec": "#222", "mew": 0.5, "ms": 9 if arm == "match" else 6, "capsize": 2}
        axis.errorbar(
            arms[arm]["fdg_tail"], 100 * d["mean"], 100 * d["half"], fmt="*" if arm == "match" else "o", color=color,
            label=_TITLES.get(arm, "random draws"), **style,
        )  # fmt: skip
    axis.axhline(0.0, color="#000", lw=0.8)
    axis.axhline(-100 * arms["random"]["minus_none"]["mean"], color="#777", lw=1, ls="--", label="no augmentation")
    axis.set_title(result["method"], fontsize=10)
    axis.set_xscale("symlog", linthresh=0.3)
    axis.grid(alpha=0.25)
