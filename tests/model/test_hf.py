"""Folders in Hugging Face's format: what transformers wrote is what we read, or it is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from running import ROOT
from safetensors.torch import load_file, save_file
from test_families import LLAMA, SCALINGS, pair
from test_model import MOE, build, ids

from model.hf import config_from_hf, config_to_hf, read_hf_tensors, resolve_folder
from model.layout import Layout
from model.lm import LMConfig
from model.newest import newest_weights
from model.weights import load_model, load_weights, read_config


def relative(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def save(theirs, folder, **options):
    theirs.save_pretrained(folder, **options)
    return folder


def edit(folder, **changes) -> None:
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def refusal(folder) -> str:
    """What is said of a folder that is not loaded."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Llama, to be copied and spoilt."""
    return save(pair("llama_untied")[1], tmp_path_factory.mktemp("llama"))


@pytest.fixture
def spoilt(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "spoilt")


# --------------------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}], ids=["one", "shards"])
@pytest.mark.parametrize(
    "family", "llama llama_untied qwen2 qwen2_untied mistral qwen3 qwen3_moe".split()
)
def test_a_folder_of_transformers_is_the_same_model_here(family, shards, tmp_path):
    built, theirs = pair(family)
    folder = save(theirs, tmp_path / "hf", **shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(shards)
    ours = load_model(folder)
    x = ids(2, 200)
    with torch.no_grad():
        assert relative(ours(x).logits, theirs(x).logits) <= 1e-5
    for name in ("dim", "n_kv_heads", "head_dim", "norm_eps", "rope_theta", "qk_norm", "qkv_bias"):
        assert getattr(ours.config, name) == getattr(built.config, name), name
    assert ours.config == read_config(folder) and ours.config.max_seq_len == 256
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == ours.config.tie_embeddings


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn", "yarn_deepseek"])
def test_scaled_rotary_positions_are_those_of_the_file(scaling, tmp_path):
    built, theirs = pair("llama", rope_scaling=SCALINGS[scaling], max_seq_len=4096)
    ours = load_model(save(theirs, tmp_path))
    assert ours.config.rope_scaling == built.config.rope_scaling
    x = ids(1, 1500)
    with torch.no_grad():
        assert relative(ours(x).logits, theirs(x).logits) <= 1e-5


def test_the_older_keys_of_rotary_positions_are_read(spoilt):
    scaling = {"type": "yarn", "factor": 4.0}  # as Qwen2.5's README says it
    edit(spoilt, rope_parameters=None, rope_theta=1e6, rope_scaling=scaling)
    config = read_config(spoilt)
    # Transformers fills in the context of the file: it may become another one here.
    original = {"original_max_position_embeddings": 256}
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, **original}
    assert config.rope_theta == 1e6
    edit(spoilt, rope_scaling={"rope_type": "default"}, rope_theta=None)
    assert (read_config(spoilt).rope_theta, read_config(spoilt).rope_scaling) == (1e4, None)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_float_dtype_becomes_float32(dtype, kind, llama, tmp_path):
    dtype = getattr(torch, dtype)
    state = {n: v.to(dtype) for n, v in load_file(llama / "model.safetensors").items()}
    shutil.copy(llama / "config.json", tmp_path)
    if kind == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())


