"""What SoftCoT costs, each figure beside its rival's from the same process; `make bench` runs it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # the report's figures are drawn by the same code
