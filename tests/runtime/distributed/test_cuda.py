"""What only a GPU shows: its kernels, its dtypes, NCCL, recorded steps. Where there is none all are
skipped, aloud."""

import pytest
import torch
from conftest import RUN_FLAGS, STAGE_SIZES, conversations, curve, losses, write_jsonl
from running import run_script, wait_for_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FLAGS = [flag for flag in RUN_FLAGS if "--device" not in flag] + [
    "--from_weight=none",
    "--max_steps=12",
]


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(name, *flags, nproc=) -> the folder of the run."""
    folder = tmp_path_factory.mktemp("cuda")
    data = write_jsonl(folder / "data.jsonl", conversations(90))

    def run(name: str, *flags: str, nproc: int | None = None):
        words = [*run.flags, f"--out_dir={folder / name}", *(["--ddp"] if nproc else []), *flags]
        done = run_script("trainer/train_full_sft.py", *words, nproc=nproc, gpu=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return next(path for path in (folder / name).iterdir() if path.is_dir())

    run.folder, run.flags = (
        folder,
        [*FLAGS, f"--data_path={data}", f"--cache_dir={folder / 'cache'}"],
    )
    return run


@pytest.fixture(scope="module")
def reference(train):
    """The run of a CPU in float32."""
    return losses(train("cpu", "--device=cpu"))


@pytest.mark.parametrize(
    "dtype, accuracy", [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 2e-2)]
)
def test_the_curve_of_a_gpu_is_that_of_a_cpu(train, reference, dtype, accuracy):
    run = losses(train(dtype, "--device=cuda", f"--dtype={dtype}"))
    assert run.keys() == reference.keys()
    assert [*run.values()] == pytest.approx([*reference.values()], rel=accuracy)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_strategies_over_nccl_give_the_same_curve(train, reference, strategy):
    run = losses(train(strategy, "--dtype=float32", f"--strategy={strategy}", nproc=1))
    assert [*run.values()] == pytest.approx([*reference.values()], rel=1e-4)


@pytest.mark.parametrize(
    "flags", ["--compile=1", "--gradient_checkpointing=1", "--gradient_checkpointing=2"]
)
def test_ways_to_save_time_and_memory_give_the_same_curve(train, reference, flags):
    run = losses(train(flags, flags, "--dtype=bfloat16"))
    assert [*run.values()] == pytest.approx([*reference.values()], rel=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mixture_of_experts_trains(train, dtype):
    run = [line["loss"] for line in curve(train(f"moe_{dtype}", "--use_moe=1", f"--dtype={dtype}"))]
    assert run[-1] < run[0]


@pytest.mark.parametrize("kind", ["--use_moe=0", "--use_moe=1", "--compile=1"])
def test_killed_run_resumes_bit_identically(train, start_script, kind):
    flags = [kind, "--dtype=bfloat16", "--save_interval=5", "--epochs=20", "--max_steps=150"]
    whole, out = train(f"whole_{kind}", *flags), train.folder / f"killed_{kind}"
    flags = [*train.flags, *flags, f"--out_dir={out}", "--resume=auto"]
    process = start_script("trainer/train_full_sft.py", *flags, gpu=True)
    wait_for_steps(process, out, 30)
    process.kill()
    process.wait()
    done = run_script("trainer/train_full_sft.py", *flags, gpu=True)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout + done.stderr
    ours, expected = (
        torch.load(f"{path}.pth", weights_only=True) for path in (out / whole.name, whole)
    )
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


ROLLOUT = ["--max_new_tokens=8", "--temperature=0.9"]
STAGES = {"pretrain": [], "lora": [], "distillation": [], "reward": [], "dpo": [], "grpo": ROLLOUT, "ppo": ROLLOUT,
          "sft_accelerate": [], "sft_lightning": []}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs(stage, start_weights):
    flags = [
        *STAGE_SIZES.split(),
        "--max_steps=3",
        "--batch_size=2",
        f"--out_dir={start_weights}",
        *STAGES[stage],
    ]
    done = run_script(f"trainer/train_{stage}.py", *flags, gpu=True, timeout=300)
    assert done.returncode == 0 and "finished" in done.stdout and "1 x cuda" in done.stdout, (
        done.stdout + done.stderr
    )


def test_a_reply_is_drawn(start_weights):
    flags = [
        "--prompt=hello",
        f"--out_dir={start_weights}",
        "--temperature=1",
        "--top_p=0.9",
        "--max_new_tokens=9",
    ]
    done = run_script("eval_model.py", *flags, gpu=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
