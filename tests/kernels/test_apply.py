"""What `kernels.apply` changes in a model, and what it leaves."""

import copy

import pytest
import torch
from test_model import KINDS, build, ids
from torch import nn

import kernels
from kernels.cpu_decoder import CpuDecoder
from kernels.linear import FastLinear
from kernels.lora import FastLoRALinear
from model.kv_cache import Decoder, KVCache
from model.lora import LoRALinear, add_lora
from model.reward import ActorCritic, RewardConfig, RewardModel

CPU = torch.device("cpu")
LENS = [20, 9, 3]


def fast(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    kernels.apply(model, CPU, dtype)
    return model


def loss_and_gradients(
    model: nn.Module, tokens: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    model.zero_grad()
    targets = tokens[0].roll(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        out = model(tokens, doc_lens=LENS, logits_at=torch.arange(len(targets)), targets=targets)
    (out.loss + out.aux_loss).backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe8_top1"])
def test_a_model_computes_what_it_computed_before(kind, dtype, most):
    model, tokens = build(**KINDS[kind]).train(), ids(1, sum(LENS))
    names, before = list(model.state_dict()), loss_and_gradients(model, tokens, dtype)
    assert loss_and_gradients(fast(copy.deepcopy(model)), tokens, dtype)[0] != 0
    for ours, plain in zip(
        loss_and_gradients(fast(model, dtype), tokens, dtype), before, strict=True
    ):
        assert (ours - plain).norm() <= most * plain.norm()
    assert list(model.state_dict()) == names and type(model).__name__ == "MiniMindLM"
    again = copy.deepcopy(model)
    assert [type(module) for module in again.modules()] == [
        type(module) for module in fast(model).modules()
    ]
    assert len(model._forward_pre_hooks) == 1  # also when it is called twice


@pytest.mark.parametrize("lora_first", [False, True])
def test_lora_finds_its_layers_before_and_after(lora_first):
    model, tokens = build(), ids(1, 12)
    plain = model(tokens).logits
    for step in (lora_first, not lora_first):
        if step:
            add_lora(model, ["q_proj", "down_proj"], 2, 2.0, 0.0)
        else:
            fast(model)
    block = model.model.layers[0]
    layer = FastLoRALinear if lora_first else LoRALinear
    assert type(block.self_attn.q_proj) is type(block.mlp.down_proj) is layer
    assert type(block.self_attn.k_proj) is FastLinear
    assert (model(tokens).logits - plain).abs().max() <= 1e-5
    assert (
        type(model.make_decoder(model, KVCache(model.config, 1, 8, CPU, torch.float32))) is Decoder
    )


def test_generation_takes_the_decoder_of_the_kernels():
    model, prompt = build(), ids(2, 9)
    plain = model.generate(prompt, max_new_tokens=20)
    assert torch.equal(fast(model).generate(prompt, max_new_tokens=20), plain)
    assert (
        type(model.make_decoder(model, KVCache(model.config, 1, 8, CPU, torch.float32)))
        is CpuDecoder
    )


def test_models_inside_of_others_get_them_too():
    shape = {**vars(build().config), "tie_embeddings": False, "head": "score"}
    both = fast(ActorCritic(build(), RewardModel(RewardConfig(**shape))))
    assert both.actor.make_decoder is both.critic.make_decoder is not None
    assert type(both.critic.model.layers[0].mlp.up_proj) is FastLinear


def test_another_device_is_left_as_it_is():
    model = build()
    found = kernels.apply(model, torch.device("meta"), torch.float32)
    assert kernels.summary(found) == "none; without all: none for the device meta"
    assert model.make_decoder is None and type(model.lm_head).__name__ == "Head"
