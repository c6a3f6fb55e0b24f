"""The report page: self-contained, escaped, and readable with empty groups and with 100 classes."""

import copy
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ltkernels.train.report import charts, drawing, render, save_pngs
from ltkernels.train.report.drawing import shorten
from ltkernels.train.report.page import page, table
from ltkernels.train.report.run import _selections

VOID = {"meta", "br", "input"}
VARIANTS = ["cross-entropy", "LDAM", "control", "FDG &lt;max&gt;", "random"]
NAMES = ["<script>alert(1)</script>", 'a "quoted" & name', "plain"]


def _variant(name, title, fdg, hits):
    confusion = [[h, 10 - h, 0] for h in hits[:1]] + [[10 - h, h, 0] for h in hits[1:2]] + [[10 - hits[2], 0, hits[2]]]
    recall = [h / 10 for h in hits]
    groups = {
        "many": {"accuracy": recall[0], "classes": [0]},
        "medium": {"accuracy": None, "classes": []},
        "few": {"accuracy": sum(recall[1:]) / 2, "classes": [1, 2]},
    }
    mean = sum(recall) / 3
    return {
        "name": name, "title": title, "balanced_accuracy": mean, "balanced_accuracy_se": 0.05, "top1": mean,
        "best_balanced_accuracy": mean + 0.02, "per_class_accuracy": recall, "groups": groups, "confusion": confusion,
        "fdg_tail": fdg, "seconds": 1.0, "evaluation_seconds": 0.25,
    }  # fmt: skip


def _draw(accuracy, fdg, offset):
    return {"balanced_accuracy": accuracy, "tail_accuracy": accuracy - 0.25, "fdg_tail": fdg, "offset_tail": offset}


@pytest.fixture
def summary():
    variants = [
        _variant("ce", "cross-entropy", None, [10, 4, 0]),
        _variant("ldam", "LDAM", None, [9, 7, 5]),
        _variant("retrained", "control", None, [10, 4, 1]),
        _variant("fdc-max", "FDG <max>", 0.8125, [9, 8, 6]),
        _variant("fdc-random", "random", 0.25, [9, 6, 6]),
    ]
    arms = {"max": {"fdg": 0.8125, "path": [[10, 0.5], [20, 0.8125]]}, "random-0": {"fdg": 0.25, "path": [[20, 0.25]]}}
    entry = {"label": 2, "similar_head": 0, "need": 20, "pool": 80, "arms": arms}
    return {
        "command": "run", "chosen": "ldam", **{k: variants[1][k] for k in ("balanced_accuracy", "top1", "groups")},
        "class_counts": [200, 15, 5], "class_names": NAMES, "test_counts": [10, 10, 10], "seconds": 12.25, "seed": 3,
        "config": {"data": "npz:<b>", "loss": "ldam", "head_ratio": 0.9, "epochs": None},
        "environment": {"torch": "2.13"}, "variants": variants,
        "repeats": {
            "max": [_draw(0.75, 0.8125, 4.5), _draw(0.74, 0.8, 4.0), _draw(0.76, 0.91, 3.5)],
            "random": [_draw(0.7, 0.25, 2.0), _draw(0.71, 0.75, 1.0), _draw(0.69, 0.5, 1.5)],
        },
        "tail": {"features_from": "ce", "selected": "max", "head_classes": [0], "classes": [entry]},
    }  # fmt: skip


def _metrics():
    return [
        {"phase": p, "epoch": e, "train_loss": 1 / e, "test_balanced_accuracy": 0.2 * e, "test_top1": 0.2 * e}
        for p in ("train/ce", "train/ldam", "retrain/fdc-max")
        for e in (1, 2)
    ]


