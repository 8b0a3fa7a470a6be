"""Reports: one self-contained page per run, a page that compares runs, and results as text."""

from deepmsi.report.compare import report_comparison
from deepmsi.report.page import report

__all__ = ["report", "report_comparison"]
