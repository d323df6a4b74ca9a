"""Benchmarks of SoftCoT and other methods, measured in the same process; `make bench` runs them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # share the code for the report's figures
