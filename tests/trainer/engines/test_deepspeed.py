"""DeepSpeed trains as the other engines do; what its JSON says is obeyed or refused by name."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import chat, write_jsonl
from running import ROOT, free_port, run_script

pytest.importorskip("deepspeed", reason="needs: DS_BUILD_OPS=0 pip install deepspeed")

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from model.lm import LMConfig
from runtime.engines import deepspeed_config as settings
from runtime.engines.deepspeed_engine import TAG

SCRIPT = "trainer/engines/train_sft_deepspeed.py"
FILES = sorted(path.name for path in (ROOT / "configs/deepspeed").glob("*.json"))
# As tutorials have it, written for one process; its float16 is switched off where there is no GPU.
TUTORIAL = {
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 4},
    },
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "wall_clock_breakdown": False,
}


# --------------------------------------------------------------------------------------------------
# The JSON
# --------------------------------------------------------------------------------------------------


def flags(config: dict, **given) -> argparse.Namespace:
    """The flags as the script has them, with the file's numbers below those that are given."""
    values = {
        "batch_size": 8,
        "accumulation_steps": 1,
        "global_batch_size": None,
        "grad_clip": 1.0,
        "dtype": None,
    }
    values |= {
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "warmup_ratio": 0.1,
        "total_steps": 50,
        "dim": 32,
    }
    values |= {"deepspeed_config": "x.json", "device": torch.device("cpu"), "bucket_cap_mb": 25}
    return argparse.Namespace(**(values | settings.flag_defaults(config) | given))


def refusal(config: dict, world_size: int = 2, **given) -> str:
    with pytest.raises(ValueError, match=r"^--deepspeed_config x\.json: .+$") as raised:
        settings.check(config, flags(config, **given), world_size)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", FILES)
def test_our_files_fit_any_flags(name, tmp_path):
    config = settings.read(name)
    args = flags(config, batch_size=3, global_batch_size=31)
    settings.check(config, args, 4)
    filled = settings.fill(config, args, LMConfig(dim=32, n_heads=4), 4, tmp_path / "run")
    assert '"auto"' not in json.dumps(filled)
    assert [filled[key] for key in settings.BATCH] == [36, 3, 3] and not filled["bf16"]["enabled"]


def test_every_stage_has_its_file():
    stages = {name: settings.read(name)["zero_optimization"]["stage"] for name in FILES}
    assert stages == {f"zero{stage}.json": stage for stage in range(4)} | {
        "zero2_with_profiling.json": 2,
        "zero3_nvme.json": 3,
        "zero3_offload.json": 3,
    }


def test_numbers_of_the_file_are_defaults_of_the_flags():
    found = settings.flag_defaults(TUTORIAL)
    assert found == {
        "batch_size": 4,
        "accumulation_steps": 8,
        "grad_clip": 1.0,
        "learning_rate": 3e-5,
        "weight_decay": 3e-7,
        "dtype": "float16",
    }
    assert settings.flag_defaults(settings.read("zero2.json")) == {}
    assert settings.flag_defaults({"bf16": {"enabled": False}}) == {"dtype": "float32"}


def test_flags_win_over_optimizer_and_scheduler(tmp_path, capsys):
    config = TUTORIAL | {"fp16": {"enabled": "auto"}}
    assert settings.without_schedule(config, ["--epochs", "2"]) is config
    without = settings.without_schedule(config, ["--learning_rate=1e-3"])
    assert "scheduler" not in without and "--learning_rate is given" in capsys.readouterr().out
    args = flags(without, learning_rate=1e-3)
    params = settings.fill(without, args, LMConfig(dim=32, n_heads=4), 1, tmp_path)["optimizer"][
        "params"
    ]
    assert (params["lr"], params["weight_decay"], params["betas"]) == (1e-3, 3e-7, [0.8, 0.999])


def test_batch_sizes_that_contradict_show_the_arithmetic():
    config = TUTORIAL | {"fp16": {"enabled": "auto"}}
    settings.check(config, flags(config), 1)
    said = refusal(config, 4)
    assert "train_batch_size 32 is not micro-batch 4 x accumulation 8 x 4 processes = 128" in said
    assert "train_batch_size 32 is not --global_batch_size = 60" in refusal(
        config, 2, global_batch_size=60
    )
    assert "train_micro_batch_size_per_gpu 4 contradicts --batch_size 2" in refusal(
        config, batch_size=2
    )
    said = refusal(config, accumulation_steps=3)
    assert "gradient_accumulation_steps 8 contradicts --accumulation_steps 3" in said
    assert "gradient_clipping 1.0 contradicts --grad_clip 0.5" in refusal(config, 1, grad_clip=0.5)


