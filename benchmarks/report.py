"""A result file as a Markdown table and a picture.

    python -m benchmarks.report benchmarks/results/losses-cpu.json --readme benchmarks/README.md --png benchmarks/results/losses-cpu.png

The table replaces what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in the README, NAME being the file's stem.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

Cell = tuple[str, str, str, int]


def cells(result: dict[str, Any]) -> dict[Cell, dict[str, dict[str, Any]]]:
    """Rows by (op and what is special of its mode, dtype, shape, C) and backend; our own backend under ``"ours"``."""
    grouped: dict[Cell, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["rows"]:
        ours = row["backend"].startswith("cpu-") or row["backend"] in ("cuda", "triton")
        op = row["op"] + row["mode"].removeprefix("forward+backward")
        shape = " x ".join(str(row[name]) for name in "BDC" if row[name] is not None)
        grouped[op, row["dtype"], shape, row["C"]]["ours" if ours else row["backend"]] = row
    return grouped


def table(result: dict[str, Any]) -> str:
    """Our time, and how many times longer each peer takes; below 1 we lose."""
    grouped = cells(result)
    backends = list(dict.fromkeys(name for found in grouped.values() for name in found if name != "ours"))
    head = result["rows"][0]["D"] is not None
    lines = [
        f"| loss | dtype | {'B x D x C' if head else 'B x C'} | ours, ms | {'MiB' if head else '% of copy'} | {' | '.join(backends)} |",
        "|---|---|---|---:|---:|" + "---:|" * len(backends),
    ]
    for (op, dtype, shape, _), found in grouped.items():
        ours = found["ours"]
        ratios = []
        for name in backends:
            if name not in found:
                ratios.append("")
                continue
            ratio = found[name]["ms_p50"] / ours["ms_p50"]
            text = f"{ratio:.1f}x" if ratio >= 1 else f"**{ratio:.2f}x**"
            text += f", {found[name]['peak_mb']:.0f} MiB" if head else ""
            ratios.append(text if found[name]["ok"] else f"{text} (differs)")
        second = ours["peak_mb"] if head else ours["pct_of_copy"]
        lines.append(f"| {op} | {dtype} | {shape} | {ours['ms_p50']:.4g} | {second:.0f} | {' | '.join(ratios)} |")
    machine = result["machine"]
    lines += [
        "",
        f"Forward + backward, medians; a peer's column says how many times our time it takes (bold: we lose). {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, copy {result['copy_gbps']} GB/s, commit {machine['commit']}, "
        f"{machine['date']}.",
    ]
    return "\n".join(lines)


def picture(result: dict[str, Any], path: Path) -> None:
    """Speed-up over each peer against the number of classes, one panel a loss, float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = cells(result)
    ops = list(dict.fromkeys(op for op, *_ in grouped))
    columns = min(4, len(ops))
    lines = -(-len(ops) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.2 * columns, 3 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(ops) :]:
        axis.remove()
    markers = "osD^vP"
    backends = list(dict.fromkeys(name for found in grouped.values() for name in found if name != "ours"))
    colours = dict(zip(backends, ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"], strict=False))
    for axis, op in zip(axes.flat, ops, strict=False):
        for marker, backend in zip(markers, backends, strict=False):
            points = [
                (classes, found[backend]["ms_p50"] / found["ours"]["ms_p50"])
                for (name, dtype, _, classes), found in grouped.items()
                if name == op and dtype == "float32" and backend in found
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker=marker, color=colours[backend], label=backend)
        axis.axhline(1.0, color="0.4", linewidth=1, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="classes", title=op.replace(", ", ",\n"))
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("peer's time / ours")
    handles = {
        text: line
        for axis in axes.flat[: len(ops)]
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=130)


def selection_table(result: dict[str, Any]) -> str:
    """Our best time in each cell, and how many times longer the rest take; below 1 we lose."""
    grouped: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        if "ms_p50" in row:
            mode = row["mode"] if row["op"] in ("select step", "k-means") else ""
            grouped[row["op"], mode, row["B"], row["C"], row["D"]].append(row)
    lines = ["| what | features | ours, ms | the others take |", "|---|---:|---:|---|"]
    for (op, mode, b, c, d), rows in grouped.items():
        what = {
            "select step": f"one greedy step, {b} subsets of {c}, {mode}",
            "k of n items": f"{c} of {b} items by log det",
            "k-means": f"k-means, {b} rows, {c} clusters of {mode}",
        }.get(op, op)
        ours = [row for row in rows if row["backend"].startswith("cpu-")]
        others = [row for row in rows if row not in ours]
        best = ours[0] if op != "select step" else min(ours, key=lambda row: row["ms_p50"])
        texts = [f"{row['ms_p50']:.3g} ({row['backend'].removeprefix('cpu-')})" for row in ours]
        ratios = []
        for row in others:
            ratio = row["ms_p50"] / best["ms_p50"]
            text = f"{ratio:.1f}x" if ratio >= 1 else f"**{ratio:.2f}x**"
            ratios.append(f"{row['backend']} {text}" + ("" if row["ok"] else " (differs)"))
        lines.append(f"| {what} | {d} | {', '.join(texts)} | {', '.join(ratios)} |")
    machine = result["machine"]
    lines.append("")
    for row in result["rows"]:
        if row["op"] == "paper workload":
            lines.append(
                f"The paper's whole selection, {row['runs']} runs and {row['steps']} steps at 64 features: "
                f"{row['minutes_extrapolated']:.1f} minutes, extrapolated from {row['sample']} ({row['seconds_measured']} s)."
            )
        if row["op"] == "streamed V":
            lines.append(
                f"V of {row['B']} x {row['D']} streamed features: {row['seconds']} s and {row['peak_mb']:.0f} MB more memory, "
                f"{row['relative_error']:.1e} from the direct result."
            )
    lines += [
        "",
        f"Medians; the ratio is to our best (bold: we lose; differs: another answer). {machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def small_calls_table(result: dict[str, Any]) -> str:
    """Smallest times of a small call and of its steps, and torch's own; below 1 we lose."""
    lines = [
        "| call | shape | ours, us | Module | eager | eager / ours | checks | allocation and kernel | empty Function |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    shapes: dict[str, dict[str, float]] = defaultdict(dict)
    for row in result["rows"]:
        shape = " x ".join(str(row[name]) for name in "BDC" if row[name] is not None)
        shapes[shape][row["call"]] = row["us_min"]
    for shape, times in shapes.items():
        for call in [name.removesuffix(", eager") for name in times if name.endswith(", eager")]:
            loss, what = call.split(": ")
            ratio = times[f"{call}, eager"] / times[call]
            steps = [f"{loss}: checks", f"{loss}: allocation and kernel", "empty Function, forward + backward"]
            others = [f"{call}, Module", f"{call}, eager", *(steps if what == "forward + backward" else [""] * 3)]
            module, eager, *shown = [f"{times[name]:.1f}" if name in times else "" for name in others]
            ratios = f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**"
            cells = [f"{loss}, {what}", shape, f"{times[call]:.1f}", module, eager, ratios, *shown]
            lines.append(f"| {' | '.join(cells)} |")
    machine = result["machine"]
    lines += [
        "",
        f"Smallest of 40 bursts that take turns in one process (bold: we lose). {machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, commit {machine['commit']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def neighbors_table(result: dict[str, Any]) -> str:
    """Our time, and how many times longer each peer takes; below 1 we lose."""
    grouped: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["rows"]:
        shape = " x ".join(str(row[name]) for name in "BDC" if row[name] is not None)
        name = "ours" if row["backend"].startswith("cpu-") else row["backend"]
        grouped[row["op"], row["mode"], shape][name] = row
    backends = list(dict.fromkeys(name for found in grouped.values() for name in found if name != "ours"))
    lines = [
        f"| call | options | B x D x C | ours, ms | {' | '.join(backends)} |",
        "|---|---|---|---:|" + "---:|" * len(backends),
    ]
    for (op, mode, shape), found in grouped.items():
        ours = found["ours"]["ms_p50"]
        ratios = []
        for name in backends:
            ratio = found[name]["ms_p50"] / ours if name in found else None
            text = "" if ratio is None else f"{ratio:.1f}x" if ratio >= 1 else f"**{ratio:.2f}x**"
            ratios.append(text if ratio is None or found[name]["ok"] else f"{text} (differs)")
        lines.append(f"| {op} | {mode} | {shape} | {ours:.4g} | {' | '.join(ratios)} |")
    machine = result["machine"]
    lines += [
        "",
        f"B queries and C references of D features (rows and classes below), float32, medians; a peer's column says how many times our "
        f"time it takes (bold: we lose). {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def reliability_table(result: dict[str, Any]) -> str:
    """What every part of the campaign did (tests/reliability); failures are bold."""
    lines = ["| part | what | cases | faults injected | CPU-hours | failures |", "|---|---|---:|---:|---:|---:|"]
    rows = result["rows"]
    for row in rows:
        failed = f"**{len(row['failures'])}**" if row["failures"] else "0"
        if row["skipped"]:
            lines.append(f"| {row['part']} | {row['what']} |  |  |  | skipped: {row['skipped']} |")
            continue
        lines.append(
            f"| {row['part']} | {row['what']} | {row['cases']} | {row['faults'] or ''} | {row['cpu_hours']:.3f} | {failed} |"
        )
    cases, faults, hours = (sum(row[name] for row in rows) for name in ("cases", "faults", "cpu_hours"))
    failures = sum(len(row["failures"]) for row in rows)
    lines.append(f"| all |  | {cases} | {faults} | {hours:.3f} | {failures} |")
    machine = result["machine"]
    lines += [
        "",
        f"Effort {result['effort']:g}x, seed {result['seed']}. {machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}.",
    ]
    return "\n".join(lines)


def training_table(result: dict[str, Any]) -> str:
    """Balanced accuracy of runs of the trainer, plain cross-entropy first, and the command of each."""
    lines = ["| loss | balanced accuracy | std | over ce, points | flags |", "|---|---:|---:|---:|---|"]
    runs = result["runs"]
    flags = {name: re.findall(r"--\S+(?: (?!--)\S+)?", run["command"]) for name, run in runs.items()}
    common = [flag for flag in flags["ce"] if all(flag in found for found in flags.values())]
    for name, run in runs.items():
        mean = 100 * run["balanced_accuracy"]
        over = "" if name == "ce" else f"{mean - 100 * runs['ce']['balanced_accuracy']:+.1f}"
        spread = f"{100 * run['std']:.1f}" if "std" in run else ""
        own = " ".join(flag for flag in flags[name] if flag not in common)
        lines.append(f"| {name} | {mean:.1f} % | {spread} | {over} | `{own}` |")
    seeds = {len(run.get("per_seed", [0])) for run in runs.values()}
    machine, commit = result["machine"], result.get("commit")
    lines += [
        "",
        f"`ltkernels train {' '.join(common)}` with the row's flags; last epoch; runs a row: {', '.join(map(str, seeds))}. "
        f"Threads: {machine['threads']}. {f'Commit {commit}, ' if commit else ''}{machine['date']}.",
    ]
    return "\n".join(lines)


def two_views_table(result: dict[str, Any]) -> str:
    """Accuracy of every arm of `benchmarks.two_views`, and the paired difference from the first, balanced softmax."""
    found = result["summary"]
    measured = next(iter(found.values()))
    lines = [f"| arm | {' | '.join(measured)} |", "|---|" + "---:|" * len(measured)]
    for arm, values in found.items():
        cells = []
        for value in values.values():
            gain = value.get("over balanced softmax")
            over = f" ({gain['mean']:+.2f} ± {gain['half']:.2f})" if gain else ""
            cells.append(f"{value['accuracy']:.2f}{over}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    settings, machine = result["settings"], result["machine"]
    lines += [
        "",
        f"Per cent, {len({row['seed'] for row in result['rows']})} seeds; in brackets over balanced softmax, 95 %, paired by seed. "
        f"{settings['epochs']} epochs, batches of {settings['batch']}, imbalance {settings['imbalance']:g}. "
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
    ]
    return "\n".join(lines)


_ARMS = {
    "clusters-max": "greedy, largest FDG",
    "fdg": "FDG target alone",
    "mean": "mean kept",
    "match": "mean kept, FDG capped",
    "real": "unseen real",
}


def _points(found: dict[str, Any], arm: str, against: str) -> str:
    gain = found["arms"][arm][against]
    return f"{100 * gain['mean']:+.2f} ± {100 * gain['half']:.2f} ({gain['wins']}/{found['sets']})"


def experiment_table(result: dict[str, Any]) -> str:
    """What `ltkernels experiment fdg` found: every arm against random draws of the same size from the same pools."""
    arms = [name for name in _ARMS if all(name in found["arms"] for found in result["results"])]
    titles = [
        "pool",
        "share",
        "none",
        "random",
        *(_ARMS[name] for name in arms),
        "mean kept - none",
        "offset, random → mean kept",
    ]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for found in result["results"]:
        offsets = [f"{found['arms'][name]['offset_tail']:.1f}" for name in ("random", "mean")]
        accuracies = [f"{100 * each['accuracy']['mean']:.1f}" for each in (found["none"], found["arms"]["random"])]
        share = "counts" if found["share"] is None else str(found["share"])  # image space: every sample weighs the same
        cells = [f"{found['data']} {found['method']}", share, *accuracies]
        cells += [_points(found, name, "minus_random") for name in arms]
        cells += [_points(found, "mean", "minus_none"), " → ".join(offsets)]
        lines.append(f"| {' | '.join(cells)} |")
    environment = result["environment"]
    commit = environment.get("commit")
    lines += [
        "",
        f"None and random: balanced test accuracy in per cent; the arms: points over random, 95 % intervals paired by pool, pools won. "
        f"torch {environment['torch']}{f', commit {commit}' if commit else ''}.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args(argv)
    result = json.loads(options.result.read_text())
    kind = result.get("kind", "")
    if not kind and "rows" in result:
        kind = "selection" if result["rows"][0]["op"] == "select step" else "losses"
    elif not kind:
        kind = "training" if "runs" in result else "experiment"
    tables = {
        "losses": table,
        "selection": selection_table,
        "reliability": reliability_table,
        "small calls": small_calls_table,
        "neighbors": neighbors_table,
        "training": training_table,
        "experiment": experiment_table,
        "two-views": two_views_table,
    }
    text = tables[kind](result)
    if options.readme:
        name = re.escape(options.result.stem)
        readme, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda found: f"{found[1]}{text}\n{found[2]}",
            options.readme.read_text(),
            flags=re.S,
        )
        if count != 1:
            raise SystemExit(
                f"{options.readme} has no <!-- {options.result.stem} --> ... <!-- /{options.result.stem} -->"
            )
        options.readme.write_text(readme)
    else:
        print(text)
    if options.png and kind != "losses":
        parser.error(f"a {kind} result has no picture")
    if options.png:
        picture(result, options.png)


if __name__ == "__main__":
    main()
