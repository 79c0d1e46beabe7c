"""Resume in every stage and engine: the weights of a finished run, and changed flags."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import chat, curve, write_jsonl
from running import ROOT, run_ranks

TINY = (
    "--dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --max_seq_len=64 --device=cpu --batch_size=2"
)
TINY += " --from_weight=none --log_interval=1 --save_interval=1 --max_steps=2 --epochs=9"
ROLLOUTS = ["--reward=format", "--max_new_tokens=4"]
# Job -> (script, processes, flags of its own)
JOBS = {
    "pretrain": ("pretrain", None, []),
    "full_sft": ("full_sft", None, []),
    "full_sft zero3": ("full_sft", 2, ["--strategy=zero3"]),
    "lora": ("lora", None, []),
    "lora zero2": ("lora", 2, ["--strategy=zero2"]),
    "distillation": ("distillation", None, ["--teacher_weight=full_sft"]),
    "dpo": ("dpo", None, []),
    "reward": ("reward", None, []),
    "grpo": ("grpo", None, [*ROLLOUTS, "--group_size=2"]),
    "ppo": ("ppo", None, [*ROLLOUTS, "--ppo_epochs=1"]),
    "ppo zero3": ("ppo", 2, [*ROLLOUTS, "--ppo_epochs=1", "--strategy=zero3"]),
    "deepspeed": ("sft_deepspeed", None, []),
    "deepspeed zero3": ("sft_deepspeed", 2, ["--deepspeed_config=zero3.json"]),
    "accelerate": ("sft_accelerate", None, []),
    "lightning": ("sft_lightning", None, []),
    "lightning model_parallel": ("sft_lightning", 2, ["--strategy=model_parallel"]),
    "pipeline": ("sft_pipeline", 2, ["--batch_size=1"]),
}
NEEDS = {"sft_deepspeed": "deepspeed", "sft_accelerate": "accelerate", "sft_lightning": "lightning"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Stage -> its data; the others have conversations."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"say {n}", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 20)]
    prompts = [
        {"messages": [{"role": "user", "content": f"say {n}"}], "answer": "a"} for n in range(20)
    ]
    rows = {
        "pretrain": [{"text": f"{n} is a number " * n} for n in range(1, 20)],
        "sft": [chat(f"say {n}", "it " * (n % 7 + 1)) for n in range(20)],
        "dpo": pairs,
        "reward": pairs,
        "grpo": prompts,
        "ppo": prompts,
    }
    return {stage: write_jsonl(folder / f"{stage}.jsonl", found) for stage, found in rows.items()}


@pytest.fixture(scope="module")
def begin(data, start_weights, tmp_path_factory):
    """Return begin(job) -> (folder, resume) of a finished run; resume(*flags, code=0) -> output."""
    finished = {}

    def make(job: str, folder: Path | None = None):
        script, nproc, own = JOBS[job]
        if script in NEEDS:
            pytest.importorskip(NEEDS[script])
        if job not in finished:
            out = tmp_path_factory.mktemp("runs") / job.replace(" ", "_")
            out.mkdir()
            for path in start_weights.glob("full_sft_32.*"):
                shutil.copy(
                    path,
                    out
                    / path.name.replace("full_sft", "teacher" if "sft" in script else "full_sft"),
                )
            place = f"--data_path={data.get(script, data['sft'])}"
            switch = ["--ddp"] if nproc else []
            caches = [] if script in ("grpo", "ppo") else [f"--cache_dir={out.parent / 'cache'}"]
            words = [f"trainer/train_{script}.py", *TINY.split(), place, *caches, *own, *switch]
            run_ranks(*words, f"--out_dir={out}", nproc=nproc)
            run = next(
                path for path in out.iterdir() if path.is_dir() and (path / "checkpoints").is_dir()
            )
            finished[job] = run, words, nproc
        run, words, nproc = finished[job]
        out = shutil.copytree(run.parent, folder / "out")

        def resume(*flags: str, code: int = 0) -> str:
            given = (f"--out_dir={out}", "--resume=auto", *flags)
            return run_ranks(*words, *given, nproc=nproc, code=code)

        return out / run.name, resume

    return make


@pytest.mark.parametrize("job", JOBS)
def test_what_a_finished_run_names_is_there(begin, tmp_path, job):
    """As if killed between its last checkpoint and its weights, which are missing or older."""
    run, resume = begin(job, tmp_path)
    weights, config = run.with_name(f"{run.name}.pth"), run.with_name(f"{run.name}.json")
    wanted, text = torch.load(weights, weights_only=True), config.read_text()
    torch.save({name: torch.zeros_like(value) for name, value in wanted.items()}, weights)
    config.unlink()
    printed = resume()
    assert "behind step 2" in printed and f" in {weights}" in printed.split("finished; ")[1], (
        printed
    )
    found = torch.load(weights, weights_only=True)
    assert found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )
    assert config.read_text() == text


# Job -> changed flags of its own, and what is said of them.
CHANGES = {
    "pretrain": {
        "--warmup_ratio=0.5": "was 0.03 and is 0.5",
        "--grad_clip=2": "was 1.0 and is 2.0",
    },
    "full_sft": {
        "--lr_schedule=linear": "was cosine and is linear",
        "--dtype=bfloat16": "was float32 and is bfloat16",
    },
    "lora": {"--lora_alpha=32": "was 16.0 and is 32.0", "--lora_dropout=0.1": "was 0.0 and is 0.1"},
    "distillation": {"--kl_weight=0.2": "was 0.5 and is 0.2"},
    "dpo": {"--beta=0.3": "was 0.1 and is 0.3", "--label_smoothing=0.1": "was 0.0 and is 0.1"},
    "reward": {"--weight_decay=0.3": "was 0.1 and is 0.3"},
    "grpo": {
        "--clip_high=0.3": "was 0.2 and is 0.3",
        "--reward=exact": "was ['format'] and is ['exact']",
    },
    "ppo": {"--gamma=0.9": "was 1.0 and is 0.9", "--gae_lambda=0.9": "was 0.95 and is 0.9"},
    "deepspeed": {"--grad_clip=2": "was 1.0 and is 2.0"},
    "accelerate": {"--grad_clip=2": "was 1.0 and is 2.0"},
    "lightning": {"--grad_clip=2": "was 1.0 and is 2.0"},
    "pipeline": {"--grad_clip=2": "was 1.0 and is 2.0"},
}


@pytest.mark.parametrize("job", CHANGES)
def test_changed_flags_are_refused_by_name_or_accepted_and_remembered(begin, tmp_path, job):
    run, resume = begin(job, tmp_path)
    own = CHANGES[job] | {"--learning_rate=0.25": " and is 0.25", "--max_steps=3": "was 2 and is 3"}
    flags, before = (
        [*own, "--save_interval=5", "--log_interval=2"],
        (run / "args.json").read_bytes(),
    )
    error = re.search("^error: .*", resume(*flags, code=2), re.MULTILINE)[0]
    for flag, values in own.items():
        name = flag.partition("=")[0]
        assert re.search(rf"[:;] {name} [^;]*{re.escape(values)}[;.]", error), error
    assert error.count(" was ") == len(own) + 1 and "interval" not in error, error
    assert (run / "args.json").read_bytes() == before
    changed = re.search("this is another run: (.*?)[.] Use the flags", error)[1]
    printed = resume(*flags, "--resume_with_changes")
    assert f"--resume_with_changes: from step_00000002 on {changed}\n" in printed
    assert changed in (run / "training.log").read_text()
    (entry,) = json.loads((run / "args.json").read_text())["history"]
    assert (
        entry["changed"].items()
        >= {"max_steps": [2, 3], "save_interval": [1, 5], "log_interval": [1, 2]}.items()
    )
    assert {flag.partition("=")[0][2:] for flag in own} <= entry["changed"].keys()
    assert curve(run)[-1]["step"] == 3 and curve(run)[-1]["lr"] > 0.02  # a tenth of 0.25 and more


MEDDLING = f"""import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from runtime import checkpoint
from runtime import parallel
calls = []
def meddle(place, name, at, number):
    original = getattr(place, name)
    def function(*args):
        calls.append(name)
        return os.kill(os.getpid(), number) if len(calls) == at else original(*args)
    setattr(place, name, function)
