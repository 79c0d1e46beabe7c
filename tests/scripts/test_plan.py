"""scripts/plan.py and the model of a step behind it: arithmetic that can be checked by hand,
tables, mistakes."""

import math
import re
from types import SimpleNamespace

import pytest
from conftest import chat, write_jsonl

from model.lm import LMConfig
from runtime.distributed import memory, scaling
from scripts import plan

CONFIG = LMConfig(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, max_seq_len=512)
LOAD = scaling.Load(row_tokens=512, longest=512, document=512, supervised=1.0, rows=1000)
FLAGS = {"tensor_parallel": 1, "context_parallel": 1, "global_batch_size": None, "batch_size": 4}
FLAGS |= {
    "accumulation_steps": 1,
    "dtype": "float32",
    "optimizer": "adamw",
    "gradient_checkpointing": 0,
}
FLAGS |= {"offload": 0, "strategy": "auto", "bucket_cap_mb": 5}
PSI = memory.parameter_count(CONFIG)


def machine(**changed) -> scaling.Machine:
    figures = {
        "memory": 1e12,
        "per_node": 8,
        "inside": 1e9,
        "between": 1e8,
        "latency": 0.0,
        "tokens_per_sec": 1e4,
    }
    return scaling.Machine(**figures | changed)


def cost(devices: int, on: scaling.Machine | None = None, **flags) -> dict:
    return scaling.step_cost(
        CONFIG, on or machine(), LOAD, SimpleNamespace(**FLAGS | flags), devices
    )


@pytest.mark.parametrize("strategy, psi", [("ddp", 2), ("zero1", 3), ("zero2", 2), ("zero3", 3)])
def test_volume_of_a_step_is_that_of_the_papers(strategy, psi):
    for devices in (2, 8, 1024):
        sent = cost(devices, strategy=strategy)["sent"]
        assert sent == pytest.approx(psi * 4 * PSI * (devices - 1) / devices)
    assert cost(1, strategy=strategy)["sent"] == 0


def test_accumulation_sends_gradients_once_and_weights_every_time():
    sent = {
        s: cost(2, strategy=s, accumulation_steps=4)["sent"] / (4 * PSI / 2)
        for s in memory.STRATEGIES
    }
    assert sent == pytest.approx({"ddp": 2, "zero1": 3, "zero2": 5, "zero3": 9})


def test_time_is_compute_and_what_does_not_hide_behind_it():
    alone = cost(1)
    assert alone["compute"] == 4 * 512 / 1e4 and alone["waiting"] == 0 and alone["efficiency"] == 1
    inside, across = cost(8), cost(16)
    assert (inside["nodes"], across["nodes"]) == (1, 2)
    assert across["waiting"] == pytest.approx(8 * PSI * 15 / 16 / 1e8 - alone["compute"] * 2 / 3)
    assert inside["efficiency"] > across["efficiency"]
    unhidden = cost(16, machine(overlap=0.0))
    assert unhidden["waiting"] == pytest.approx(8 * PSI * 15 / 16 / 1e8)
    assert unhidden["tokens_per_sec"] == pytest.approx(
        16 * 4 * 512 / (unhidden["compute"] + unhidden["waiting"])
    )


def test_a_fixed_global_batch_is_divided():
    row = cost(8, global_batch_size=48)
    assert (row["rows"], row["micro"]) == (48, 2)  # 6 rows each, as 4 and 2
    few = cost(64, global_batch_size=48)  # a quarter of the ranks has no row, the others one
    assert few["efficiency"] <= 48 / 64 and few["memory"] < row["memory"]


def test_ranks_that_share_layers_and_rows():
    row = cost(8, tensor_parallel=2, context_parallel=2)
    assert row["rows"] == 2 * 4 and row["compute"] == pytest.approx(cost(1)["compute"] / 4)
    assert row["sent"] > 0 and "zero1" not in row["needs"]


