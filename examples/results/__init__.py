"""The experiments of `docs/results.md`: their definitions, execution and report. See `../report.py`."""
