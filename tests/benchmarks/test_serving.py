"""The server's benchmarks: thousands of odd requests, here a hundred; and their table."""

import re
import subprocess
import sys

import pytest
import torch
from running import ROOT
from serving import SHAPE, save

from model.lm import LMConfig, MiniMindLM

for package in ("starlette", "uvicorn", "httptools", "llguidance"):
    pytest.importorskip(package, reason="pip install -r requirements-serve.txt")


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    return save(MiniMindLM(LMConfig(vocab_size=6400, **SHAPE)).eval(), tmp_path)


def run(script: str, *flags: str) -> str:
    """What a benchmark prints; it starts a server itself."""
    command = [sys.executable, str(ROOT / "benchmarks/serving" / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_soak_finds_nothing(weights):
    out = run("soak.py", f"--weight={weights}", "--requests=150")
    assert "150 requests: 0 wrong (0), " in out and "; no slot taken" in out


def test_throughput_is_a_ratio_of_one_run(weights):
    out = run("run.py", f"--weight={weights}", "--only=throughput", "--rounds=1")
    assert re.findall(r"64 clients, (\w+): \d+ tokens/s, [\d.]+ of it", out) == [
        "streamed",
        "whole",
    ]
