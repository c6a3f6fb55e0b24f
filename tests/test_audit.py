"""The data audit: planted label errors, planted drift, what is said without cleanlab, and a page that is escaped."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from ltkernels.cli import main
from ltkernels.diversity import feature_diversity
from ltkernels.train.report import audit, audit_file, render_audit
from ltkernels.train.report.audit import out_of_sample_probabilities, suspected_label_errors
from ltkernels.train.select import load_features

# The function of the same name hides the module as an attribute of its package.
MODULE = sys.modules["ltkernels.train.report.audit"]

NAMES = ["<script>alert(1)</script>", "plain", "c"]


def _blobs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([60, 30, 12]))
    centres = torch.tensor([[0.0, 0, 0, 0], [6.0, 0, 0, 0], [0.0, 6.0, 0, 0]])
    return centres[labels] + torch.randn(102, 4, generator=generator), labels


def test_counts_diversity_and_drift():
    x, y = _blobs()
    later, later_y = _blobs(1)
    later = later + (later_y == 1)[:, None] * 2.0
    result = audit(x, y, class_names=NAMES, other=(later[:95], later_y[:95]))
    assert result["class_counts"] == [60, 30, 12]
    assert len(result["class_diversity"]) == 3
    shift = result["drift"]["shift"]
    assert shift[1] > 20
    assert shift[0] < 4
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_probabilities_come_from_models_that_have_not_seen_the_sample():
    x, y = _blobs()
    p = out_of_sample_probabilities(x, y, 3)
    assert torch.allclose(p.sum(1), torch.ones(102, dtype=torch.float64))
    assert float((p.argmax(1) == y).double().mean()) > 0.95
    # Random labels: a model that had seen the samples would be better than chance in 60 dimensions.
    generator = torch.Generator().manual_seed(0)
    noise, random = torch.randn(90, 60, generator=generator), torch.arange(90) % 3
    assert float((out_of_sample_probabilities(noise, random, 3).argmax(1) == random).double().mean()) < 0.55
    with pytest.raises(ValueError, match="2 samples"):
        out_of_sample_probabilities(x[:91], y[:91], 3)


def test_planted_label_errors_are_found():
    pytest.importorskip("cleanlab")
    x, y = _blobs()
    wrong = [3, 17, 70]
    y[wrong] = torch.tensor([1, 1, 0])
    result = audit(x, y, class_names=NAMES)
    found = {e["index"]: e for e in result["label_errors"]}
    # It need not name all, but names no sample that is right.
    assert 3 in found
    assert len(found) >= 2
    assert set(found) <= set(wrong)
    assert (found[3]["label"], found[3]["suggested"]) == (1, 0)
    assert found[3]["confidence"] < 0.5
    assert "cleanlab" in result["label_errors_note"]
    page = render_audit(result)
    assert "looks like" in page


def test_without_cleanlab_it_says_so(monkeypatch):
    for module in ("cleanlab", "cleanlab.filter"):
        monkeypatch.setitem(sys.modules, module, None)
    x, y = _blobs()
    assert suspected_label_errors(y, torch.full((102, 3), 1 / 3)) is None
    result = audit(x, y, class_names=NAMES)
    assert result["label_errors"] is None
    page = render_audit(result, title="my <data>")
    assert "cleanlab is not installed" in page
    assert "<script>alert" not in page
    assert "my <data>" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"<(img|link|iframe)|url\((?!#)|https?://", page)


def test_a_single_sample_is_no_reason_to_fail():
    x, y = _blobs()
    result = audit(x[:91], y[:91], class_names=NAMES)
    assert "single sample" in result["label_errors_note"]
    assert result["class_diversity"][2] == 0
    render_audit(result)


def test_a_hundred_classes_fit():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 100
    result = audit(
        torch.randn(300, 5, generator=generator), y, probabilities=torch.eye(100)[y], other=(torch.randn(300, 5), y)
    )
    page = render_audit(result)
    assert page.count("<tr>") >= 202


@pytest.mark.parametrize(
    "turn",
    [np.asarray, lambda a: a.astype(a.dtype.newbyteorder("S")), lambda a: a[::-1].copy()[::-1], np.asfortranarray],
)
def test_arrays_and_names_of_any_kind_are_the_same_data(turn):
    x, y = (part.numpy() for part in _blobs())
    p = np.eye(y.max() + 1)[y] * 0.9 + 0.1 / (y.max() + 1)
    names = [f"c{c}" for c in range(y.max() + 1)]
    expected = audit(
        *map(torch.from_numpy, (x, y)), class_names=names, probabilities=torch.from_numpy(p),
        other=(torch.from_numpy(x + 1), torch.from_numpy(y)),
    )  # fmt: skip
    found = audit(
        turn(x),
        turn(y.astype("u2")),
        class_names=[n.encode() for n in names],
        probabilities=turn(p),
        other=(turn(x + 1), turn(y)),
    )
    assert render_audit(found) == render_audit(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a"]}, "class_names has 1"),
        ({"class_names": ["a", "b", b"a"]}, "class_names holds 'a' twice"),
        ({"probabilities": torch.zeros(3, 3)}, "probabilities has shape"),
        ({"labels": torch.zeros(5).long()}, "labels must be"),
        ({"labels": torch.full((102,), 2)}, "no sample of class 0"),
        ({"features": torch.full((102, 4), float("nan"))}, "NaN"),
        ({"other": (torch.zeros(3, 2), torch.zeros(3).long())}, "other must have 4 features"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, y = _blobs()
    with pytest.raises(ValueError, match=message):
        audit(**{"features": x, "labels": y, **change})


def test_command_writes_a_page_and_replaces_none(tmp_path, capsys):
    x, y = _blobs()
    np.savez(tmp_path / "f.npz", features=x.numpy(), labels=y.numpy(), class_names=NAMES)
    out = tmp_path / "new" / "page.html"
    arguments = ["audit", str(tmp_path / "f.npz"), "--against", str(tmp_path / "f.npz"), "--out", str(out)]
    assert main(arguments) == 0
    assert "102 samples in 3 classes, 60 to 12 a class" in capsys.readouterr().out
    page = out.read_text()
    assert "<script>alert" not in page
    assert "<h2>Drift" in page
    assert main(arguments) == 2
    assert "exists; --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    np.savez(tmp_path / "bad.npz", features=x.numpy(), labels=y.numpy() * 2)
    assert main(["audit", str(tmp_path / "bad.npz"), "--out", str(tmp_path / "no.html")]) == 2
    assert "bad.npz: labels holds no sample of class 1" in capsys.readouterr().err
    assert not (tmp_path / "no.html").exists()


def test_features_are_streamed_from_the_file(tmp_path, monkeypatch):
    """They stay mapped and in their own precision, and V comes from blocks of a class's rows."""
    x, y = _blobs()
    np.savez(tmp_path / "f.npz", features=x.numpy(), labels=y.numpy())
    whole = audit(x.double(), y)
    mapped, seen = [], []
    monkeypatch.setattr(MODULE, "_BLOCK", 7)
    monkeypatch.setattr(MODULE, "load_features", lambda *a: mapped.append(load_features(*a)) or mapped[0])
    monkeypatch.setattr(MODULE, "audit", lambda x, y, **_: seen.append(x) or audit(x, y))
    result = audit_file(tmp_path / "f.npz", out=tmp_path / "page.html")
    assert isinstance(mapped[0]["features"], np.memmap)
    assert seen[0].data_ptr() == mapped[0]["features"].ctypes.data
    assert result["class_diversity"] == pytest.approx(whole["class_diversity"], rel=1e-12)
    # A class of fewer samples than features takes the smaller determinant.
    wide = torch.cat([x] * 5, dim=1)
    assert audit(wide, y)["class_diversity"][2] == pytest.approx(float(feature_diversity(wide[y == 2])), rel=1e-12)
