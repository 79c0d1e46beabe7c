"""Moved to trainer/engines/train_sft_accelerate.py; this path goes on working."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "engines" / Path(__file__).name), run_name="__main__")
