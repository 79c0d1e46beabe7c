"""Llama, Qwen2, Mistral, Qwen3 and its mixture of experts: what transformers computes, we compute."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_model import MOE, TINY, build, ids
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.kv_cache import KVCache
from model.layout import Layout, rotary_angles
from model.lm import LMConfig, MiniMindLM
from model.rope import parse_rope_scaling, scaled_frequencies

LLAMA = {"qk_norm": False, "norm_eps": 1e-5, "rope_theta": 1e4}
QWEN2 = {"qk_norm": False, "qkv_bias": True}
# name -> (transformers' class, our shape, what its configuration has of its own)
FAMILIES = {
    "llama": ("Llama", {**LLAMA, "dim": 96, "n_heads": 6, "n_kv_heads": 2}, {}),
    "llama_untied": ("Llama", {**LLAMA, "tie_embeddings": False, "head_dim": 24}, {}),
    "qwen2": ("Qwen2", QWEN2, {"use_sliding_window": False}),
    "qwen2_untied": ("Qwen2", {**QWEN2, "n_kv_heads": 4, "tie_embeddings": False}, {}),
    "mistral": ("Mistral", {**LLAMA, "tie_embeddings": False}, {"sliding_window": None}),
    "qwen3": ("Qwen3", {"n_heads": 8, "n_kv_heads": 1, "head_dim": 16}, {}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "tie_embeddings": False}, {}),
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 8192}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 1024},
    "llama3_slow": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    "yarn": {**YARN, "factor": 4.0},
    "yarn_minimind": {**YARN, "factor": 16.0, "attention_factor": 1.0, "beta_fast": 20.0},
    "yarn_deepseek": {**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn_exact": {**YARN, "factor": 5.0, "truncate": False, "beta_slow": 2.0},
}


def pair(family: str, **changes) -> tuple[MiniMindLM, torch.nn.Module]:
    """A tiny model of a family and transformers' own with the same weights."""
    name, shape, own = FAMILIES[family]
    model = build(**{"dim": 64, **shape, **changes})
    config = model.config
    rope = config.rope_scaling or {"rope_type": "default"}
    sizes = {
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.use_moe:
        own = own | {"num_experts": config.n_experts, "norm_topk_prob": True}
        own |= {"num_experts_per_tok": config.n_experts_per_tok}
        own |= {"moe_intermediate_size": config.moe_hidden_dim}
    reference = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes, **own)
    )
    reference.load_state_dict(model.state_dict(), strict=True)
    return model, reference.eval()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_those_of_the_family(family):
    """3,000 positions in one row, and padding on the left in short ones."""
    model, reference = pair(family, max_seq_len=4096)
    tokens = ids(1, 3000)
    expected = reference(tokens).logits
    assert expected.std() > 0.3  # the comparison means something
    if model.config.use_moe:  # rounding alone may reach 2e-5 in one logit, but not in all of them
        assert (model(tokens).logits - expected).norm() <= 1e-5 * expected.norm()
    else:
        assert error(model(tokens).logits, expected) <= 1e-5
    tokens, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = reference(tokens, attention_mask=mask, position_ids=positions).logits
    shown = mask.bool()
    assert error(model(tokens, mask).logits[shown], expected[shown]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_that_of_the_family(family):
    """Prompts read in packs and tokens made step by step, with the cache."""
    model, reference = pair(family)
    tokens = ids(3, 20)
    expected = reference.generate(tokens, max_new_tokens=40, do_sample=False)[:, 20:]
    assert torch.equal(model.generate(tokens, max_new_tokens=40), expected)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "qwen2", "qwen2_untied"])
