"""The memory estimate: parameters exactly, activations against what autograd saves, ZeRO's
divisions, the choice."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from running import ROOT, launched_as

from model.lm import LMConfig, MiniMindLM
from model.lora import add_lora
from runtime.distributed import memory
from runtime.machine import block_weights

TINY = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "max_seq_len": 256,
}
MODELS = {
    "dense": {},
    "untied": {"tie_embeddings": False},
    "dropout": {"dropout": 0.1},
    "moe": {"use_moe": True},
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "shared experts": {"use_moe": True, "n_experts": 8, "n_shared_experts": 1},
}
LARGE = LMConfig(dim=1024, n_layers=8, n_heads=16, n_kv_heads=4, max_seq_len=2048)
RUN = {"tokens": 4096, "supervised": 1024}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_exact_and_disturbs_no_generator(name):
    config = LMConfig(**TINY | MODELS[name])
    before = torch.get_rng_state()
    count = memory.parameter_count(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert count == sum(p.numel() for p in MiniMindLM(config).parameters())


def test_activations_grow_with_what_they_depend_on():
    config = LMConfig(**TINY)
    base = memory.activations(config, 256, 64, 4)
    assert memory.activations(config, 512, 128, 4) == pytest.approx(2 * base)
    assert memory.activations(config, 256, 256, 4) > base
    assert memory.activations(config, 256, 64, 2) < base
    levels = [
        memory.activations(config, 256, 64, 4, gradient_checkpointing=level) for level in (0, 2, 1)
    ]
    assert levels == sorted(levels, reverse=True) and levels[0] == base
    assert base / 2 < memory.activations(config, 256, 64, 4, tensor_parallel=2) < base
    assert base / 2 <= memory.activations(config, 256, 64, 4, context_parallel=2) < base


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_zero_divides_what_it_says(ranks):
    n = memory.parameter_count(LARGE)
    parts = {s: memory.estimate(LARGE, s, data_ranks=ranks, **RUN) for s in memory.STRATEGIES}
    for strategy, sharded in (
        ("ddp", ()),
        ("zero1", ("optimizer",)),
        ("zero2", "pgo"),
        ("zero3", "pgo"),
    ):
        for part, size in (("parameters", 4), ("gradients", 4), ("optimizer", 8)):
            divisor = ranks if part in sharded or part[0] in sharded else 1
            assert parts[strategy][part] == pytest.approx(size * n / divisor, rel=0.1), (
                strategy,
                part,
            )
    for need in parts.values():
        assert need["total"] == sum(need[part] for part in need if part not in ("total", "host"))
        assert need["host"] == 0
    assert parts["zero3"]["buffers"] < parts["zero2"]["buffers"]


def test_ranks_that_share_rows_share_the_optimizer_too():
    alone = memory.estimate(LARGE, "zero2", data_ranks=8, **RUN)
    shared = memory.estimate(LARGE, "zero2", data_ranks=4, context_parallel=2, **RUN)
    assert (
        shared["optimizer"] == alone["optimizer"] and shared["activations"] < alone["activations"]
    )


def test_tensor_parallelism_divides_the_matrices():
    whole = memory.estimate(LARGE, "zero3", data_ranks=1, **RUN)
    halved = memory.estimate(LARGE, "zero3", data_ranks=1, tensor_parallel=2, **RUN)
    for part in ("parameters", "gradients", "optimizer"):
        assert halved[part] == pytest.approx(whole[part] / 2, rel=0.01)


def test_muon_accumulation_and_offload():
    n = memory.parameter_count(LARGE)
    vectors_and_ends = sum(  # what AdamW keeps two numbers for
        shape.numel()
        for name, shape in memory.parameter_shapes(LARGE).items()
        if len(shape) == 1 or "embed" in name
    )
    muon = memory.estimate(LARGE, "ddp", data_ranks=2, optimizer="muon", **RUN)
    assert muon["optimizer"] == 4 * n + 4 * vectors_and_ends
    assert (
        memory.estimate(LARGE, "ddp", data_ranks=2, optimizer="lamb", **RUN)["optimizer"] == 8 * n
    )

    moe = replace(LARGE, use_moe=True)
    rest = sum(  # the router is AdamW's, too; stacked experts are matrices
        shape.numel()
        for name, shape in memory.parameter_shapes(moe).items()
        if len(shape) == 1 or "embed" in name or "mlp.gate.weight" in name
    )
    muon = memory.estimate(moe, "ddp", data_ranks=2, optimizer="muon", **RUN)
    assert muon["optimizer"] == 4 * memory.parameter_count(moe) + 4 * rest

    accumulated = memory.estimate(LARGE, "zero3", data_ranks=4, accumulation_steps=2, **RUN)
    assert accumulated["gradients"] == 4 * n

    offloaded = memory.estimate(LARGE, "zero3", data_ranks=4, offload=True, **RUN)
    assert offloaded["parameters"] == offloaded["gradients"] == offloaded["optimizer"] == 0
    assert offloaded["host"] == pytest.approx(16 * n / 4, rel=0.01)


def test_of_a_frozen_model_the_adapter_alone_has_gradients_and_a_state():
    config = LMConfig(**TINY | MODELS["qwen2"])
    model = MiniMindLM(config)
    targets = add_lora(model, None, 8, 16.0, 0.0)["targets"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.adapter_size(config, targets, 8) == trained
    whole = memory.estimate(config, "ddp", data_ranks=4, **RUN)
    for strategy, shares in (("ddp", 1), ("zero1", 4), ("zero3", 4)):
        need = memory.estimate(config, strategy, data_ranks=4, trained=trained, **RUN)
        gradients = trained if strategy == "zero1" else trained / shares
        assert need["gradients"] == 4 * gradients
        assert need["optimizer"] == round(8 * trained / shares)
        assert need["total"] < whole["total"]


def test_choose_strategy_takes_the_first_that_fits():
    needs = {s: memory.estimate(LARGE, s, data_ranks=8, **RUN)["total"] for s in memory.STRATEGIES}
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for strategy, need in needs.items():
        chosen, reason = memory.choose_strategy(
            LARGE, CPU, memory=int(need / 0.9) + 1, data_ranks=8, **RUN
        )
        assert chosen == strategy and reason.startswith(f"{strategy}: needs") and "\n" not in reason
    chosen, reason = memory.choose_strategy(LARGE, CPU, memory=2**20, data_ranks=8, **RUN)
    assert chosen == "zero3" and "nothing fits" in reason and "ddp" in reason


def test_choose_strategy_knows_what_cannot_be_had():
    fits_zero1 = (
        int(memory.estimate(LARGE, "zero1", data_ranks=8, tensor_parallel=2, **RUN)["total"] / 0.9)
        + 1
    )
    chosen, _ = memory.choose_strategy(
        LARGE, CPU, memory=fits_zero1, data_ranks=8, tensor_parallel=2, **RUN
    )
    assert chosen != "zero1"
    chosen, reason = memory.choose_strategy(LARGE, CPU, memory=2**20, data_ranks=1, **RUN)
    assert chosen == "ddp" and "nothing fits" in reason  # nobody to share with


@pytest.mark.parametrize("layers, strategy", [(8, "ddp"), (32, "zero2"), (200, "zero3")])
def test_without_memory_the_number_of_parameters_decides(layers, strategy, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    config = LMConfig(dim=2048, n_layers=layers, n_heads=16, n_kv_heads=4)
    chosen, reason = memory.choose_strategy(config, CPU, data_ranks=8, **RUN)
    assert chosen == strategy and "cannot be read" in reason


def test_device_memory_of_this_machine(monkeypatch):
    whole = memory.device_memory(CPU)
    for name, value in launched_as(0, 1000).items():
        monkeypatch.setenv(name, value)
    assert whole is None or 0 <= memory.device_memory(CPU) < whole / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="left as it is by other C libraries")
def test_a_step_finds_the_memory_of_the_one_before():
    code = """
import resource, torch
from runtime.device import keep_memory
keep_memory()
counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for step in range(2):
    tensors = [torch.ones(n) for n in [6_000_000, 3_000_000, 1_000_000] * 6]
    del tensors
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(*counts)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    start, first, second = map(int, done.stdout.split())
    assert (
        second - first < (first - start) / 2
    )  # pages that Linux had to give; without keep_memory as many again


@pytest.mark.parametrize("moe", [{}, {"use_moe": True, "n_experts": 6, "n_shared_experts": 2}])
def test_matrices_are_counted_without_a_model(moe):
    config = LMConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, **moe)
    shapes = memory.parameter_shapes(config)
    blocks = {
        name: shape for name, shape in shapes.items() if ".layers." in name and len(shape) > 1
    }
    assert block_weights(config) == sum(shape.numel() for shape in blocks.values())
