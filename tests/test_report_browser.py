"""The report as a browser lays it out: phone and desk width, both colour schemes, 10 to 1 000 classes. Skips without Chromium.

The pages stand in frames of both widths in one document, whose script measures them.
"""

import json
import random
import re
import shutil
import subprocess

import pytest

from ltkernels.train.report import render

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

WIDTHS = (400, 1280)
NAMES = [
    "üchsin groß und lang genannt", "PPER lowland gorilla", "<html></html> & co", "жираф обыкновенный", "WWWWWWWWWWWWWWWWWWWWWWWW",
    "signs_and_symbols/flags_of_countries", "a species with a very long name that goes on and on", "b",
]  # fmt: skip
# What lies outside of its box, what lies on another text, and what is too faint on the page (WCAG: 4.5 for small letters).
MEASURE = """
const out = {};
const shown = (e) => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0; };
const parts = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => parts(c).slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, view = frame.contentWindow, wide = page.documentElement;
  const outside = [], overlapping = [], faint = [], small = [];
  const back = light(view.getComputedStyle(page.body).backgroundColor);
  if (wide.scrollWidth > view.innerWidth) outside.push(`page ${wide.scrollWidth} in ${view.innerWidth}`);
  for (const svg of page.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")].filter(shown);
    const boxes = texts.map((t) => t.getBoundingClientRect());
    boxes.forEach((b, i) => {
      const text = texts[i].textContent;
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1) outside.push(text);
      if (Math.max(b.width, b.height) < 10) small.push(text);
      boxes.slice(0, i).forEach((a, j) => {
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left), y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 1.5 && y > 3) overlapping.push(`${texts[j].textContent} / ${text}`);
      });
      const fill = view.getComputedStyle(texts[i]).fill;
      const [high, low] = [light(fill), back].sort((p, q) => q - p);
      if (fill !== "rgb(255, 255, 255)" && (high + 0.05) / (low + 0.05) < 4.5) faint.push(`${text} ${fill}`);
    });
  }
  for (const e of page.querySelectorAll("h1, h2, h3, p, li, dt, dd, summary, .scroll, input")) {
    const b = e.getBoundingClientRect();
    if (shown(e) && (b.left < 0 || b.right > view.innerWidth + 1)) outside.push(e.textContent.slice(0, 60));
  }
  for (const cell of page.querySelectorAll("th, td")) if (cell.scrollWidth > cell.clientWidth + 1) outside.push(cell.textContent);
  const rows = [...page.querySelectorAll("table.sortable")][0].tBodies[0].rows;
  out[frame.id] = {outside, overlapping, faint, small, svgs: page.querySelectorAll("svg").length, rows: rows.length,
    dark: back < 0.2, search: page.querySelectorAll("input[type=search]").length};
}
document.body.textContent = "MEASURED" + JSON.stringify(out) + "END";
"""
SORT = """
const page = document.querySelector("iframe").contentDocument, table = page.querySelector("table.sortable");
const names = () => [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[0].textContent);
const heads = [...table.tHead.rows[0].cells], first = names();
heads[1].querySelector("button").click(); const down = names();
heads[1].querySelector("button").click(); const up = names(), said = heads[1].getAttribute("aria-sort");
const search = page.querySelector("input[type=search]");
search.value = "NUMBER 17"; search.dispatchEvent(new Event("input"));
document.body.textContent = "MEASURED" + JSON.stringify({first, down, up, said, found: names()}) + "END";
"""


