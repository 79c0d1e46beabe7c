"""Lightning as the engine: the curve of one process by DDP and by its model-parallel strategy, resume, signals."""

import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import check_same_run, curve, write_jsonl
from running import ROOT, on_a_terminal, run_script, wait_for_steps

from runtime import lightning_engine

pytest.importorskip("lightning", reason="PyTorch Lightning is not installed: pip install lightning")

SFT, SCRIPT, NAME = "trainer/train_full_sft.py", "trainer/train_sft_lightning.py", "full_sft_32_moe"
TINY = "--dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --device=cpu --max_seq_len=64 --from_weight=none".split()
RUN = "--use_moe=1 --global_batch_size=8 --batch_size=2 --epochs=2 --learning_rate=3e-3 --eval_ratio=0.05".split()

# Runs the script argv[1], counting the exchanges of gradients, by DDP and by FSDP2, per bucket or block.
COUNTING = """
import runpy, sys
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

made, reduce, exchanges = DDP.__init__, fsdp.foreach_reduce, []

def hook(state, bucket):
    exchanges.extend([1] if bucket.is_last() else [])
    return allreduce_hook(None, bucket)

def init(self, *args, **options):
    made(self, *args, **options)
    self.register_comm_hook(None, hook)

def counted(*args, **options):
    exchanges.append(1)
    return reduce(*args, **options)

DDP.__init__, fsdp.foreach_reduce = init, counted
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(f"exchanged {len(exchanges)} times", flush=True)
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Data with answers of very unequal length, the last window of an epoch shorter than the others."""
    folder = tmp_path_factory.mktemp("lightning")
    turns = [(f"say it {n} times", "it " * (n * 7 % 40 + 1)) for n in range(1, 98)]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in turns]
    data = write_jsonl(folder / "data.jsonl", rows)
    return [*TINY, *RUN, "--log_interval=1", f"--data_path={data}", f"--cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory) -> Path:
    """The run of one process without an engine."""
    out = tmp_path_factory.mktemp("one")
    done = run_script(SFT, *flags, f"--out_dir={out}")
    assert done.returncode == 0, done.stderr
    return out / NAME


def metrics(out: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in curve(out / NAME) if key in line}


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_two_processes_give_the_curve_of_one(flags, one, tmp_path, strategy):
    """With two micro-batches in a step, and one exchange of gradients: FSDP2 has one for each block and the rest."""
    driver = tmp_path / "counting.py"
    driver.write_text(COUNTING)
    trackers = ["--report_to", "tensorboard", "wandb"] if strategy == "ddp" else []
    job = ["--ddp", *flags, f"--strategy={strategy}", f"--out_dir={tmp_path}", *trackers]
    done = run_script(driver, ROOT / SCRIPT, *job, nproc=2)
    assert done.returncode == 0, done.stderr
    assert f" on 2 x cpu, {strategy}, float32, " in done.stdout
    steps, each = max(metrics(tmp_path, "loss")), 1 if strategy == "ddp" else 3
    assert done.stdout.count(f"exchanged {steps * each} times") == 2, done.stdout
    check_same_run(tmp_path / NAME, one)
    if trackers:
        assert list((tmp_path / NAME).glob("tensorboard/events.out.tfevents.*"))
        assert list((tmp_path / NAME).glob("wandb/offline-run-*"))


def test_signal_saves_and_another_number_of_processes_goes_on(flags, one, tmp_path, start_script):
    job = [*flags, f"--out_dir={tmp_path}", "--save_interval=0", "--resume=auto"]
    process = start_script(SCRIPT, *job)
    wait_for_steps(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.log.read_text()
    step = max(metrics(tmp_path, "loss"))
    assert [folder.name for folder in (tmp_path / NAME / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    done = run_script(SCRIPT, "--ddp", *job, nproc=2)
    assert done.returncode == 0 and f"behind step {step}" in done.stdout, done.stderr
    check_same_run(tmp_path / NAME, one)


@pytest.mark.parametrize("nproc, strategy", [(None, "auto"), (2, "model_parallel")])
def test_resume_is_bit_identical_and_passes_over_a_torn_checkpoint(flags, tmp_path, nproc, strategy):
    job = [*flags, "--dropout=0.1", "--save_interval=4", "--max_steps=8", f"--strategy={strategy}"]
    job += ["--ddp"] if nproc else []
    assert run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'whole'}", nproc=nproc).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    torn = tmp_path / "torn" / NAME / "checkpoints/step_00000008/engine"
    torn = next(torn.glob("*.distcp")) if nproc else torn
    torn.write_bytes(torn.read_bytes()[:-100])
    done = run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'torn'}", "--resume=auto", nproc=nproc)
    assert done.returncode == 0 and "behind step 4" in done.stdout and "step_00000008 is damaged" in done.stderr
    assert metrics(tmp_path / "torn", "loss") == metrics(tmp_path / "whole", "loss")
    ours, whole = (torch.load(tmp_path / name / f"{NAME}.pth", weights_only=True) for name in ("torn", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_run_on_a_terminal_and_a_finished_one_that_is_given_more_steps(flags, tmp_path):
    job = [*flags, f"--out_dir={tmp_path}", "--resume=auto"]
    code, shown = on_a_terminal(SCRIPT, *job, "--max_steps=3")
    assert code == 0, shown
    assert "Epoch 0: 100%" in shown and "3/3" in shown and "loss=" in shown  # Lightning's progress bar
    done = run_script(SCRIPT, *job, "--max_steps=3")
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    done = run_script(SCRIPT, *job, "--max_steps=5")
    assert done.returncode == 0 and "was to end at step 3 and now ends at 5" in done.stdout, done.stderr
    assert list(metrics(tmp_path, "loss")) == [1, 2, 3, 4, 5]


def test_float16_is_scaled_as_without_lightning(flags, tmp_path):
    """Lightning would turn it into bfloat16 on a CPU."""
    job = [*flags, "--dtype=float16", "--max_steps=4"]
    for script in (SFT, SCRIPT):
        assert run_script(script, *job, f"--out_dir={tmp_path / script}").returncode == 0
    assert metrics(tmp_path / SCRIPT, "loss") == metrics(tmp_path / SFT, "loss")


def test_refused_before_anything_starts(monkeypatch):
    with pytest.raises(ValueError, match="--strategy model_parallel shares over processes: add --ddp"):
        lightning_engine.check_launch(SimpleNamespace(ddp=False, strategy="model_parallel"))
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ValueError, match="not installed; pip install lightning"):
        lightning_engine.check_launch(SimpleNamespace(ddp=True, strategy="auto"))
