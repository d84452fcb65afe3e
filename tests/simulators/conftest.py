"""Makes `simulator_toys` importable for the tests here and, through their `sys.path`, for the workers they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