def test_operations_of_a_token():
    """By hand, for a model whose attention reads one token and whose head does nothing: 6 per
    weight of the blocks."""
    shapes = memory.parameter_shapes(CONFIG)
    weights = sum(
        shape.numel() for name, shape in shapes.items() if ".layers." in name and len(shape) > 1
    )
    load = scaling.Load(512, 512, document=0, supervised=0, rows=None)
    assert scaling.flops_per_token(CONFIG, load, False) == 6 * weights
    assert scaling.flops_per_token(CONFIG, load, True) == 8 * weights
    moe = LMConfig(dim=256, n_layers=4, use_moe=True, n_experts=8, n_experts_per_tok=2)
    more = LMConfig(dim=256, n_layers=4, use_moe=True, n_experts=16, n_experts_per_tok=2)
    router = 6 * 4 * 8 * 256  # the only thing that grows
    assert (
        scaling.flops_per_token(more, load, False) - scaling.flops_per_token(moe, load, False)
        == router
    )


def test_strategy_follows_the_memory():
    fits = {s: cost(8, strategy=s)["memory"] for s in memory.STRATEGIES}
    for strategy, size in fits.items():
        assert cost(8, machine(memory=math.ceil(size / memory.SAFE_SHARE)))["strategy"] == strategy
    assert cost(1)["strategy"] == "-"


@pytest.fixture
def flags(tmp_path, tiny_flags) -> list:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("a b c", "d e f")] * 10)
    return [
        *tiny_flags,
        "--data_path",
        data,
        "--cache_dir",
        tmp_path / "cache",
        "--packing",
        0,
        "--batch_size",
        2,
    ]


def test_the_plan_of_a_run(flags, run_script):
    result = run_script("scripts/plan.py", *flags, "--devices", 4, "--epochs", 2, "--markdown")
    assert result.returncode == 0, result.stderr
    assert (
        "8 rows, about " in result.stdout
        and "2 rows x 1 micro-batch x 4 data ranks" in result.stdout
    )
    assert "an epoch: 10 rows, " in result.stdout and "2 steps; all: 4 steps" in result.stdout
    lines = [
        line.strip("| ").split() for line in result.stdout.splitlines() if line.startswith("|")
    ]
    devices = [line[0] for line in lines if line[0].replace(",", "").isdigit()]
    assert devices == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024"]
    assert [line[0] for line in lines if line[0] in memory.STRATEGIES] == list(memory.STRATEGIES)
    assert "MFU 0.4" in result.stdout.split("Assumptions")[1]


def test_measured_under_torchrun(flags, run_script):
    result = run_script("scripts/plan.py", *flags, "--measure", "--devices", 2, nproc=2)
    assert result.returncode == 0, result.stderr
    assert (
        "measured with 2 processes" in result.stdout
        and "GB/s, measured between 2 processes" in result.stdout
    )
    assert result.stdout.count("Scaling") == 1, "one process prints"


MISTAKES = [
    (("--devices", 6, "--nodes", 4), "--devices 6 is not a multiple of --nodes 4"),
    (
        ("--devices", 8, "--tensor_parallel", 3),
        "--devices 8 is not a multiple of --tensor_parallel x",
    ),
    (("--tensor_parallel", 8), "--tensor_parallel 8 does not divide n_heads 4"),
    (("--mfu", 1.5), "--mfu 1.5: must be at most 1"),
    (("--link_gbps", "inf"), "--link_gbps inf: must be a finite number"),
    (("--device_memory_gb", 0), "--device_memory_gb 0.0: must be positive"),
    (("--gpu", "h1000"), "invalid choice: 'h1000'"),
    (("--strategy", "dp"), "--strategy dp: plan ddp"),
    (("--seq_len", 4), "unrecognized arguments: --seq_len 4"),
]


@pytest.mark.parametrize("extra, message", MISTAKES)
def test_mistakes_are_named(extra, message, flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", *map(str, [*flags, *extra])])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.main()


def test_a_mistake_ends_in_one_line(flags, run_script):
    result = run_script("scripts/plan.py", *flags, "--data_path", "nowhere.jsonl")
    assert (result.returncode, result.stderr) == (2, "error: nowhere.jsonl: no such data file\n")
