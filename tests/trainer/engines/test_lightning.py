"""Lightning as the engine: the curve of one process by both strategies, resume, signals."""

import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ENGINE_RUN as NAME
from conftest import check_same_run, losses
from running import ROOT, on_a_terminal, run_script, wait_for_steps

from runtime.engines import lightning_engine

pytest.importorskip("lightning", reason="PyTorch Lightning is not installed: pip install lightning")

SFT, SCRIPT = "trainer/train_full_sft.py", "trainer/engines/train_sft_lightning.py"


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_two_processes_give_the_curve_of_one(engine_flags, one_process, tmp_path, strategy):
    """Two micro-batches in a step, one exchange of gradients; of FSDP2 one for each block."""
    trackers = ["--report_to", "tensorboard", "wandb"] if strategy == "ddp" else []
    job = ["--ddp", *engine_flags, f"--strategy={strategy}", f"--out_dir={tmp_path}", *trackers]
    done = run_script("tests/count_exchanges.py", ROOT / SCRIPT, *job, nproc=2)
    assert done.returncode == 0, done.stderr
    assert f" on 2 x cpu, {strategy}, float32, " in done.stdout
    steps, each = max(losses(tmp_path / NAME)), 1 if strategy == "ddp" else 3
    assert done.stdout.count(f"exchanged {steps * each} times") == 2, done.stdout
    check_same_run(tmp_path / NAME, one_process)
    if trackers:
        assert list((tmp_path / NAME).glob("tensorboard/events.out.tfevents.*"))
        assert list((tmp_path / NAME).glob("wandb/offline-run-*"))


def test_signal_saves_and_another_number_of_processes_goes_on(
    engine_flags, one_process, tmp_path, start_script
):
    job = [*engine_flags, f"--out_dir={tmp_path}", "--save_interval=0", "--resume=auto"]
    process = start_script(SCRIPT, *job)
    wait_for_steps(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.log.read_text()
    step = max(losses(tmp_path / NAME))
    assert [folder.name for folder in (tmp_path / NAME / "checkpoints").iterdir()] == [
        f"step_{step:08d}"
    ]
    done = run_script(SCRIPT, "--ddp", *job, nproc=2)
    assert done.returncode == 0 and f"behind step {step}" in done.stdout, done.stderr
    check_same_run(tmp_path / NAME, one_process)


@pytest.mark.parametrize("nproc, strategy", [(None, "auto"), (2, "model_parallel")])
def test_resume_is_bit_identical_and_passes_over_a_torn_checkpoint(
    engine_flags, tmp_path, nproc, strategy
):
    job = [
        *engine_flags,
        "--dropout=0.1",
        "--save_interval=4",
        "--max_steps=8",
        f"--strategy={strategy}",
    ]
    job += ["--ddp"] if nproc else []
    assert run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'whole'}", nproc=nproc).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    torn = tmp_path / "torn" / NAME / "checkpoints/step_00000008/engine"
    torn = next(torn.glob("*.distcp")) if nproc else torn
    torn.write_bytes(torn.read_bytes()[:-100])
    done = run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'torn'}", "--resume=auto", nproc=nproc)
    assert (
        done.returncode == 0
        and "behind step 4" in done.stdout
        and "step_00000008 is damaged" in done.stderr
    )
    assert losses(tmp_path / "torn" / NAME) == losses(tmp_path / "whole" / NAME)
    ours, whole = (
        torch.load(tmp_path / name / f"{NAME}.pth", weights_only=True) for name in ("torn", "whole")
    )
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_run_on_a_terminal_and_a_finished_one_that_is_given_more_steps(engine_flags, tmp_path):
    job = [*engine_flags, f"--out_dir={tmp_path}", "--resume=auto"]
    code, shown = on_a_terminal(SCRIPT, *job, "--max_steps=3")
    assert code == 0, shown
    assert (
        "Epoch 0: 100%" in shown and "3/3" in shown and "loss=" in shown
    )  # Lightning's progress bar
    done = run_script(SCRIPT, *job, "--max_steps=3")
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    done = run_script(SCRIPT, *job, "--max_steps=5")
    assert done.returncode == 2 and "--max_steps was 3 and is 5" in done.stderr, done.stderr
    done = run_script(SCRIPT, *job, "--max_steps=5", "--resume_with_changes")
    assert (
        done.returncode == 0 and "from step_00000003 on --max_steps was 3 and is 5" in done.stdout
    ), done.stderr
    assert list(losses(tmp_path / NAME)) == [1, 2, 3, 4, 5]


def test_float16_is_scaled_as_without_lightning(engine_flags, tmp_path):
    """Lightning would turn it into bfloat16 on a CPU."""
    job = [*engine_flags, "--dtype=float16", "--max_steps=4"]
    for script in (SFT, SCRIPT):
        assert run_script(script, *job, f"--out_dir={tmp_path / script}").returncode == 0
    assert losses(tmp_path / SCRIPT / NAME) == losses(tmp_path / SFT / NAME)


def test_refused_before_anything_starts(monkeypatch):
    with pytest.raises(
        ValueError, match="--strategy model_parallel shares over processes: add --ddp"
    ):
        lightning_engine.check_launch(SimpleNamespace(ddp=False, strategy="model_parallel"))
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ValueError, match="not installed; pip install lightning"):
        lightning_engine.check_launch(SimpleNamespace(ddp=True, strategy="auto"))