"""


@pytest.fixture
def meddled(data, tmp_path):
    """Return meddled(line, *flags, code=0) -> what train_full_sft.py prints behind that line."""

    def run(line: str, *flags: str, code: int = 0) -> str:
        script = tmp_path / "meddling.py"
        script.write_text(
            f'{MEDDLING}{line}\nrunpy.run_path("trainer/train_full_sft.py", run_name="__main__")\n'
        )
        places = [
            f"--data_path={data['sft']}",
            f"--cache_dir={tmp_path / 'cache'}",
            f"--out_dir={tmp_path / 'out'}",
        ]
        return run_ranks(
            script, *TINY.split(), *places, "--packing=0", "--resume=auto", *flags, code=code
        )

    return run


@pytest.mark.parametrize("how", ["killed", "in the way"])
def test_the_last_weights_could_not_be_written(meddled, tmp_path, how):
    """The last checkpoint was: the run that goes on from there makes no step, and writes them."""
    weights, flags = tmp_path / "out/full_sft_32.pth", ["--save_interval=3", "--max_steps=6"]
    if how == "killed":  # at the second save, with the weights of step 3 in place
        meddled('meddle(checkpoint, "write_weights", 2, 9)', *flags, code=-9)
    else:
        in_the_way = tmp_path / "out/.tmp-full_sft_32.pth"
        in_the_way.mkdir(parents=True)
        meddled("", *flags, "--save_interval=0", code=2)
        in_the_way.rmdir()
    assert (tmp_path / "out/full_sft_32/checkpoints/step_00000006/manifest.json").exists()
    assert "finished" in meddled("", *flags)
    found = torch.load(weights, weights_only=True)
    meddled("", *flags, f"--out_dir={tmp_path / 'whole'}")
    whole = torch.load(tmp_path / "whole/full_sft_32.pth", weights_only=True)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_signal_behind_the_last_step_of_an_epoch_is_heard_in_the_next(meddled, tmp_path):
    """Its step had been agreed on without the signal: other ranks would go on."""
    flags = ["--max_steps=0", "--epochs=3", "--batch_size=4", "--save_interval=0"]
    printed = meddled('meddle(parallel, "check_replicas", 5, 15)', *flags, code=143)
    assert "stopped by signal 15 at step 6" in printed
    assert (tmp_path / "out/full_sft_32/checkpoints/step_00000006/manifest.json").exists()
