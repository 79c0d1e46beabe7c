"""Lightning as the engine: the curve of one process by DDP and by its model-parallel strategy, resume, signals."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script, write_jsonl

from runtime import lightning_engine

pytest.importorskip("lightning", reason="PyTorch Lightning is not installed: pip install lightning")

SFT, SCRIPT = "trainer/train_full_sft.py", "trainer/train_sft_lightning.py"
TINY = "--dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --device=cpu --max_seq_len=64 --from_weight=none".split()
RUN = "--global_batch_size=8 --batch_size=2 --epochs=2 --learning_rate=3e-3 --eval_ratio=0.05 --log_interval=1".split()

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
    return [*TINY, *RUN, f"--data_path={data}", f"--cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory) -> dict[str, Path]:
    """--use_moe -> the run of one process without an engine."""
    folders = {}
    for use_moe in "01":
        folders[use_moe] = tmp_path_factory.mktemp("one")
        done = run_script(SFT, *flags, f"--use_moe={use_moe}", f"--out_dir={folders[use_moe]}")
        assert done.returncode == 0, done.stderr
    return folders


def metrics(out: Path, key: str) -> dict[int, float]:
    (path,) = out.glob("full_sft_32*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def check_same_run(out: Path, reference: Path) -> None:
    """Losses, gradient norms and the evaluation agree, and the weights file is as plain as the other one."""
    for key, tolerance in (("loss", 1e-5), ("aux_loss", 1e-5), ("grad_norm", 1e-4), ("eval_loss", 1e-5), ("lr", 0)):
        assert metrics(out, key) == pytest.approx(metrics(reference, key), rel=tolerance), key
    assert metrics(out, "epoch") == metrics(reference, "epoch")
    ours, theirs = (torch.load(next(f.glob("full_sft_32*.pth")), weights_only=True) for f in (out, reference))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize("use_moe, strategy", [("0", "ddp"), ("1", "model_parallel")])
def test_two_processes_give_the_curve_of_one(flags, one, tmp_path, use_moe, strategy):
    """With two micro-batches in a step, and one exchange of gradients: FSDP2 has one for each block and the rest."""
    driver = tmp_path / "counting.py"
    driver.write_text(COUNTING)
    trackers = ["--report_to", "tensorboard", "wandb"] if (use_moe, strategy) == ("0", "ddp") else []
    job = ["--ddp", *flags, f"--strategy={strategy}", f"--use_moe={use_moe}", f"--out_dir={tmp_path}", *trackers]
    done = run_script(driver, ROOT / SCRIPT, *job, nproc=2)
    assert done.returncode == 0, done.stderr
    assert f" on 2 x cpu, {strategy}, float32, " in done.stdout
    steps, each = max(metrics(tmp_path, "loss")), 1 if strategy == "ddp" else 3
    assert done.stdout.count(f"exchanged {steps * each} times") == 2, done.stdout
    check_same_run(tmp_path, one[use_moe])
    if trackers:
        assert list(tmp_path.glob("full_sft_32/tensorboard/events.out.tfevents.*"))
        assert list(tmp_path.glob("full_sft_32/wandb/offline-run-*"))


def test_signal_saves_and_another_number_of_processes_goes_on(flags, one, tmp_path, start_script):
    job = [*flags, f"--out_dir={tmp_path}", "--save_interval=0", "--resume=auto"]
    process = start_script(SCRIPT, *job)
    path = tmp_path / "full_sft_32/metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.log.read_text()
    step = max(metrics(tmp_path, "loss"))
    assert [folder.name for folder in (tmp_path / "full_sft_32/checkpoints").iterdir()] == [f"step_{step:08d}"]
    done = run_script(SCRIPT, "--ddp", *job, nproc=2)
    assert done.returncode == 0 and f"behind step {step}" in done.stdout, done.stderr
    check_same_run(tmp_path, one["0"])


@pytest.mark.parametrize("nproc, strategy", [(None, "auto"), (2, "model_parallel")])
def test_resume_is_bit_identical_and_passes_over_a_torn_checkpoint(flags, tmp_path, nproc, strategy):
    job = [*flags, "--dropout=0.1", "--save_interval=4", "--max_steps=8", f"--strategy={strategy}"]
    job += ["--ddp"] if nproc else []
    assert run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'whole'}", nproc=nproc).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    torn = tmp_path / "torn/full_sft_32/checkpoints/step_00000008/engine"
    torn = next(torn.glob("*.distcp")) if nproc else torn
    torn.write_bytes(torn.read_bytes()[:-100])
    done = run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'torn'}", "--resume=auto", nproc=nproc)
    assert done.returncode == 0 and "behind step 4" in done.stdout and "step_00000008 is damaged" in done.stderr
    assert metrics(tmp_path / "torn", "loss") == metrics(tmp_path / "whole", "loss")
    ours, whole = (torch.load(tmp_path / name / "full_sft_32.pth", weights_only=True) for name in ("torn", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_finished_run_that_is_given_more_steps(flags, tmp_path):
    job = [*flags, f"--out_dir={tmp_path}", "--resume=auto"]
    assert run_script(SCRIPT, *job, "--max_steps=3").returncode == 0
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


def test_its_progress_bar_is_on_a_terminal(flags, tmp_path):
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # without a width nothing is shown
    command = [sys.executable, ROOT / SCRIPT, *flags, f"--out_dir={tmp_path}", "--max_steps=3"]
    process = subprocess.Popen(command, stdout=there, stderr=subprocess.DEVNULL)
    os.close(there)
    shown = b""
    try:
        while part := os.read(here, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0, shown.decode()
    assert "Epoch 0: 100%" in shown.decode() and "3/3" in shown.decode() and "loss=" in shown.decode()


def test_refused_before_anything_starts(monkeypatch):
    with pytest.raises(ValueError, match="--strategy model_parallel shares over processes: add --ddp"):
        lightning_engine.check_launch(SimpleNamespace(ddp=False, strategy="model_parallel"))
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ValueError, match="not installed; pip install lightning"):
        lightning_engine.check_launch(SimpleNamespace(ddp=True, strategy="auto"))