def test_precision():
    assert "fp16 is enabled, which DeepSpeed cannot do on a CPU" in refusal(TUTORIAL, 1)
    assert "cannot do it on a CPU" in refusal({"zero_optimization": {"stage": 2}}, dtype="float16")
    bf16 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    assert "bf16 is enabled, which contradicts --dtype float32" in refusal(bf16, dtype="float32")
    off = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}
    assert "bf16 is disabled, which contradicts --dtype bfloat16" in refusal(off, dtype="bfloat16")
    assert "stage 0 is for float32" in refusal({}, dtype="bfloat16")
    settings.check(bf16, flags(bf16), 2)


def zero(**section) -> dict:
    return {"zero_optimization": {"stage": 3, **section}}


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"train_batchsize": 8},
            "'train_batchsize' is unknown, or has no effect here; the nearest key that has is",
        ),
        (
            {"activation_checkpointing": {}},
            "'activation_checkpointing' is unknown, or has no effect here",
        ),
        (
            {"gradient_allreduce_op": "sum"},
            "'gradient_allreduce_op' is unknown, or has no effect here",
        ),
        ({"zero_optimization": True}, "zero_optimization must be an object, found true"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown must be a switch, found 1"),
        ({"steps_per_print": "auto"}, 'steps_per_print must be a number, found "auto"'),
        ({"aio": {"block": 1}}, "'block' is unknown in aio, which has block_size"),
        (zero(stage=4), "stage of zero_optimization must be 0, 1, 2 or 3, found 4"),
        (zero(stage="2"), 'stage of zero_optimization must be 0, 1, 2 or 3, found "2"'),
        (zero(reduce_bucket=5), "zero_optimization.reduce_bucket: unknown, found 5"),
        (
            zero(overlap_comm="maybe"),
            "zero_optimization.overlap_comm: Input should be a valid boolean",
        ),
        (
            zero(cpu_offload=True),
            'cpu_offload of zero_optimization is not obeyed: write "offload_optimizer"',
        ),
        (
            zero(offload_param={"pin_memory": True}),
            'offload_param needs a "device": "cpu", "nvme" or "none"',
        ),
        (zero(offload_optimizer={"device": "disk"}), 'offload_optimizer needs a "device"'),
        (
            zero(stage=2, offload_param={"device": "cpu"}),
            "offload_param to cpu needs stage 3 or higher, it is 2",
        ),
        (
            zero(stage=0, offload_optimizer={"device": "cpu"}),
            "offload_optimizer to cpu needs stage 1 or higher",
        ),
        (zero(offload_optimizer={"device": "nvme"}), 'offload_optimizer to nvme needs "nvme_path"'),
        (
            zero(offload_param={"device": "nvme", "nvme_path": "/proc/x"}),
            "nvme_path /proc/x of offload_param: ",
        ),
        ({"optimizer": {"params": {}}}, 'optimizer needs a "type"'),
        ({"optimizer": {"type": "Lion"}}, "optimizer Lion: Adam and AdamW can be had"),
        (
            {"optimizer": {"type": "AdamW", "params": {"beta": 1}}},
            "'beta' is unknown in params of optimizer",
        ),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler OneCycle: WarmupLR, "),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup": 3}}},
            "'warmup' is unknown in params of scheduler",
        ),
    ],
)
def test_mistakes(config, said):
    assert said in refusal(config)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "broken JSON: "),
        ('{"bf16": {}, "bf16": {}}', "broken JSON: 'bf16' stands there twice"),
        ("[]", "must be a JSON object"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, said):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"^--deepspeed_config {path}: ") as raised:
        settings.read(str(path))
    assert said in str(raised.value)


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with rows of unequal length; all runs here share it."""
    folder = tmp_path_factory.mktemp("deepspeed")
    words = "the small tree sings over a large blue house".split()
    rows = [
        chat(" ".join(words[: 1 + n % 9]), " ".join(words[n % 5 :] * (1 + n % 3)))
        for n in range(44)
    ]
    write_jsonl(folder / "data.jsonl", rows)
    return folder


def train(work, name: str, *given, script=SCRIPT, nproc=2, code=0, **options):
    """SFT on the data of `work`: 3 epochs of 2 steps, the second with half the micro-batches."""
    options_of_model = (
        "--dim 48 --n_layers 2 --n_heads 4 --n_kv_heads 2 --device cpu --from_weight none"
    )
    fixed = (
        f"{options_of_model} --max_seq_len 128 --global_batch_size 8 --batch_size 2 --epochs 3"
        " --learning_rate 1e-2"
    )
    files = (
        f"--data_path {work}/data.jsonl --cache_dir {work}/cache --out_dir {work} --log_interval 1"
    )
    words = [
        *fixed.split(),
        *files.split(),
        "--save_weight",
        name,
        *map(str, given),
        *(["--ddp"] if nproc else []),
    ]
    done = run_script(script, *words, nproc=nproc, timeout=400, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics(work, name: str) -> list[dict]:
    return [
        json.loads(line) for line in (work / f"{name}_48/metrics.jsonl").read_text().splitlines()
    ]


def weights(work, name: str) -> dict:
    return torch.load(work / f"{name}_48.pth", weights_only=True)


def distance(work, name: str, other: str) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the weights (norm per tensor)."""
    lines, others = metrics(work, name), metrics(work, other)
    assert [line["step"] for line in lines] == [line["step"] for line in others] != []
    mine, theirs = weights(work, name), weights(work, other)
    assert {key: value.shape for key, value in mine.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines, others, strict=True))
    return loss, max(
        ((mine[key] - theirs[key]).norm() / theirs[key].norm()).item() for key in theirs
    )


