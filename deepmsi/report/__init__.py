"""Reports: one self-contained page per run, and results as text."""

from deepmsi.report.page import report

__all__ = ["report"]
