"""Every stage behind SFT as its docstring says: started on two processes with nothing but --ddp, on its demo data."""

import pytest
import torch
from running import ROOT, run_ranks

from model.lm import LMConfig, MiniMindLM

TINY = "--dim=32 --n_layers=1 --n_heads=4 --n_kv_heads=2 --max_seq_len=128 --max_steps=2 --batch_size=2 --device=cpu"
ROLLOUT = ["--max_new_tokens=8"]
OWN = {"lora": [], "distillation": [], "reward": [], "dpo": [], "grpo": ROLLOUT, "ppo": ROLLOUT}


@pytest.fixture(scope="module")
def start_weights(tmp_path_factory, tokenizer):
    """An SFT model as the stages look for it: full_sft_32.pth in --out_dir."""
    out = tmp_path_factory.mktemp("stages")
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128}
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **sizes))
    torch.save(model.state_dict(), out / "full_sft_32.pth")
    (out / "full_sft_32.json").write_text(model.config.to_json())
    return out


@pytest.mark.parametrize("stage", OWN)
def test_two_processes_and_no_other_flag(stage, start_weights):
    places = [f"--out_dir={start_weights}"]
    if OWN[stage] != ROLLOUT:  # prompts are read anew at every start
        places.append(f"--cache_dir={start_weights / 'cache'}")
    printed = run_ranks(ROOT / f"trainer/train_{stage}.py", *TINY.split(), *places, *OWN[stage], "--ddp", nproc=2)
    assert "--strategy auto: ddp" in printed and "step 2/2" in printed and "finished" in printed
