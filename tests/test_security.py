"""What the README's security note promises: no trusted pickles, no shell, nothing outside the folder, names that stay text."""

import ast
import base64
import hashlib
import io
import json
import os
import re
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import ltkernels
from ltkernels import cli, train
from ltkernels.train import report, rundir
from ltkernels.train.checkpoint import undump
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset

PACKAGE = Path(ltkernels.__file__).parent
SCRIPT = "<script>alert(1)</script>"
EVIL = (
    SCRIPT,
    'a"onload=x',
    "two\nlines",
    "\x1b[31mred\x1b]0;title\x07",
    "half \udcff pair",
    "&amp;",
    "$\\frac{$",
    "\u202egnp",
)

_TRUSTING = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml")


def _calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def _violations(source: str) -> list[str]:
    """Everything in a module that the security note excludes."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in modules:
            if module.split(".")[0] in _TRUSTING:
                found.append(f"line {node.lineno}: import {module}")
    for node, function, keywords in _calls(tree):
        if function in (
            "eval",
            "exec",
            "compile",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
            "os.execv",
            "__import__",
        ):
            found.append(f"line {node.lineno}: {function}")
        if function.endswith(("torch.load", "load_state_dict_from_url")) and keywords.get("weights_only") != "True":
            found.append(f"line {node.lineno}: {function} without weights_only=True")
        if keywords.get("shell", "False") != "False":
            found.append(f"line {node.lineno}: shell={keywords['shell']}")
        if function in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append(f"line {node.lineno}: {function} without allow_pickle=False")
        if function.endswith((".extractall", ".extract")):
            found.append(f"line {node.lineno}: {function} unpacks to disk")
        if function.endswith(("urlopen", "urlretrieve")) or function.startswith(("requests.", "socket.")):
            found.append(f"line {node.lineno}: {function} uses the network")
    return found


def test_nothing_in_the_package_trusts_what_it_reads():
    # The benchmarks ship beside the package and start compilers and other libraries; they read no one's files.
    files = [p for p in PACKAGE.rglob("*.py") if "benchmarks" not in p.relative_to(PACKAGE).parts]
    assert len(files) > 60
    found = {str(p.relative_to(PACKAGE)): _violations(p.read_text()) for p in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from yaml import load", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)", "os.system(x)",
        "subprocess.run(x, shell=True)", "np.load(f)", "np.load(f, allow_pickle=True)", "tar.extractall(x)", "exec(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert _violations(source)


class _Page(HTMLParser):
    """The tags of a page and the names of their attributes, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self._in_script = set(), set(), [], False
        self.feed(text)
        # The page's own script to the byte, which its policy names by its hash, and no other.
        own = (Path(report.__file__).parent / "templates" / "tables.js").read_text()
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert self.scripts == [own]
        assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
        self.tags.discard("script")

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._in_script = tag == "script"
        # Inside the page, or in it already: nothing is loaded.
        assert all(value.startswith(("#", "data:image/png;base64,")) for name, value in attrs if name == "xlink:href")

    def handle_data(self, data):
        if self._in_script:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._in_script = False


def _evil_data():
    generator = torch.Generator().manual_seed(0)
    sizes = [20, 12, 8, 6, 6, 5, 5, 5]
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.randn(len(y), 6, generator=generator) + y[:, None]
    y_test = torch.arange(len(sizes)).repeat(3)
    return Dataset.from_arrays(x, y, x[:24], y_test, class_names=EVIL, name=SCRIPT)


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evil") / "run"
    train.run(Config(model="mlp", epochs=1, retrain_epochs=1, random_repeats=1, threads=1), _evil_data(), out=out)
    return out


def test_names_of_classes_and_data_stay_text_in_the_report(evil_run, tmp_path):
    page = (evil_run / "report.html").read_text(encoding="utf-8")
    seen = _Page(page)
    assert not seen.tags & {"script", "img", "iframe", "link", "object", "a"}
    assert not {name for name in seen.attributes if name.startswith(("on", "href", "src"))}
    assert "&lt;script&gt;" in page
    assert not [c for c in page if not c.isprintable() and c not in "\n\t"]
    train.rebuild_report(evil_run, tmp_path / "png")
    assert evil_run.joinpath("report.html").read_text(encoding="utf-8") == page
    assert all(re.fullmatch(r"\d\d-[a-z0-9-]+\.png", path.name) for path in (tmp_path / "png").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["png"]


def test_names_stay_text_in_the_audit_page(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 3))
    names = [n.replace("\udcff", "?") for n in EVIL]
    np.savez(
        tmp_path / f"x{SCRIPT.replace('/', '')}.npz", features=x, labels=np.arange(40) % 8, class_names=np.array(names)
    )
    (path,) = tmp_path.iterdir()
    assert cli.main(["audit", str(path), "--out", str(tmp_path / "audit.html")]) == 0
    assert "script" not in _Page((tmp_path / "audit.html").read_text(encoding="utf-8")).tags


def test_names_stay_text_in_a_summary_that_somebody_wrote(evil_run, tmp_path):
    summary = json.loads((evil_run / "summary.json").read_text())

    def poisoned(value):
        if isinstance(value, dict):
            return {k: v if k in ("name", "chosen", "phase") else poisoned(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return SCRIPT if isinstance(value, str) else value

    (tmp_path / "metrics.jsonl").write_bytes((evil_run / "metrics.jsonl").read_bytes())
    (tmp_path / "summary.json").write_text(json.dumps(poisoned(summary)))
    # Drawn, or refused; a page with a script in it is neither.
    with suppress(ValueError):
        assert "script" not in _Page(train.rebuild_report(tmp_path).read_text(encoding="utf-8")).tags
    # Numbers that are texts.
    for entry in summary["tail"]["classes"]:
        entry |= {"need": SCRIPT, "pool": SCRIPT}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "script" not in _Page(train.rebuild_report(tmp_path).read_text(encoding="utf-8")).tags


def test_a_terminal_gets_no_control_characters(tmp_path, capsys):
    evil = tmp_path / "\x1b[31mred\x07\x9b.npz"
    assert cli.main(["audit", str(evil), "--out", str(tmp_path / "a.html")]) == 2
    captured = capsys.readouterr().err
    assert captured.endswith("\n")
    assert captured[:-1].isprintable()
    assert "\\x1b[31mred" in captured


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "", "a/b", 3, None, ["x"], "x\n"])
def test_a_summary_names_no_file_outside_its_folder(evil_run, tmp_path, name):
    summary = json.loads((evil_run / "summary.json").read_text())
    summary["variants"][0]["name"] = name
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"summary\.json: not what a run writes"):
        rundir.read_summary(tmp_path)


class _Trap:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_checkpoint_runs_nothing(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state": _Trap(tmp_path / "ran")}, buffer)
    for content in (buffer.getvalue(), b"", b"PK\x03\x04", buffer.getvalue()[:200], bytes(1000)):
        with pytest.raises(ValueError, match="the file: not a checkpoint"):
            undump(content, "the file")
    assert not (tmp_path / "ran").exists()