@pytest.fixture(scope="module")
def reference(work):
    """The same job in one process, without DeepSpeed."""
    train(work, "reference", script="trainer/train_full_sft.py", nproc=None)
    return "reference"


@pytest.fixture(scope="module")
def zero3(work):
    """Stage 3 on two processes, saved at every second step."""
    train(
        work,
        "zero3",
        "--deepspeed_config",
        "zero3.json",
        "--save_interval",
        2,
        "--save_total_limit",
        9,
    )
    return "zero3"


@pytest.mark.parametrize("stage", [0, 2])
def test_same_curve(work, reference, stage):
    processes = 2 if stage else 1
    train(
        work, f"zero{stage}", "--deepspeed_config", f"zero{stage}.json", nproc=2 if stage else None
    )
    loss, weight = distance(work, f"zero{stage}", reference)
    assert loss < 1e-5 and weight < 1e-4
    assert (
        f"on {processes} x cpu, DeepSpeed ZeRO {stage}"
        in (work / f"zero{stage}_48/training.log").read_text()
    )


def test_same_curve_sharded(work, reference, zero3):
    loss, weight = distance(work, zero3, reference)
    assert loss < 1e-5 and weight < 1e-4
    half = torch.load(
        work / f"{zero3}_48/pytorch_model.bin", weights_only=True
    )  # the file asks for it
    assert half.keys() == weights(work, zero3).keys()


def test_same_curve_offloaded(work, reference):
    """With torch's AdamW: DeepSpeed's own for the CPU takes minutes to build."""
    config = settings.read("zero3_offload.json") | {"zero_force_ds_cpu_optimizer": False}
    (work / "offload.json").write_text(json.dumps(config))
    train(work, "offload", "--deepspeed_config", work / "offload.json")
    loss, weight = distance(work, "offload", reference)
    assert loss < 1e-5 and weight < 1e-4


def test_same_curve_on_nvme(work, reference):
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from torch.utils.cpp_extension import get_default_build_root

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio: apt install libaio-dev")
    root = Path(get_default_build_root())
    if not all([*root.rglob(f"{builder.NAME}.so")] for builder in (AsyncIOBuilder, CPUAdamBuilder)):
        pytest.skip(
            "DeepSpeed's async_io and cpu_adam are not built here; a run with zero3_nvme.json does"
            " it once"
        )
    given = ("--deepspeed_config", "zero3_nvme.json", "--save_interval", 2)
    train(work, "nvme", *given, nproc=None)
    loss, weight = distance(work, "nvme", reference)
    assert loss < 1e-4 and weight < 1e-4 and not list(work.glob("*.nvme"))
    assert list(
        work.glob("nvme_48/checkpoints/step_00000004/*/offloaded_tensors/rank00/exp_avg-*")
    ), "never on the disk"
    shutil.copytree(work / "nvme_48", work / "nvme_again_48")
    shutil.rmtree(work / "nvme_again_48/checkpoints/step_00000006")
    train(work, "nvme_again", *given, "--resume", "auto", nproc=None)
    assert distance(work, "nvme_again", "nvme") == (0.0, 0.0)


