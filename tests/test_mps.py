"""On a made-up Apple GPU, which fails on what a real one lacks: a step of every stage, and chats."""

import json
import re

import pytest
import torch
from conftest import RUN_FLAGS, chat, write_jsonl
from running import run_script

DEVICE = "fakemps"  # see fake_mps.py
PAIRS = [{"prompt": f"say {n}", "chosen": "yes " * (1 + n), "rejected": "no"} for n in range(8)]
CHATS = [chat(f"question {n}", f"yes {n} " * (1 + n % 3)) for n in range(8)]
PROMPTS = [{"messages": [{"role": "user", "content": f"2 + {n}"}], "answer": "4"} for n in range(8)]
SFT, CHANGED = "trainer/train_full_sft.py", ["--resume_with_changes"]
ROLLOUTS = ("--max_new_tokens=4", "--reward=exact")
# Name: (script, rows, flags)
STAGES = {
    "pretrain": ("train_pretrain", [{"text": f"a text {n}"} for n in range(8)], ()),
    "SFT": ("train_full_sft", CHATS, ("--eval_ratio=0.3",)),
    "SFT, MoE, Muon": ("train_full_sft", CHATS, ("--use_moe=1", "--optimizer=muon")),
    "SFT, float16, LAMB": ("train_full_sft", CHATS, ("--dtype=float16", "--optimizer=lamb")),
    "SFT, bfloat16": (
        "train_full_sft",
        CHATS,
        ("--dtype=bfloat16", "--gradient_checkpointing=1", "--packing=0", "--num_workers=1"),
    ),
    "LoRA": ("train_lora", CHATS, ()),
    "distillation": ("train_distillation", CHATS, ()),
    "reward": ("train_reward", PAIRS, ()),
    "DPO": ("train_dpo", PAIRS, ()),
    "GRPO": ("train_grpo", PROMPTS, ROLLOUTS),
    "PPO": ("train_ppo", PROMPTS, ROLLOUTS),
}


def on_device(script: str, *words):
    done = run_script("tests/fake_mps.py", script, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """SFT weights that were trained there."""
    folder = tmp_path_factory.mktemp("start")
    data = write_jsonl(folder / "d.jsonl", CHATS)
    words = [*RUN_FLAGS, f"--device={DEVICE}", f"--data_path={data}", f"--out_dir={folder}"]
    words += [f"--cache_dir={folder / 'cache'}", "--from_weight=none", "--batch_size=4"]
    on_device("trainer/train_full_sft.py", *words, "--max_steps=1")
    return folder / "full_sft_32.pth"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage(name, weights, tmp_path):
    script, rows, flags = STAGES[name]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    words = [*RUN_FLAGS, f"--device={DEVICE}", f"--data_path={data}", f"--out_dir={tmp_path}"]
    words += [
        "--batch_size=4",
        "--max_steps=1",
        "--epochs=4",
        "--save_interval=1",
        "--save_weight=x",
    ]
    words += [f"--from_weight={'none' if '--use_moe=1' in flags else weights}"]
    words += [] if name in ("GRPO", "PPO") else [f"--cache_dir={tmp_path / 'cache'}"]
    words += [f"--teacher_weight={weights}"] if name == "distillation" else []
    done = on_device(f"trainer/{script}.py", *words, *flags)
    assert f"1 x {DEVICE}" in done.stdout and "kernels: none" in done.stdout
    assert int(re.search(rf"(\d+) operators on {DEVICE}", done.stderr)[1]) > 50
    saved = next(path for path in tmp_path.glob("x_32*.pth"))
    state = torch.load(saved, weights_only=True)
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert {value.device.type for value in state.values()} == {"cpu"}


def test_the_curve_is_that_of_the_cpu(weights, tmp_path):
    """auto takes the GPU; its losses and gradient norms are those of float32 on the CPU."""
    data, curves = write_jsonl(tmp_path / "d.jsonl", CHATS), []
    for device in ("auto", "cpu"):
        out = tmp_path / device
        words = [*RUN_FLAGS, f"--device={device}", f"--data_path={data}", f"--out_dir={out}"]
        words += [f"--cache_dir={tmp_path / 'cache'}", f"--from_weight={weights}"]
        words += ["--batch_size=2", "--save_interval=2"]
        for steps in (2, 3):  # the second time it resumes
            done = on_device(SFT, *words, f"--max_steps={steps}", "--resume=auto", *CHANGED)
            assert f"1 x {DEVICE if device == 'auto' else 'cpu'}" in done.stdout
        lines = (out / "full_sft_32/metrics.jsonl").read_text().splitlines()
        curves.append([(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)])
    assert curves[0] == [pytest.approx(line, rel=1e-5) for line in curves[1]]


def test_chat_and_scoring(weights, tmp_path):
    words = ["eval_model.py", f"--weight={weights}", "--max_new_tokens=4"]
    sampling = ["--temperature=0.8", "--top_p=0.9", "--top_k=9", "--repetition_penalty=1.1"]
    said = on_device(*words, "--prompt=hello", *sampling)
    assert f"operators on {DEVICE}" in said.stderr
    # Some replies end before others: their rows leave the cache.
    turns = [{"role": "user", "content": "a question"}]
    rows = [{"task": "t", "conversations": turns, "answer": "a " * 9 * n + "."} for n in range(4)]
    words = [*words[:2], "--max_new_tokens=30"]
    scored = on_device(*words, f"--eval_file={write_jsonl(tmp_path / 'e.jsonl', rows)}")
    assert f"operators on {DEVICE}" in scored.stderr


@pytest.mark.parametrize(
    ("words", "fault"),
    (
        (["trainer/train_full_sft.py", "--device=mps"], "--device mps: torch .* sees no GPU"),
        (["trainer/train_dpo.py", "--device=mps", "--ddp"], "--device mps: .* no process groups"),
        (["eval_model.py", "--device=mps", "--prompt=x"], "--device mps: torch .* sees no GPU"),
    ),
)
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_where_it_cannot_be_had(words, fault):
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = run_script(*words, env={**variables, "MASTER_ADDR": "::1", "MASTER_PORT": "1"})
    assert done.returncode == 2 and re.fullmatch(f"error: {fault}.*\n", done.stderr), done.stderr
