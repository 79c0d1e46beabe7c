"""Every stage behind SFT as its docstring says: two processes, --ddp, its demo data."""

import pytest
from conftest import STAGE_SIZES
from running import ROOT, run_ranks

TINY = f"{STAGE_SIZES} --max_steps=2 --batch_size=2 --device=cpu"
ROLLOUT = ["--max_new_tokens=8"]
OWN = {"lora": [], "distillation": [], "reward": [], "dpo": [], "grpo": ROLLOUT, "ppo": ROLLOUT}


@pytest.mark.parametrize("stage", OWN)
def test_two_processes_and_no_other_flag(stage, start_weights):
    places = [f"--out_dir={start_weights}"]
    if OWN[stage] != ROLLOUT:  # prompts are read anew at every start
        places.append(f"--cache_dir={start_weights / 'cache'}")
    printed = run_ranks(
        ROOT / f"trainer/train_{stage}.py", *TINY.split(), *places, *OWN[stage], "--ddp", nproc=2
    )
    assert "--strategy auto: ddp" in printed and "step 2/2" in printed and "finished" in printed
