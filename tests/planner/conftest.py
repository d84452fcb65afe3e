"""Makes the toys of the training tests importable, here and in the processes that tests start."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "training")]
