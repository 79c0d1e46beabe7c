"""Where the code lies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("model", "kernels", "dataset", "runtime", "trainer")  # whose files decide how a run goes
