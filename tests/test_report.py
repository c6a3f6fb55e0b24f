"""The report page: self-contained, escaped, and readable with empty groups and with 100 classes."""

import copy
import re
from html.parser import HTMLParser

import pytest

from ltkernels.train.report import charts, plots, render, save_pngs
from ltkernels.train.report.svg import Svg, label, ticks

VOID = {"meta", "br"}
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
        "random_repeats": [{"balanced_accuracy": 0.7, "fdg_tail": 0.25}, {"balanced_accuracy": 0.6, "fdg_tail": 0.75}],
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
    page = _parse(render(summary, _metrics()))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert "url(" not in render(summary, _metrics())
    assert page.tags.count("svg") >= 9


def test_every_name_is_escaped(summary):
    page = render(summary, _metrics())
    assert "<script>" not in page
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
    assert "65.0 ± 7.1 (60.0 to 70.0), FDG tail 0.500 ± 0.354" in text


def test_confusion_matrix_follows_frequency():
    drawing = charts.confusion("t", [[1, 2], [3, 4]], ["rare", "frequent"], [1, 0])
    assert re.findall(r"<title>([^<]+)</title>", drawing) == [
        *("frequent as frequent: 4 of 7", "frequent as rare: 3 of 7"),
        *("rare as frequent: 2 of 3", "rare as rare: 1 of 3"),
    ]


def test_hundred_classes_and_a_training_alone(summary):
    many = copy.deepcopy(summary)
    del many["tail"], many["random_repeats"]
    many["class_counts"], many["class_names"] = list(range(500, 0, -5)), [f"class {i}" for i in range(100)]
    many["test_counts"] = [1] * 100
    many["variants"] = many["variants"][1:2]
    many["variants"][0]["per_class_accuracy"] = [0.5] * 100
    many["variants"][0]["confusion"] = [[int(r == c) for c in range(100)] for r in range(100)]
    page = render(many, _metrics())
    _parse(page)
    assert "class 99" in page
    assert "FDG" not in re.sub(r"<th>FDG tail", "", page).split("<h2>Definitions")[1]


def _with_analysis(summary):
    """What a run of this version records beside accuracies."""
    more = copy.deepcopy(summary)
    for v in more["variants"]:
        v |= {
            "worst_class": {"label": 0, "accuracy": 0.25}, "g_mean": 0.5, "harmonic_mean": 0.4, "macro_f1": 0.375,
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
    for title in ("Further measures", "Classifier norms against counts", "Feature space", "FDG against accuracy"):
        assert f"{title} " in text
    assert "<script>" not in html
    assert not {"script", "img", "link"} & set(page.tags)
    assert "25.0 &lt;script&gt;alert(1)&lt;/script&gt; 50.0 40.0 37.5 12.5 0.389" in text
    assert "20.0 ± 6.2" in text
    # The variant without norms has a dash in the table and no mark in the chart.
    assert "12.5 &ndash;" in text
    chart = html.split("Classifier norms")[1].split("<h2>")[0]
    assert chart.count("<title>") - chart.count("<title></title>") == 4 * 3
    single = _with_analysis(summary)
    single["features"]["embedding"] = None
    assert "plane of largest variance" not in render(single, _metrics())
    # Summaries of earlier versions have nothing of this.
    older = re.sub(r"<[^>]+>", " ", render(summary, _metrics()))
    assert "Further measures" not in older
    assert "Feature space" not in older


def test_points_lie_where_their_values_are():
    drawing = plots.points(
        "t", "x", "y", [("s", [(1.0, 0.0), (10.0, 5.0), (100.0, 10.0)], ["a", "b", "c"])], [0], log_x=True
    )
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', drawing)]
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2, abs=0.02)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.02)
    assert places[0][0] < places[2][0]
    assert places[0][1] > places[2][1]
    # One point, or equal points, are no division by zero.
    plots.points("t", "x", "y", [("s", [(2.0, 3.0)], ["a"])], [0])


def test_matrix_draws_what_can_be_seen():
    drawing = plots.matrix("t", [[1.0, 0.02], [0.02, -0.6]], ["a", "<b>"], [1, 0], "n")
    assert re.findall(r"<title>([^<]+)</title>", drawing) == ["&lt;b&gt; and &lt;b&gt;: -0.60", "a and a: 1.00"]
    assert 'fill="#084578"' in drawing


