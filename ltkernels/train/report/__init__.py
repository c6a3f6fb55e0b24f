"""report.html: one self-contained page made from summary.json and metrics.jsonl alone. And the audit of a data set."""

from ltkernels.train.report.audit import audit, render_audit
from ltkernels.train.report.page import render

__all__ = ["audit", "render", "render_audit"]
