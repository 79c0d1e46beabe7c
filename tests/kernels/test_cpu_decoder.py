"""Generation on a CPU: the logits of the model, in steps and for prompts, in all shapes."""

import pytest
import torch
import torch.nn.functional as F
from test_model import KINDS, TINY, build, ids

import kernels
from kernels import native
from kernels.cpu_decoder import BLOCK, CpuDecoder, is_supported, packed
from model.kv_cache import KVCache
from model.lm import LMConfig
from model.lora import add_lora

SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA = {"qk_norm": False, "rope_scaling": SCALED}
QWEN2 = {"qk_norm": False, "qkv_bias": True}
HEADS = [(4, 2, 8), (6, 2, 16), (3, 3, 32), (5, 1, 64), (8, 2, 4), (16, 8, 6)]
HEADS += [(9, 3, 64, LLAMA), (6, 2, 16, QWEN2), (1, 1, 32, QWEN2)]
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 0.05)]


def with_gains(heads: tuple) -> torch.nn.Module:
    """A model whose norms have gains that are not 1; behind its heads stands what else it has."""
    n_heads, n_kv_heads, head_dim, *family = heads
    shape = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    model = build(**shape, **(family[0] if family else {}))
    for name, p in model.named_parameters():
        if "norm" in name:
            p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    return model


@pytest.mark.parametrize("dtype, most", PRECISIONS, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 19])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.no_grad()
def test_a_step_of_the_decoder_gives_the_logits_of_the_model(dtype, most, rows, heads):
    """Rows that are full, begun and empty, shared heads or not; then some rows have left.

    The model computes in float32: in bfloat16 both would round, and attention is sharp here.
    """
    model = with_gains(heads)
    assert is_supported(model, dtype)
    ours, exact = (
        KVCache(model.config, rows, 50, torch.device("cpu"), kind)
        for kind in (dtype, torch.float32)
    )
    ours.kv.normal_(generator=torch.Generator().manual_seed(0))
    exact.kv.copy_(ours.kv)
    for cache in (ours, exact):
        cache.lengths = torch.arange(rows) * 2
    decoder, places = CpuDecoder(model, ours), torch.arange(rows)
    for kept in (places, places, places[::2].flip(0)):
        for cache in (ours, exact):
            cache.keep(kept)
        token = ids(1, len(kept))[0]
        mine, logits = decoder.step(token), model(token.unsqueeze(1), cache=exact).logits.squeeze(1)
        assert (
            mine.dtype == torch.float32 and (mine - logits).abs().max() <= most * logits.abs().max()
        )
    assert torch.equal(ours.lengths, exact.lengths)
    torch.testing.assert_close(
        ours.kv.float(), exact.kv, rtol=0, atol=most * float(exact.kv.abs().max())
    )
    ours.lengths[0] = 50
    with pytest.raises(ValueError, match="room for 50 tokens"):
        decoder.step(token)


@pytest.mark.parametrize("dtype, most", PRECISIONS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.no_grad()
def test_the_decoder_reads_prompts_as_the_model_does(dtype, most, heads):
    """Prompts of one token and of many, one in two rows, among rows that hold others."""
    model, lens = with_gains(heads), [30, 1, 17]
    ours, exact = (
        KVCache(model.config, 5, 50, torch.device("cpu"), kind) for kind in (dtype, torch.float32)
    )
    for cache in (ours, exact):
        cache.kv.fill_(1.0)
        cache.keep(torch.tensor([4, 3, 1, 0]))
        cache.prompt_rows = torch.tensor([[3, 0, 1]])
    prompts, last = ids(1, 48), torch.tensor(lens).cumsum(0) - 1
    mine = CpuDecoder(model, ours).read(prompts, lens, last)
    logits = model(prompts, doc_lens=lens, logits_at=last, cache=exact).logits
    assert mine.dtype == torch.float32 and (mine - logits).abs().max() <= most * logits.abs().max()
    assert ours.lengths.tolist() == exact.lengths.tolist() == [1, 17, 0, 30]
    torch.testing.assert_close(
        ours.kv.float(), exact.kv, rtol=0, atol=most * float(exact.kv.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_stands_between_the_products_equals_its_formulas(dtype):
    """Also where an exponential vanishes or overflows; rounding is torch's, ties included."""
    generator, one = torch.Generator().manual_seed(0), packed(torch.eye(64, dtype=dtype))
    decoder = CpuDecoder(build(), KVCache(LMConfig(**TINY), 1, 8, torch.device("cpu"), dtype))
    most = 1e-6 if dtype == torch.float32 else 2**-8
    x = torch.randn(33, 64, generator=generator)
    exact = x / x.square().mean(1, keepdim=True).add(1e-6).sqrt()
    for name, bias, out in (
        ("project", (None,), torch.empty(33, 64, dtype=dtype)),
        ("project_to_floats", (), torch.empty(33, 64)),
    ):
        getattr(decoder.functions, name)(x, one, *bias, out, 33, 64, 64, 1e-6)
        torch.testing.assert_close(out, exact.to(dtype).to(out.dtype), rtol=most, atol=0)
    extremes = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e30, -1e30, 1e-30, -1e-30])
    gate = torch.cat([torch.linspace(-120, 120, 4088), extremes]).to(dtype).view(64, 64)
    up = torch.randn(64, 64, generator=generator).to(dtype)
    exact = (F.silu(gate.double()) * up.double()).to(dtype).float()
    gate_up = torch.stack(
        [weight.T.reshape(-1, BLOCK // 2, 64) / 8 for weight in (gate, up)], dim=1
    )
    x = 8 * torch.eye(64)  # its norm is itself
    decoder.functions.mlp(x, torch.ones(64, 32, dtype=dtype), packed(torch.zeros(64, 32, dtype=dtype)),
                 packed(gate_up.view(128, 64)), one, 64, 32, 64, 64, 0.0)  # fmt: skip
    others = ~torch.eye(64, dtype=torch.bool)
    torch.testing.assert_close(
        x[others], exact[others], rtol=10 * most if most < 1e-5 else most, atol=1e-35
    )


def test_the_decoder_is_for_plain_dense_models():
    assert is_supported(build(), torch.float32)
    assert not is_supported(build(**KINDS["moe"]), torch.float32) and not is_supported(
        build(), torch.float16
    )
    assert not is_supported(build(dim=48), torch.float32) and not is_supported(
        build(head_dim=6), torch.float32
    )
    adapted = build()
    add_lora(adapted, ["q_proj"], 2, 2.0, 0.0)
    assert not is_supported(adapted, torch.float32)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_same_tokens_are_generated(compiler, monkeypatch):
    model, x = build(), ids(3, 20)
    kernels.apply(model, torch.device("cpu"), torch.float32)
    expected = model.generate(x, max_new_tokens=20)
    monkeypatch.setenv("CXX", compiler)
    native.library.cache_clear()
    try:
        assert not is_supported(model, torch.float32)
        assert torch.equal(model.generate(x, max_new_tokens=20), expected)
    finally:
        native.library.cache_clear()
