"""The report of a run: one HTML file that opens offline, and findings.json beside it."""

from sonde.runs.report.page import write_report

__all__ = ["write_report"]