def test_a_resumed_run_is_the_same_run(work, zero3):
    """From the newest whole checkpoint: a torn one is passed over."""
    shutil.copytree(work / "zero3_48", work / "again_48")
    file = next(
        (work / f"again_48/checkpoints/step_00000006/{TAG}").glob("*rank_1*optim_states.pt")
    )
    file.write_bytes(file.read_bytes()[:-10])
    done = train(work, "again", "--deepspeed_config", "zero3.json", "--resume", "auto")
    assert (
        "step_00000006 is damaged and passed over" in done.stderr and "behind step 4" in done.stdout
    )
    assert distance(work, "again", zero3) == (0.0, 0.0)


def test_the_weights_are_those_of_the_checkpoint(work, zero3):
    """zero_to_fp32.py, which lies in every checkpoint, agrees with the weights file."""
    checkpoint = work / f"{zero3}_48/checkpoints/step_00000006"
    assert (checkpoint / "zero_to_fp32.py").exists()
    whole, saved = (
        get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), TAG),
        weights(work, zero3),
    )
    assert (
        all(torch.equal(value, saved[name]) for name, value in whole.items())
        and len(whole) >= len(saved) - 1
    )


def test_another_number_of_processes_is_refused(work, zero3):
    where = work / f"{zero3}_48/checkpoints"
    done = train(
        work, "fewer", "--deepspeed_config", "zero3.json", "--resume", where, nproc=None, code=2
    )
    assert "processes was 2 and is 1" in done.stderr and "Traceback" not in done.stderr


def test_the_deepspeed_launcher_and_a_tutorials_file(work):
    """Optimizer and scheduler of the file, the profiler, and the flag that this launcher adds."""
    config = TUTORIAL | {
        "fp16": {"enabled": False},
        "gradient_accumulation_steps": 2,
        "train_batch_size": 16,
    }
    config |= {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True, "profile_step": 1}}
    (work / "tutorial.json").write_text(json.dumps(config))
    launcher = [
        Path(sys.executable).with_name("deepspeed"),
        "--num_gpus=2",
        f"--master_port={free_port()}",
    ]
    words = (
        "--dim 48 --n_layers 1 --n_heads 4 --n_kv_heads 2 --device cpu --from_weight none --packing"
        " 0 --max_steps 3"
    )
    words += (
        f" --data_path {work}/data.jsonl --cache_dir {work}/cache --out_dir {work} --save_weight"
        " tutorial"
    )
    words += f" --log_interval 1 --deepspeed_config {work}/tutorial.json"
    done = run_script(*launcher, ROOT / SCRIPT, *words.split(), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rates = [line["lr"] for line in metrics(work, "tutorial")]
    assert rates[0] == 0 and 0 < rates[-1] < 3e-5, "WarmupLR of the file"
    assert "Flops Profiler" in done.stdout and "optimizer_step" in done.stdout + done.stderr


def test_wrong_arithmetic_ends_at_once(work):
    (work / "wrong.json").write_text(
        json.dumps({"train_batch_size": 32, "zero_optimization": {"stage": 2}})
    )
    done = train(work, "wrong", "--deepspeed_config", work / "wrong.json", nproc=None, code=2)
    assert (
        done.stderr.count("\n") == 1
        and "train_batch_size 32 is not --global_batch_size = 8" in done.stderr
    )
    assert not (work / "wrong_48").exists()


def test_a_loss_that_is_not_finite_changes_nothing(work):
    given = ("--learning_rate", "1e30", "--deepspeed_config", "zero2.json", "--dtype", "bfloat16")
    done = train(work, "wild", *given, nproc=None)
    assert "skipped: loss" in done.stdout
    assert all(value.isfinite().all() for value in weights(work, "wild").values())