def test_gradients_of_an_sft_step_equal_those_of_the_family(family):
    """Three documents in a pack against three padded rows, loss on some of their tokens."""
    model, reference = pair(family)
    lens, model = [37, 60, 22], model.train()
    rows = [ids(1, n + 1)[0] for n in lens]
    masks = [torch.rand(n) < 0.4 for n in lens]
    packed = torch.cat([row[:-1] for row in rows]).unsqueeze(0)
    at = torch.cat(masks).nonzero().squeeze(1)
    targets = torch.cat([row[1:] for row in rows])[at]
    loss = model(packed, doc_lens=lens, logits_at=at, targets=targets).loss / len(at)
    loss.backward()

    padded = torch.stack([F.pad(row, (0, max(lens) + 1 - len(row))) for row in rows])
    labels = padded.clone().fill_(-100)
    for row, mask, label in zip(rows, masks, labels, strict=True):
        label[1 : len(row)] = row[1:].where(mask, -100)
    seen = torch.stack([torch.arange(max(lens) + 1) <= n for n in lens]).long()
    expected = reference(padded, attention_mask=seen, labels=labels).loss
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        norm = theirs[name].grad.norm()
        # the gradient of a bias on keys is 0 but for rounding: it moves all scores alike
        scale = 1.0 if name.endswith("k_proj.bias") else norm
        assert (p.grad - theirs[name].grad).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_scaled_rotary_positions_equal_transformers_up_to_32768(family, scaling):
    """Of all frequencies every bit; logits at positions sampled over the whole range."""
    changes = {"rope_scaling": SCALINGS[scaling], "max_seq_len": 32769, "rope_theta": 5e5}
    model, reference = pair(family, **changes)
    settings = reference.config.rope_parameters
    frequency, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](reference.config, "cpu")
    ours, scale = scaled_frequencies(model.config, torch.device("cpu"))
    assert torch.equal(ours, frequency) and scale == factor
    positions = torch.randint(1, 32768, (1, 62)).sort().values
    positions = torch.cat((torch.tensor([[0]]), positions, torch.tensor([[32768]])), dim=1)
    tokens = ids(1, positions.size(1))
    layout = Layout(*rotary_angles(model.config, positions))
    expected = reference(tokens, position_ids=positions, use_cache=True).logits
    assert error(model(tokens, layout=layout).logits, expected) <= 1e-5


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_generation_with_scaled_positions_equals_transformers(scaling):
    settings = {**SCALINGS[scaling], "original_max_position_embeddings": 64}
    model, reference = pair("llama", rope_scaling=settings, max_seq_len=256)
    tokens = ids(2, 100)
    expected = reference.generate(tokens, max_new_tokens=30, do_sample=False)[:, 100:]
    assert torch.equal(model.generate(tokens, max_new_tokens=30), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_row(family):
    model, _ = pair(family)
    tokens = ids(2, 30)
    cache = KVCache(model.config, 2, 30, torch.device("cpu"), torch.float32)
    parts = [model(part, cache=cache).logits for part in tokens.split([11, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_new_model_has_biases_of_zero():
    model = MiniMindLM(LMConfig(**TINY, **QWEN2))
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 3 * TINY["n_layers"] and not any(p.any() for p in biases)


def test_rope_scaling_is_read_in_every_spelling():
    old = {"type": "yarn", "factor": 4, "attention_factor": None}
    config = LMConfig(**TINY, rope_scaling=old)
    filled = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 256}
    assert config.rope_scaling == filled
    assert LMConfig(**TINY, rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert parse_rope_scaling("yarn:4", 256) == filled
    assert parse_rope_scaling("linear:2", 256) == {"rope_type": "linear", "factor": 2.0}
    llama = {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}
    assert parse_rope_scaling("llama3:8:8192", 256) == llama


@pytest.mark.parametrize(
    "scaling, fault",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not computed"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, "'longrope' is not computed"),
        ({"factor": 2.0}, "'default' is not computed"),
        ({"rope_type": "linear"}, "linear lacks factor"),
        ({**LLAMA3, "factor": 8.0, "high_freq_factor": 1.0}, "must be below high_freq_factor"),
        ({**YARN, "factor": 0.5}, "factor 0.5 is too small"),
        ({**YARN, "factor": "four"}, "factor must be a number, it is 'four'"),
        ({**YARN, "factor": 4.0, "long_factor": [1.0]}, "has no key long_factor"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(scaling, fault):
    with pytest.raises(ValueError, match=fault):
        LMConfig(**TINY, rope_scaling=scaling)


@pytest.mark.parametrize("flag", ["yarn", "yarn:x", "dynamic:2", "yarn:0.5", "linear:2:512", ":4"])
def test_a_flag_that_says_nothing_is_refused(flag):
    with pytest.raises(ValueError, match=f"--rope_scaling {flag}: "):
        parse_rope_scaling(flag, 512)
