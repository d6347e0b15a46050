"""Runs: a folder per run, findings with intervals and controls, charts, and the report."""