def _summary(n: int, variants: int) -> dict:
    rng = random.Random(n)
    counts = [max(3, int(1000 * 0.01 ** (i / (n - 1)))) for i in range(n)]
    groups = {
        "many": [c for c in range(n) if counts[c] > 100],
        "medium": [c for c in range(n) if counts[c] <= 100],
        "few": [],
    }
    shown = []
    for k in range(variants):
        confusion = [[0] * n for _ in range(n)]
        for i, row in enumerate(confusion):
            row[i] += 6
            for _ in range(4):
                row[rng.randrange(n)] += 1
        recall = [confusion[i][i] / 10 for i in range(n)]
        shown.append({
            "name": ("v0", "v1", "retrained")[k],
            "title": ("cross-entropy", "logit adjustment", "classifier retrained, no augmentation")[k],
            "balanced_accuracy": 0.5, "balanced_accuracy_se": 0.0125, "top1": 0.5, "best_balanced_accuracy": 0.5,
            "per_class_accuracy": recall, "confusion": confusion, "fdg_tail": None, "seconds": 1.0, "evaluation_seconds": 0.2,
            "groups": {g: {"accuracy": 0.5 if c else None, "se": 0.01 if c else None, "classes": c} for g, c in groups.items()},
            "worst_class": {"label": n - 1, "accuracy": 0.1}, "g_mean": 0.5, "harmonic_mean": 0.4, "macro_f1": 0.375, "ece": 0.125,
            "classifier_norms": [2 - i / n for i in range(n)], "classifier_norm_variance": 0.38,
            "reliability": {
                "samples": [0, 0, *range(3, 16)], "right": [0, 0, *range(1, 14)],
                "confidence": [0, 0, *(s * (s + 0.5) / 16 for s in range(3, 16))],
            },
        })  # fmt: skip
    arms = {"mean": {"fdg": 0.6, "path": [[20, 0.6]]}, "random-0": {"fdg": 0.25, "path": [[20, 0.25]]}}
    draw = {"balanced_accuracy": 0.5, "tail_accuracy": 0.25, "fdg_tail": 0.4, "offset_tail": 1.5}
    labels = [rng.randrange(n) for _ in range(300)]
    return {
        "command": "run", "chosen": "v1", "groups": shown[1]["groups"], "class_counts": counts, "test_counts": [10] * n,
        "class_names": [*NAMES, *(f"species number {i}" for i in range(len(NAMES), n))], "seconds": 12.5, "seed": 3,
        "config": {"data": "folder:own", "loss": "logit_adjusted", "head_ratio": 0.9}, "environment": {"torch": "2"},
        "variants": shown, "repeats": {mode: [draw, draw] for mode in ("mean", "random")} if variants == 3 else {},
        "tail": {
            "features_from": "v0", "selected": "mean", "head_classes": [0],
            "classes": [{"label": c, "similar_head": 0, "need": 20, "pool": 80, "arms": arms} for c in range(3, 6)],
        },
        "features": {
            "class_diversity": [rng.uniform(2, 9) for _ in range(n)],
            "class_similarity": [[rng.uniform(-0.7, 0.7) for _ in range(n)] for _ in range(n)],
            "embedding": {"x": [rng.gauss(0, 1) for _ in labels], "y": [rng.gauss(0, 1) for _ in labels], "label": labels},
        },
    }  # fmt: skip


def _metrics() -> list[dict]:
    return [
        {"phase": f"train/v{i}", "epoch": e, "train_loss": 2 / e, "test_balanced_accuracy": 0.02 * e}
        for i in (0, 1)
        for e in range(1, 21)
    ]


def _measured(folder, frames: str, script: str, scheme: int) -> dict:
    host = folder / "host.html"
    load = "addEventListener('load', () => setTimeout(() => {" + script + "}, 0))"
    host.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{load}</script>", encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    flags += [
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1400,900",
        "--virtual-time-budget=20000",
    ]
    done = subprocess.run([CHROMIUM, *flags, host.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    text = re.search(r"MEASURED(.*)END", done.stdout, re.DOTALL)
    assert text, done.stderr[-2000:]
    return json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def _frame(page: str, name: str, width: int) -> str:
    page = page.replace("&", "&amp;").replace('"', "&quot;")
    return f'<iframe id="{name}" srcdoc="{page}" style="width:{width}px;height:900px;border:0"></iframe>'


@pytest.fixture(scope="module")
def pages():
    return {n: render(_summary(n, variants), _metrics()) for n, variants in ((10, 3), (30, 2), (100, 2), (1000, 2))}


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_no_text_leaves_its_box_or_lies_on_another(pages, tmp_path, scheme):
    frames = "".join(_frame(page, f"{n}-{width}", width) for n, page in pages.items() for width in WIDTHS)
    found = _measured(tmp_path, frames, MEASURE, 0 if scheme == "dark" else 1)
    assert set(found) == {f"{n}-{width}" for n in pages for width in WIDTHS}
    for name, page in found.items():
        for fault in ("outside", "overlapping", "faint", "small"):
            assert page[fault] == [], f"{fault} on {name}"
        assert page["rows"] == int(name.partition("-")[0])
        assert page["dark"] == (scheme == "dark")
        assert page["svgs"] >= 8


def test_the_table_sorts_and_finds(pages, tmp_path):
    found = _measured(tmp_path, _frame(pages[30], "p", 1280), SORT, 1)
    assert found["down"] == found["first"]  # it begins by frequency
    assert found["up"] == found["first"][::-1]
    assert found["said"] == "ascending"
    assert found["found"] == ["species number 17"]


def test_another_script_does_not_run(pages, tmp_path):
    """The policy of the page holds where escaping would fail."""
    evil = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
    ask = "document.body.textContent = 'MEASURED' + JSON.stringify(document.querySelector('iframe').contentDocument.title) + 'END'"
    assert _measured(tmp_path, _frame(pages[10].replace("<h1>", f"{evil}<h1>"), "p", 1280), ask, 1) == (
        "ltkernels run: folder:own, logit_adjusted"
    )
    free = re.sub(r"<meta http-equiv[^>]*>", "", pages[10])
    assert _measured(tmp_path, _frame(free.replace("<h1>", f"{evil}<h1>"), "p", 1280), ask, 1) == "ran"
