"""Accelerate as the engine: the curve of one process, resume, trackers, no silent fall-backs."""

import json
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ENGINE_RUN as NAME
from conftest import check_same_run, losses
from running import ROOT, launched_as, run_script, wait_for_steps

from runtime.engines import accelerated

accelerate = pytest.importorskip(
    "accelerate", reason="Accelerate is not installed: pip install accelerate"
)
from accelerate.commands import launch as launcher  # noqa: E402

SFT, SCRIPT = "trainer/train_full_sft.py", "trainer/engines/train_sft_accelerate.py"


def error_of(done) -> str:
    """The one line of a refusal; what accelerate's launcher adds behind it is not ours."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and "step 1/" not in done.stdout
    return line


def test_two_processes_give_the_curve_of_one(engine_flags, one_process, tmp_path):
    """With two micro-batches in a step, and one exchange of gradients."""
    job = ["--ddp", *engine_flags, f"--out_dir={tmp_path}", "--report_to", "tensorboard", "wandb"]
    done = run_script(
        "tests/count_exchanges.py", ROOT / SCRIPT, *job, nproc=2, env={"ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"exchanged {max(losses(tmp_path / NAME))} times") == 2, done.stdout
    assert " on 2 x cpu, ddp, float32, " in done.stdout
    check_same_run(tmp_path / NAME, one_process)
    assert list((tmp_path / NAME).glob("tensorboard/minimind/events.out.tfevents.*"))
    assert list((tmp_path / NAME).glob("wandb/offline-run-*"))
    assert json.loads((tmp_path / NAME / "args.json").read_text())["report_to"] == [
        "tensorboard",
        "wandb",
    ]


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
    refused = run_script(SFT, *job)
    assert "the engine was Accelerate, ddp and is None" in error_of(refused)


def test_resume_is_bit_identical_and_passes_over_a_torn_checkpoint(engine_flags, tmp_path):
    job = [*engine_flags, "--dropout=0.1", "--save_interval=4", "--max_steps=8"]
    assert run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'whole'}").returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    torn = tmp_path / "torn" / NAME / "checkpoints/step_00000008/engine/optimizer.bin"
    torn.write_bytes(torn.read_bytes()[:-100])
    done = run_script(SCRIPT, *job, f"--out_dir={tmp_path / 'torn'}", "--resume=auto")
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


def test_deepspeed_by_its_configuration(engine_flags, one_process, tmp_path):
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install deepspeed"
    )
    config = [
        "--config_file",
        ROOT / "configs/accelerate/deepspeed_zero2.yaml",
        "--num_processes",
        2,
    ]
    job = [ROOT / SCRIPT, "--ddp", *engine_flags, f"--out_dir={tmp_path}"]
    done = run_script(launcher.__file__, *config, "--main_process_port", 0, *job)
    assert done.returncode == 0 and " on 2 x cpu, deepspeed, " in done.stdout, done.stderr
    check_same_run(tmp_path / NAME, one_process)


# --------------------------------------------------------------------------------------------------
# What accelerate would do in silence
# --------------------------------------------------------------------------------------------------


def test_several_processes_that_became_one(engine_flags, tmp_path):
    options = [
        "--cpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = run_script(
        launcher.__file__, *options, ROOT / SCRIPT, *engine_flags, f"--out_dir={tmp_path}"
    )
    assert "accelerate launch was asked for several processes and started one" in error_of(done)


def test_fsdp_that_would_become_ddp(engine_flags, tmp_path):
    config = [
        "--config_file",
        ROOT / "configs/accelerate/fsdp2.yaml",
        "--num_processes",
        2,
        "--main_process_port",
        0,
    ]
    done = run_script(
        launcher.__file__, *config, ROOT / SCRIPT, "--ddp", *engine_flags, f"--out_dir={tmp_path}"
    )
    assert (
        "configuration asks for FSDP2, on a CPU accelerate would make it DDP; without a GPU take"
        in error_of(done)
    )


REFUSED = {
    "another strategy": (
        {},
        {"strategy": "fsdp2"},
        "--strategy fsdp2, but accelerate was started for ddp",
    ),
    "FSDP without --ddp": (
        {"ACCELERATE_USE_FSDP": "true"},
        {"ddp": False},
        "asks for fsdp2, which shares .* add --ddp",
    ),
    "FSDP 1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "write fsdp_version: 2"),
    "Megatron": (
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        {},
        "this script has DDP, FSDP2 and DeepSpeed",
    ),
    "compile": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "take --compile 1"),
    "accumulation": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {},
        "--accumulation_steps says it",
    ),
    "precision": (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"dtype": "float16"},
        "launch says --mixed_precision bf16",
    ),
    "fp8": (
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {},
        "accelerate launch says --mixed_precision fp8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(monkeypatch, case):
    variables, given, said = REFUSED[case]
    for name, value in (launched_as(0, 1) | variables).items():
        monkeypatch.setenv(name, value)
    args = {"ddp": True, "device": "cpu", "dtype": None, "strategy": "auto"} | given
    with pytest.raises(ValueError, match=said):
        accelerated.check_launch(SimpleNamespace(**args))


@pytest.mark.parametrize("package", ["accelerate", "deepspeed"])
def test_what_is_not_installed(monkeypatch, package):
    for name, value in (launched_as(0, 1) | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"not installed; pip install {package}"):
        accelerated.check_launch(
            SimpleNamespace(ddp=True, device="cpu", dtype=None, strategy="auto")
        )


def test_launchers_precision_is_obeyed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    args = SimpleNamespace(ddp=False, device="auto", dtype=None, strategy="auto")
    accelerated.check_launch(args)
    assert (args.device, args.dtype) == ("cpu", "bfloat16")


def test_deepspeed_configuration_that_contradicts_the_flags():
    args = SimpleNamespace(batch_size=4, grad_clip=1.0)
    config = {"gradient_clipping": 0.5, "train_batch_size": "auto"}
    with pytest.raises(
        ValueError, match="DeepSpeed configuration has gradient_clipping 0.5, the flags say 1.0"
    ):
        accelerated.fill_deepspeed(config, args)
