"""Makes the toys importable; those of other tests serve here too."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("pipeline", "training", "simulators")]