def test_a_pickled_checkpoint_in_shards_with_shared_storage(tmp_path):
    """As PyTorch's own files were written: a tied head is the same storage, an index names files."""
    _, theirs = pair("qwen2")
    state, cut = theirs.state_dict(), 7
    names = list(state)
    torch.save({n: state[n] for n in names[:cut]}, tmp_path / "pytorch_model-1.bin")
    shared = {"lm_head.weight": state["lm_head.weight"], "freqs_cos": torch.ones(4)}
    rest = {n: state[n] for n in names[cut:]} | shared
    torch.save(rest, tmp_path / "pytorch_model-2.bin")
    files = {n: f"pytorch_model-{1 + (i >= cut)}.bin" for i, n in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    theirs.config.save_pretrained(tmp_path)
    x = ids(1, 50)
    with torch.no_grad():
        assert relative(load_model(tmp_path)(x).logits, theirs(x).logits) <= 1e-5


def test_experts_may_be_stacked_in_the_file_as_they_are_here(tmp_path):
    built, theirs = pair("qwen3_moe")
    save(theirs, tmp_path)
    save_file(dict(built.state_dict()), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in built.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_parts_of_tensors_are_read_without_the_rest(family, tmp_path):
    _, theirs = pair(family)
    folder = save(theirs, tmp_path)
    tensors = read_hf_tensors(folder, config_from_hf(folder))
    state = load_model(folder).state_dict()
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        lazy, half = tensors[name], value.shape[0] // 2
        assert lazy.shape == value.shape and torch.equal(lazy[:], value), name
        assert torch.equal(lazy[half : half + 3], value[half : half + 3]), name
        if value.dim() > 1:
            assert torch.equal(lazy[:, 1:3], value[:, 1:3]), name
            assert torch.equal(lazy[1:2, 3:], value[1:2, 3:]), name
        if value.dim() > 2:
            assert torch.equal(lazy[:, :, 5:9], value[:, :, 5:9]), name
        assert torch.equal(torch.cat(list(lazy.chunks())), value), name
        out = torch.empty(value.shape, dtype=torch.bfloat16)
        lazy.copy_to(out)
        assert torch.equal(out, value.bfloat16()), name


def test_weights_fill_a_model_that_is_there(llama):
    model = build(**LLAMA, dim=64, tie_embeddings=False, head_dim=24)
    load_weights(model, llama)
    x = ids(1, 20)
    assert torch.equal(model(x).logits, load_model(llama)(x).logits)


def test_what_the_hub_adds_to_config_json_changes_nothing(spoilt):
    before = read_config(spoilt)
    edit(
        spoilt,
        auto_map={"AutoModel": "modeling.Model"},
        _name_or_path="somewhere/else",
        is_llama_config=True,
        rope_interleaved=False,
        torch_dtype="bfloat16",
        pad_token_id=3,
        sliding_window=None,
        head_dim=24,
        layer_types=["full_attention"] * 2,
        **{"transformers.js_config": {"kv_cache_dtype": "q8"}},
    )
    assert read_config(spoilt) == before


@pytest.mark.parametrize(
    "family, keys",
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}),
        ("mistral", {"sliding_window": 256}),
    ],
)
def test_a_window_that_cuts_nothing_off_is_none(family, keys, tmp_path):
    folder = save(pair(family)[1], tmp_path)
    before = read_config(folder)
    edit(folder, layer_types=None, **keys)
    assert read_config(folder) == before


# --------------------------------------------------------------------------------------------------
# MiniMind's own checkpoints
# --------------------------------------------------------------------------------------------------

MINIMIND = {
    "architectures": ["MiniMindForCausalLM"],
    "auto_map": {"AutoConfig": "model_minimind.MiniMindConfig"},
    "model_type": "minimind",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 97,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "dropout": 0.0,
    "flash_attn": True,
}
MINIMIND2_MOE = MINIMIND | {
    "use_moe": True,
    "rms_norm_eps": 1e-05,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.1,
    "seq_aux": True,
    "norm_topk_prob": True,
    "inference_rope_scaling": False,
}