class _Checker(HTMLParser):
    """Fails on tags that do not nest; collects tags and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parse(page):
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_page_nests_and_loads_nothing(summary):
    html = render(summary, _metrics())
    page = _parse(html)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 1  # the tables'; tests/test_security.py looks at it
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert all(
        value[0] == "#" or value.startswith("data:image/png;")
        for name, value in page.attributes
        if name == "xlink:href"
    )
    assert not re.findall(r"url\((?!#)", html)
    assert page.tags.count("svg") >= 9


def test_every_name_is_escaped(summary):
    page = render(summary, _metrics())
    assert page.count("<script>") == 1
    assert "<script>alert" not in page
    assert "npz:<b>" not in page
    assert "FDG <max>" not in page
    text = "".join(_parse(page).text)
    assert "npz:<b>" in text
    assert 'a "quoted" & name' in text


def test_table_shows_the_numbers(summary):
    text = re.sub(r"<[^>]+>", " ", render(summary, _metrics()))
    assert "n/a" in text
    assert "0 classes" in text
    assert "1 class " in text
    assert "0.812" in text
    # 21 of 30 against 14 of 30, each with a standard error of 5 points: 7.07 for the difference.
    assert re.search(r"LDAM\s+against\s+cross-entropy\s*: \+23\.3 points \(70\.0 against 46\.7\), beyond", text)
    assert "standard error of 7.1 points" in text


def test_selections_stand_side_by_side_with_intervals(summary):
    def rows(summary):
        return [list(map(_words, row)) for row in _selections(summary)["table"]["rows"]]

    # Differences of 5, 3 and 7 points: their standard deviation is 2, t(0.975, 2) = 4.3027. Against none the mean is 25 points.
    assert rows(summary) == [
        ["no augmentation", "50.0", "\u2013", "\u2013", "10.0", "\u2013", "\u2013"],
        ["FDG <max>", "75.0", "+5.00 ± 4.97 better", "+25.00 ± 2.48 better", "50.0", "0.841", "4.0 far"],
        ["random", "70.0", "\u2013", "+20.00 ± 2.48 better", "45.0", "0.500", "1.5"],
    ]
    assert "3 draws of each selection" in _selections(summary)["text"]
    html = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render(summary, _metrics())))
    assert "Selections side by side" in html
    assert "+5.00 ± 4.97 better" in html
    # One draw has no interval, and a run without a tail nothing to compare.
    single = copy.deepcopy(summary)
    single["repeats"] = {mode: draws[:1] for mode, draws in summary["repeats"].items()}
    assert rows(single)[1][2:4] == ["+5.00", "+25.00"]
    assert "no interval" in _selections(single)["text"]
    render(single, _metrics())
    single["tail"]["classes"] = []
    assert _selections(single) is None
    render(single, _metrics())
    # Of several seeds, each has its own result without augmentation: differences of 25, 20 and 33 points.
    several = copy.deepcopy(summary)
    several["seeds"] = [0, 1, 2]
    several["runs"] = [
        {
            "seed": i,
            "variants": [{"name": "ce", "balanced_accuracy": 0.1}, {"name": "retrained", "balanced_accuracy": x}],
        }
        for i, x in enumerate((0.5, 0.54, 0.43))
    ]
    assert rows(several)[1][1:4] == ["75.0", "+5.00 ± 4.97 better", "+26.00 ± 16.29 better"]
    assert rows(several)[0][1] == "49.0"


def _words(cell):
    return f"{cell['text']} {cell.get('small', '')}".strip() if isinstance(cell, dict) else cell


def test_confusion_matrix_follows_frequency():
    chart = charts.matrix_of_confusions("t", [[1, 2], [3, 4]], ["rare", "frequent"], [1, 0])
    (axes,) = chart.figure.axes
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 0): "4", (0, 1): "3", (1, 0): "2", (1, 1): "1"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["frequent  1", "rare  2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2"]
    # Digits say themselves: "0  1" over a column 1 would be read as another digit.
    (short,) = charts.matrix_of_confusions("t", [[1, 2], [3, 4]], ["0", "1"], [1, 0]).figure.axes
    assert [t.get_text() for t in (*short.get_yticklabels(), *short.get_xticklabels())] == ["1", "0", "1", "0"]
    opacity = axes.images[0].get_array()[..., 3]
    np.testing.assert_allclose(np.asarray(opacity), np.sqrt([[4 / 7, 3 / 7], [2 / 3, 1 / 3]]))


def test_hundred_classes_and_a_training_alone(summary):
    many = copy.deepcopy(summary)
    del many["tail"], many["repeats"]
    many["class_counts"], many["class_names"] = list(range(500, 0, -5)), [f"class {i}" for i in range(100)]
    many["test_counts"] = [1] * 100
    many["variants"] = many["variants"][1:2]
    many["variants"][0]["per_class_accuracy"] = [0.5] * 100
    many["variants"][0]["confusion"] = [[int(r == c) for c in range(100)] for r in range(100)]
    page = render(many, _metrics())
    _parse(page)
    assert "class 99" in page
    assert "the two results" not in page, "of one variant there is one"
    assert "the two results" in render(summary, _metrics())
    assert "FDG" not in page.split("<h2>Definitions")[1]


def _with_analysis(summary):
    """What a run of this version records beside accuracies."""
    more = copy.deepcopy(summary)
    for v in more["variants"]:
        v |= {
            "worst_class": {"label": 0, "accuracy": 0.25}, "g_mean": 0.5, "harmonic_mean": 0.4, "macro_f1": 0.375,
            "reliability": {"samples": [0, 4, 2], "right": [0, 1, 2], "confidence": [0.0, 2.0, 1.75]},
            "ece": 0.125, "classifier_norms": [2.0, 1.0, 0.5], "classifier_norm_variance": 0.3889,
        }  # fmt: skip
        v["groups"]["few"]["se"] = 0.0625
    more["variants"][2] |= {"classifier_norms": None, "classifier_norm_variance": None}
    more["features"] = {
        "class_diversity": [3.0, None, 1.0],
        "class_similarity": [[1.0, -0.5, 0.01], [-0.5, 1.0, 0.25], [0.01, 0.25, 1.0]],
        "embedding": {"x": [0.0, 1.0, 2.0], "y": [1.0, 0.0, 2.0], "label": [0, 1, 2]},
    }
    return more


def test_analysis_is_shown_where_it_was_recorded(summary):
    html = render(_with_analysis(summary), _metrics())
    page = _parse(html)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    for title in ("Further measures", "Classifier norms against counts", "Feature space", "Selections side by side"):
        assert f"{title} " in text
    assert html.count("<script>") == page.tags.count("script") == 1
    assert not {"img", "link"} & set(page.tags)
    assert "25.0 &lt;script&gt;alert(1)&lt;/script&gt; 50.0 40.0 37.5 12.5 0.389" in text
    assert "20.0 ± 6.2" in text
    # The variant without norms has a dash in the table and no mark in the chart.
    assert "12.5 \u2013 " in text
    chart = html.split("Classifier norms")[1].split("<h2>")[0]
    assert chart.count("<use ") - len(re.findall(r"<use [^>]*stroke-width", chart)) >= 4 * 3
    assert [t for t in re.findall(r">([^<]+)</text>", chart) if t in VARIANTS] == [
        v for v in VARIANTS if v != "control"
    ]
    single = _with_analysis(summary)
    single["features"]["embedding"] = None
    assert "plane of largest variance" not in render(single, _metrics())
    # Summaries of earlier versions have nothing of this.
    older = re.sub(r"<[^>]+>", " ", render(summary, _metrics()))
    assert "Further measures" not in older
    assert "Feature space" not in older


def test_reliability_is_accuracy_over_confidence():
    found = {"samples": [0, 4, 2], "right": [0, 1, 2], "confidence": [0.0, 2.0, 1.75]}
    chart = charts.reliability("t", [("<s>", found, 0)])
    (axes,) = chart.figure.axes
    diagonal, line = axes.lines[0], axes.containers[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[50, 25], [87.5, 100]])
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [100, 100]])
    assert "&lt;s&gt;" in chart.svg()


def test_points_lie_where_their_values_are():
    chart = charts.points("t", "x", "y", [("s", [(1.0, 0.0), (10.0, 5.0), (100.0, 10.0)], 0)], log_x=True)
    (axes,) = chart.figure.axes
    places = axes.transData.transform(axes.lines[0].get_xydata())
    np.testing.assert_allclose(places[1], (places[0] + places[2]) / 2)
    assert places[0][0] < places[2][0]
    assert places[0][1] < places[2][1]  # counted from below
    # One point, or equal points, are no division by zero.
    charts.points("t", "x", "y", [("s", [(2.0, 3.0)], 0)]).svg()


def test_matrix_of_cosines_has_the_sign_as_colour():
    chart = charts.matrix_of_cosines("t", [[1.0, 0.02], [0.02, -0.6]], ["a", "<b>"], [1, 0])
    image = chart.figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(image[..., 3]), [[0.6, 0.02], [0.02, 1.0]])
    red, _, blue = image[0, 0, :3]
    assert red > blue
    red, _, blue = image[1, 1, :3]
    assert red < blue
    assert "&lt;b&gt;  1" in chart.svg()


def test_charts_become_pngs(summary, tmp_path):
    paths = save_pngs(_with_analysis(summary), _metrics(), tmp_path / "charts")
    names = [path.name for path in paths]
    assert sorted(tmp_path.joinpath("charts").iterdir()) == sorted(paths)
    for part in ("class-counts-beside", "confusions-of-fdg-max", "classifier-row-norms", "completed-tails"):
        assert any(part in name for name in names), part
    assert not any("legend" in name for name in names)
    for path in paths:
        with Image.open(path) as chart:
            assert len(chart.convert("RGB").getcolors(1 << 20)) > 2
            assert chart.getpixel((1, 1))[:3] == (255, 255, 255)


def test_the_legend_is_in_the_picture():
    """With its series a picture is taller than without by an entry each."""
    few, many = (charts.lines("t", "x", "y", [(f"variant {i}", [(0, i), (1, 2)], i) for i in range(n)]) for n in (1, 4))
    heights = [float(re.search(r'height="([\d.]+)pt"', chart.svg())[1]) for chart in (few, many)]
    assert 3 * 9 < heights[1] - heights[0] < 3 * 20
    assert all(f"variant {i}" in many.svg() for i in range(4))


def test_nothing_hangs_over_the_edge_of_a_chart():
    """Titles and legends of any length and script are inside of what is drawn; tests/test_report_browser.py looks at all."""
    names = ["W" * 60, "a species with a long name that goes on", "\u0436\u0438\u0440\u0430\u0444", "b"]
    titles = [f"{name} and more of it, {name}" for name in names]
    drawn = [
        charts.classes("t", names, [900, 90, 9, 3], range(4), [(title, [0.1, 0.2, 1.0, 0.5]) for title in titles]),
        charts.matrix_of_confusions(titles[0], np.eye(4).tolist(), names, range(4)),
        charts.matrix_of_cosines(titles[1], np.eye(4).tolist(), names, range(4)),
        charts.lines(titles[1], "epoch", "", [(title, [(0, 1), (1, 2)], i) for i, title in enumerate(titles)]),
        charts.points(
            titles[1], "n", "V", [(title, [(1, 1), (1000, 2)], i) for i, title in enumerate(titles)], log_x=True
        ),
    ]
    for chart in drawn:
        renderer = FigureCanvasAgg(chart.figure).get_renderer()
        box = chart.figure.get_tightbbox().padded(0.08).transformed(chart.figure.dpi_scale_trans)
        axes = chart.figure.axes
        texts = [
            t for a in axes for t in (a.title, a._left_title, *(a.get_legend().get_texts() if a.get_legend() else ()))
        ]
        texts = [t for t in texts if t.get_text()]
        assert len(texts) >= 1
        places = [t.get_window_extent(renderer) for t in texts]
        assert all(box.x0 <= p.x0 and p.x1 <= box.x1 and box.y0 <= p.y0 and p.y1 <= box.y1 for p in places)
        assert max(map(len, "\n".join(t.get_text() for t in texts).splitlines())) <= 90


def test_the_colours_of_a_chart_are_the_pages():
    svg = charts.lines("t", "x", "y", [("s", [(0, 1), (1, 2)], 0)]).svg()
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+|[a-z]+\([^)]*\)|none)", svg)) <= {
        *(f"var(--{name})" for name in ("ink", "muted", "rule", "s0")), "none", "#000000",
    }  # fmt: skip
    assert "var(--s0)" in svg
    assert "var(--ink)" in svg


def test_the_time_is_shared_out_without_a_remainder(summary):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render(summary, _metrics())))
    assert "cross-entropy 0.75 s 0.25 s" in text
    # 12.25 s of the whole run less five variants of a second each.
    assert "all else: data, selection, further runs 7.25 s" in text


def test_a_thousand_classes_make_a_page_of_less_than_three_megabytes(summary):
    import random

    rng, n = random.Random(0), 1000
    many = _with_analysis(summary)
    del many["tail"], many["repeats"]
    many["variants"] = many["variants"][1:2]
    names = [f"{'<b>' if i == 7 else ''}species number {i}" for i in range(n)]
    many["class_counts"], many["class_names"], many["test_counts"] = [1000 - i // 2 for i in range(n)], names, [10] * n
    confusion = [[0] * n for _ in range(n)]
    for i in range(n):
        confusion[i][i], confusion[i][rng.randrange(n)] = 6, 4
    confusion[7][8] = 77
    similarity = [[0.1] * n for _ in range(n)]
    similarity[7][8] = similarity[8][7] = 0.99
    many["variants"][0] |= {
        "per_class_accuracy": [0.6] * n, "confusion": confusion, "classifier_norms": [1.0 + i / n for i in range(n)],
    }  # fmt: skip
    many["features"] |= {"class_diversity": [1.0] * n, "class_similarity": similarity}
    page = render(many, _metrics())
    _parse(page)
    assert len(page.encode()) < 3_000_000
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "&lt;b&gt;species number 7 species number 8 77 " in text
    assert "species number 8 &lt;b&gt;species number 7 0.99" in text


def test_a_name_is_shortened_by_what_it_takes():
    assert shorten("a" * 10, 10) == "a" * 10
    assert shorten("a" * 11, 10) == "a" * 9 + "\u2026"
    assert shorten("\u52d5" * 5, 10) == "\u52d5" * 5
    assert shorten("\u52d5" * 6, 10) == "\u52d5" * 4 + "\u2026"
    assert shorten("two\nlines\x07", 20) == "two lines\ufffd"


def test_png_charts_have_the_letters_of_other_alphabets(tmp_path):
    drawn = []
    for i, letter in enumerate(("\u0436", "\u03c9", "\u00fc", "\u0158", "\u0431")):
        path = tmp_path / f"{i}.png"
        charts.lines(letter, "", "", [("", [(0.0, 0.0)], 0)]).png(path)
        with Image.open(path) as chart:
            drawn.append(chart.tobytes())
    assert len(set(drawn)) == 5


def test_letters_that_no_font_has_give_the_class_its_number(monkeypatch):
    names = ["\u0436", "\U0010fffd", "plain", "\u52d5"]
    monkeypatch.setattr(drawing.font_manager.fontManager, "ttflist", [])
    assert drawing.readable(names) == ["\u0436", "class 1", "plain", "class 3"]
    # A font that has them is found by its letters.
    font = SimpleNamespace(name="Some Font", fname="some.ttf")
    monkeypatch.setattr(drawing.font_manager.fontManager, "ttflist", [font])
    own = drawing._letters
    monkeypatch.setattr(drawing, "_letters", lambda path: frozenset([0x52D5]) if path == "some.ttf" else own(path))
    assert drawing.readable(names) == ["\u0436", "class 1", "plain", "\u52d5"]


def test_a_page_without_what_it_shows_is_refused():
    with pytest.raises(ValueError, match="the page cannot be made: 'note' is undefined"):
        page("audit.html", title="t", intro="i", chart=charts.lines("t", "", "", []), classes=table("c", [], []))
