"""Where ``python -m tools.sample_data`` was before; old commands go on working."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("tools.sample_data", run_name="__main__", alter_sys=True)
