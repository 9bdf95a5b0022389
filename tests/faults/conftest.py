import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # until pyproject.toml has pythonpath = ["tests"]

import engine_support

rig = engine_support.rig
