"""The experiments behind `docs/results.md`: what is run, how it is run, and how it is told. See `../report.py`."""
