"""report.html: one self-contained page made from summary.json and metrics.jsonl alone. And the audit of a data set."""

from ltkernels.train.report.audit import audit, audit_file, render_audit
from ltkernels.train.report.run import render, save_pngs

__all__ = ["audit", "audit_file", "render", "render_audit", "save_pngs"]