def test_charts_become_pngs(summary, tmp_path):
    image = pytest.importorskip("PIL.Image")
    paths = save_pngs(render(_with_analysis(summary), _metrics()), tmp_path / "charts")
    names = [path.name for path in paths]
    assert sorted(tmp_path.joinpath("charts").iterdir()) == sorted(paths)
    for part in (
        "legend",
        "class-counts-beside",
        "confusion-matrix-of-fdg-max",
        "classifier-row-norms",
        "completed-tails",
    ):
        assert any(part in name for name in names), part
    for path in paths:
        with image.open(path) as chart:
            assert len(chart.convert("RGB").getcolors(1 << 20)) > 2


def test_png_has_the_drawing_at_twice_its_size(tmp_path):
    image = pytest.importorskip("PIL.Image")
    svg = Svg(40, 30, "a/../b\x07")
    svg.rect(4, 6, 10, 8, "#0072b2")
    svg.line(20, 20, 40, 20, "#d55e00", 6)
    svg.marker(30, 8, 4)
    (path,) = save_pngs(f"<p>{svg.render()}</p>", tmp_path)
    assert path == tmp_path / "01-a-b.png"
    with image.open(path) as chart:
        assert chart.size == (80, 60)
        assert chart.getpixel((18, 20)) == (0x00, 0x72, 0xB2)
        assert chart.getpixel((60, 40)) == (0xD5, 0x5E, 0x00)
        assert chart.getpixel((2, 2)) == (255, 255, 255)
        assert chart.getpixel((36, 40)) == (255, 255, 255)
        red, green, blue = chart.getpixel((60, 16))
        assert (red, green, blue) != (255, 255, 255)
        assert red > green < blue  # the fifth mark's purple


def test_ticks_are_round():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(80, 100) == [80, 85, 90, 95, 100]
    assert [label(t) for t in ticks(-0.13, 0.42)] == ["0", "0.2", "0.4"]
    assert ticks(1, 1) == [1]


def test_the_time_is_shared_out_without_a_remainder(summary):
    page = render(summary, _metrics())
    assert "cross-entropy: training steps 0.75 s" in page
    assert "cross-entropy: evaluation 0.25 s" in page
    # 12.25 s of the whole run less five variants of a second each.
    assert "all else: data, selection, further runs: other 7.25 s" in page


def test_a_thousand_classes_make_a_page_of_less_than_three_megabytes(summary):
    import random

    rng, n = random.Random(0), 1000
    many = _with_analysis(summary)
    del many["tail"], many["random_repeats"]
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


def test_names_have_room_left_of_a_matrix():
    names = ["WWWWWWWWWWWWWWWWWWWWWWWW", "b"]
    for drawing in (
        charts.confusion("t", [[1, 2], [3, 4]], names, [0, 1]),
        plots.matrix("t", [[1.0, 0.5], [0.5, 1.0]], names, [0, 1], "n"),
    ):
        texts = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end"[^>]*font-size="(\d+)">([^<]*)<', drawing)
        assert len(texts) == 2
        # A W, the widest letter, is 0.94 em in common fonts; shortened names keep to letters of 0.69 em on average.
        assert all(float(x) >= 0.68 * int(size) * len(text) for x, size, text in texts)
    columns = re.findall(
        r'text-anchor="middle"[^>]*font-size="11">(\d+)<', charts.confusion("t", [[1, 2], [3, 4]], names, [0, 1])
    )
    assert columns == ["1", "2"]


def test_png_charts_have_the_letters_of_other_alphabets(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    drawn = []
    for i, letter in enumerate(("\u0436", "\u03c9", "\u00fc", "\u0158", "\U0010fffd")):
        svg = Svg(40, 30, "t")
        svg.text(4, 20, letter, size=16)
        (path,) = save_pngs(svg.render(), tmp_path / str(i))
        with image.open(path) as chart:
            drawn.append(chart.tobytes())
    # The last has no letter: it is the box.
    assert len(set(drawn)) == 5