def minimind2(folder, **changes) -> dict:
    """A MiniMind2 with experts, as its own convert_model.py pickles one; returns its tensors."""
    config = {**MINIMIND2_MOE, **changes}
    dim, hidden, experts = 32, 40, ["experts.0", "experts.1", "experts.2", "experts.3"]
    experts += [f"shared_experts.{i}" for i in range(config["n_shared_experts"])]
    state = {
        "model.embed_tokens.weight": torch.randn(97, dim),
        "model.norm.weight": torch.ones(dim),
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(2):
        block = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{block}.{name}.weight"] = torch.rand(dim) + 0.5
        for name, rows in (("q", dim), ("k", dim // 2), ("v", dim // 2), ("o", dim)):
            state[f"{block}.self_attn.{name}_proj.weight"] = torch.randn(rows, dim) * 0.2
        state[f"{block}.mlp.gate.weight"] = torch.randn(4, dim)
        for expert in experts:
            for name, shape in (
                ("gate", (hidden, dim)),
                ("up", (hidden, dim)),
                ("down", (dim, hidden)),
            ):
                state[f"{block}.mlp.{expert}.{name}_proj.weight"] = torch.randn(shape) * 0.2
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return state


def test_minimind2_with_shared_experts(tmp_path):
    """Its mixture of experts computed as its code does it: token by token, expert by expert."""
    state = minimind2(tmp_path)
    model = load_model(tmp_path)
    config = model.config
    assert (config.qk_norm, config.n_experts, config.n_shared_experts) == (False, 4, 2)
    assert (config.moe_hidden_dim, config.aux_loss_alpha, config.norm_eps) == (40, 0.1, 1e-5)
    assert config.rope_scaling is None and config.tie_embeddings

    def expert(x, name):
        gate, up, down = (
            state[f"model.layers.1.mlp.{name}.{p}_proj.weight"] for p in ("gate", "up", "down")
        )
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        ours, _ = model.model.layers[1].mlp(x, Layout(x, x))
    for t in range(9):
        token = x[0, t]
        scores = (state["model.layers.1.mlp.gate.weight"] @ token).softmax(-1)
        weights, chosen = scores.topk(2)
        weights = weights / (weights.sum() + 1e-20)
        want = sum(w * expert(token, f"experts.{e}") for w, e in zip(weights, chosen, strict=True))
        want = want + expert(token, "shared_experts.0") + expert(token, "shared_experts.1")
        assert relative(ours[0, t], want) < 1e-5


def test_minimind2_with_one_expert_a_token_leaves_its_weight_as_it_is(tmp_path):
    minimind2(tmp_path, num_experts_per_tok=1)
    assert read_config(tmp_path).norm_topk_prob is False


def test_minimind_s_longer_context_is_yarn_as_its_code_has_it(tmp_path):
    minimind2(tmp_path, inference_rope_scaling=True)
    scaling = read_config(tmp_path).rope_scaling
    assert (scaling["rope_type"], scaling["factor"], scaling["attention_factor"]) == ("yarn", 16, 1)
    assert scaling["original_max_position_embeddings"] == 2048
    # What the file says besides is not read by MiniMind without the switch.
    edit(tmp_path, inference_rope_scaling=False, rope_scaling={"type": "yarn", "factor": 4})
    assert read_config(tmp_path).rope_scaling is None


def test_the_newer_minimind_has_norms_on_queries_and_keys(tmp_path):
    built = build(head_dim=8, hidden_dim=40, **MOE, moe_hidden_dim=40)
    save_file(
        {n: v for n, v in built.state_dict().items() if n != "lm_head.weight"},
        tmp_path / "model.safetensors",
    )
    moe = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    moe |= {"router_aux_loss_coef": 5e-4, "norm_topk_prob": True, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(MINIMIND | moe | {"rms_norm_eps": 1e-6}))
    model = load_model(tmp_path)
    assert model.config.qk_norm and model.config.aux_loss_alpha == 5e-4
    x = ids(1, 40)
    assert torch.equal(model(x).logits, built(x).logits)


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sliding_window": 64}, ("sliding_window 64", "256")),
        ({"attention_bias": True}, ("attention_bias true", "o_proj")),
        ({"mlp_bias": True}, ("mlp_bias true",)),
        ({"hidden_act": "gelu"}, ('hidden_act "gelu"',)),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping 50.0",)),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping 30.0",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "quantised")),
        ({"attention_dropout": 0.1}, ("attention_dropout 0.1",)),
        ({"rope_interleaved": True}, ("rope_interleaved true",)),
        ({"residual_multiplier": 0.22}, ("residual_multiplier 0.22", "not a key")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope_scaling", "dynamic")),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, ("longrope",)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mrope_section": [1]}}, ("mrope",)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ("rope_parameters",)),
        ({"architectures": ["GemmaForCausalLM"]}, ("GemmaForCausalLM", "Qwen3ForCausalLM")),
        ({"architectures": ["MiniMindLM"]}, ("MiniMindLM",)),
        ({"architectures": ["Qwen2ForCausalLM"]}, ("Qwen2ForCausalLM", "'llama'")),
        ({"architectures": None, "model_type": "gpt2"}, ('model_type "gpt2"',)),
        ({"hidden_size": None}, ("hidden_size is missing",)),
        ({"hidden_size": "64"}, ("hidden_size is '64'",)),
        ({"num_attention_heads": 3}, ("n_heads 3",)),
        ({"tie_word_embeddings": 1}, ("tie_word_embeddings is 1",)),
        ({"layer_types": 5}, ("layer_types 5",)),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, ("rope_scaling", "yarn")),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
            ("original_max_position_embeddings",),
        ),
        ({"vocab_size": 2**30}, ("embed_tokens.weight", str(2**30))),  # no memory is asked for
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name_and_value(changes, words, spoilt):
    edit(spoilt, **changes)
    message = refusal(spoilt)
    assert "config.json" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "family, keys",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("mistral", {"sliding_window": 64}),
        ("mistral", {}),  # 4096, and the context is longer
    ],
)
def test_what_is_special_to_a_family_is_refused_too(family, keys, tmp_path):
    folder = save(pair(family)[1], tmp_path)
    edit(folder, layer_types=None, sliding_window=None)
    edit(folder, max_position_embeddings=8192, **keys)
    message = refusal(folder)
    assert (
        list(keys)[-1] in message
        if "decoder" in str(keys) or "mlp" in str(keys)
        else "window" in message
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "null", "[" * 100_000])
def test_a_configuration_that_is_no_json_object(text, spoilt):
    (spoilt / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(spoilt)


def spoil_tensors(folder, change) -> str:
    """Rewrite the tensors of a folder; returns what is said of it then."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return refusal(folder)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(Q), (Q, "missing")),
        (lambda s: s.pop("lm_head.weight"), ("lm_head.weight is missing",)),
        (lambda s: s.update(extra=torch.ones(3)), ("model.safetensors: extra", "no place")),
        (
            lambda s: s.update({Q.replace("weight", "bias"): torch.ones(96)}),
            ("q_proj.bias", "no place"),
        ),
        (lambda s: s.update({Q: s[Q][:-1].clone()}), (Q, "(95, 64)", "(96, 64)")),
        (lambda s: s.update({Q: s[Q].int()}), (Q, "I32")),
        (lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)}), (Q, "F8_E4M3")),
        (lambda s: s[Q].__setitem__((5, 6), float("nan")), (Q, "not finite")),
        (lambda s: s[Q].__setitem__((5, 6), float("inf")), (Q, "not finite")),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, spoilt):
    message = spoil_tensors(spoilt, change)
    for word in words:
        assert word in message


def test_a_tied_model_may_hold_its_matrix_twice_but_not_two(tmp_path):
    _, theirs = pair("llama")
    folder = save(theirs, tmp_path)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    load_model(folder)
    state["lm_head.weight"][3, 4] += 1
    save_file(state, folder / "model.safetensors")
    assert "lm_head.weight is not the embedding" in refusal(folder)


def test_torn_files(spoilt):
    path = spoilt / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged" in refusal(spoilt)
    path.write_bytes(whole + b"x")
    assert "damaged" in refusal(spoilt)
    header = len(whole) - int.from_bytes(whole[:8], "little")
    for old, new in ((b'"F32"', b'"F64"'), (b"[96,64]", b"[96,63]"), (b'"shape"', b'"shapf"')):
        assert old in whole[:header]
        path.write_bytes(whole.replace(old, new, 1))
        assert "damaged" in refusal(spoilt) or "is of type" in refusal(spoilt)


def test_shards_and_files_that_are_not_there(tmp_path):
    folder = save(pair("llama")[1], tmp_path / "hf", max_shard_size="30KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].rename(tmp_path / "kept")
    assert f"{shards[1]}: missing" in refusal(folder)
    (tmp_path / "kept").rename(shards[1])
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    for wrong in ("{", "{}", '{"weight_map": []}', text.replace(shards[0].name, "../kept")):
        index.write_text(wrong)
        assert str(index) in refusal(folder)
    index.unlink()
    assert "no model.safetensors.index.json" in refusal(folder)
    for path in shards:
        path.unlink()
    assert "no weights in it" in refusal(folder)
    (folder / "config.json").unlink()
    assert "there is no config.json" in refusal(folder)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("extra", [{5: torch.zeros(2)}, {"x": torch.eye(2).to_sparse()}])
def test_a_pickle_of_something_else(extra, spoilt):
    state = load_file(spoilt / "model.safetensors")
    (spoilt / "model.safetensors").unlink()
    torch.save({**state, **extra}, spoilt / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(spoilt)


def test_a_pickle_that_runs_code_does_not(spoilt, capsys):
    (spoilt / "model.safetensors").unlink()
    path = spoilt / "pytorch_model.bin"
    torch.save({"model.norm.weight": Evil()}, path)
    assert "which is code and no data" in refusal(spoilt)
    assert "run" not in capsys.readouterr().out
    torch.save({"state": {}}, path)
    assert "not a plain state dict" in refusal(spoilt)
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    refusal(spoilt)
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(spoilt)
    torch.save({"model.norm.weight": torch.ones(3, 4).T}, path)
    assert "cannot be read in parts" in refusal(spoilt)
    torch.save({"model.norm.weight": torch.ones(3, dtype=torch.int64)}, path)
    assert "int64" in refusal(spoilt)


# --------------------------------------------------------------------------------------------------
# Names, and the way back
# --------------------------------------------------------------------------------------------------


def test_names_of_folders_and_of_the_hub(llama, monkeypatch, tmp_path):
    assert newest_weights(str(llama), "out") == llama == resolve_folder(str(llama))
    monkeypatch.chdir(llama.parent)
    assert newest_weights(llama.name, tmp_path).resolve() == llama
    for name in ("./no/such", "no/such/folder"):
        with pytest.raises(ValueError, match=f"--weight {name}: no such file or folder"):
            newest_weights(name, "out")
    with pytest.raises(
        ValueError, match="--from_weight org/name: no such folder, and the Hugging"
    ) as e:
        resolve_folder("org/name")
    assert "hf download org/name" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_embeddings": False, "head_dim": 12, "rope_scaling": SCALINGS["yarn"]},
        {"qk_norm": False, "rope_scaling": SCALINGS["llama3"]},
        {"qk_norm": False, "qkv_bias": True},
        {**MOE, "norm_topk_prob": False, "moe_hidden_dim": 24},
        {**MOE, "qk_norm": False, "n_shared_experts": 2, "hidden_dim": 24, "moe_hidden_dim": 24},
    ],
)
def test_a_configuration_comes_back_as_it_went(shape, tmp_path):
    config = LMConfig(dim=32, n_heads=4, **shape)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")  # MiniMind's are looked into
    back = config_from_hf(tmp_path)
    if not config.use_moe:
        config.moe_hidden_dim = back.moe_hidden_dim
    assert back == config


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"qkv_bias": True}, "qk_norm and qkv_bias"),
        ({**MOE, "n_shared_experts": 1}, "n_shared_experts 1"),
        ({**MOE, "qk_norm": False, "head_dim": 16}, "head_dim 16"),
        ({"qk_norm": False, "dim": 30, "head_dim": 8}, "dim 30"),
    ],
)
def test_a_shape_that_no_architecture_has_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        config_to_hf(LMConfig(**{"dim": 32, "n_heads": 4, **shape}))


def test_loading_holds_a_model_once():
    """Over an empty process; the goal, at the full size too: benchmarks/loading_memory.py."""
    words = ["benchmarks/loading_memory.py", "--layers=2", "--formats", "safetensors"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
