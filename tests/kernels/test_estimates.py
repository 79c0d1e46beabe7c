"""The estimate of memory and the choice of --compile for a model with kernels."""

import gc
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_memory import CPU, LARGE, MODELS, TINY

import kernels
from kernels import compiling, native
from model.lm import LMConfig, MiniMindLM
from runtime import compilation, parallel
from runtime.distributed import memory


def fast(config: LMConfig, level: int = 0) -> MiniMindLM:
    model = MiniMindLM(config, level)
    kernels.apply(model, CPU, torch.float32)
    return model


def saved_bytes(model, tokens: int, supervised: int, dtype: str, docs: int) -> int:
    """Bytes of all storages that autograd keeps for one backward pass, except the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor  # held, so that no other tensor takes its place
        return tensor

    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        at = torch.arange(supervised)
        out = model(
            ids, doc_lens=[tokens // docs] * docs, logits_at=at, targets=ids[0, :supervised]
        )
    kept |= {tensor.data_ptr(): tensor for tensor in out.loss.grad_fn.gradients}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype, cpp", [("float32", False), ("float32", True), ("bfloat16", True)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("docs", [1, 4])
def test_activations_are_what_autograd_saves(name, dtype, docs, cpp, monkeypatch):
    """With the C++ for a CPU, which keeps less, the estimate is a bound."""
    if not cpp:
        monkeypatch.setattr(native, "library", lambda *_, **__: None)
    config, tokens, supervised = LMConfig(**TINY | MODELS[name]), 256, 192
    measured = saved_bytes(fast(config).train(), tokens, supervised, dtype, docs)
    estimate = memory.estimate(
        config, "ddp", data_ranks=1, tokens=tokens, supervised=supervised, dtype=dtype
    )
    # Autograd keeps autocast's copies of the weights, too.
    kept = estimate["activations"] + estimate["buffers"]
    # The other buffer is a gradient.
    kept -= 4 * config.vocab_size * config.dim if config.tie_embeddings else 0
    # Logits are gone by then.
    kept -= (4 if dtype == "float32" else 6) * supervised * config.vocab_size
    assert kept == pytest.approx(measured, rel=0.1) or cpp and 0.6 * kept < measured < kept


def held_bytes(model) -> int:
    """Bytes of the tensors that a forward pass leaves in memory: what checkpointing holds."""
    ids = torch.randint(0, model.config.vocab_size, (1, 256))
    before = {id(thing) for thing in gc.get_objects()}
    out = model(ids, doc_lens=[128, 128], targets=ids[0, :0], logits_at=ids[0, :0])
    new = [
        thing
        for thing in gc.get_objects()
        if id(thing) not in before and isinstance(thing, torch.Tensor)
    ]
    assert out.loss is not None
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}.values())


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_selective_checkpointing_holds_the_results_of_products_and_attention(name):
    config, held = LMConfig(**TINY | MODELS[name] | {"vocab_size": 8192}), []
    for level in (1, 2):
        held.append(held_bytes(fast(config, level).train()))
    ends = {"supervised": 256, "width": 4}  # the head needs more than a block
    none, all_, some = (
        memory.activations(config, 256, **ends, gradient_checkpointing=level) for level in range(3)
    )
    assert all_ < some < none and some - all_ == pytest.approx(held[1] - held[0], rel=0.1)


def test_compiling_is_chosen_where_it_was_measured_to_win(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    dataset = Namespace(lengths=np.full(1000, 200))
    run = {"compile": None, "max_seq_len": 512, "packing": 1, "total_steps": 40_000, "epochs": 200}
    run |= {"gradient_checkpointing": 0, "strategy": "ddp", "device": torch.device("cuda")}

    def chosen(dtype="bfloat16", shape=LARGE, **changed):
        with torch.device("meta"):
            model = MiniMindLM(shape)
        return parallel.choose_compile(
            model, dataset, Namespace(**run | changed), dtype, global_batch=8
        )

    # Of an epoch: it is shorter than its full windows.
    operations = 6 * memory.parameter_count(LARGE) * 1000 * 200
    assert operations < compilation.WORTH_COMPILING < 200 * operations
    assert chosen() == chosen("float16") == 1 and chosen(epochs=1) == chosen(total_steps=200) == 0
    assert chosen(epochs=1, compile=1) == 1 and chosen(compile=0) == 0
    assert (
        chosen("float32")
        == chosen(strategy="zero3")
        == chosen(gradient_checkpointing=1)
        == chosen(device=CPU)
        == 0
    )
    assert chosen(shape=replace(LARGE, use_moe=True, n_experts_per_tok=1, moe_hidden_dim=None)) == 0
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert chosen() == 0
