"""report.html: one self-contained page made from summary.json and metrics.jsonl alone."""

from ltkernels.train.report.page import render

__all__ = ["render"]
