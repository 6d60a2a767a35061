"""The scripts in benchmarks/ import one another by their plain names, as when they are run."""

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "benchmarks/experiments"
sys.path.insert(0, str(EXPERIMENTS))
