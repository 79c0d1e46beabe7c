"""GGUF files: every tensor bit-equal to ours, the metadata llama.cpp reads, and what is refused."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from running import ROOT

from benchmarks.toy_tokenizers import byte_level, sentencepiece
from dataset.tokenizer import load_tokenizer
from model.lm import LMConfig, MiniMindLM
from runtime.exports.compare import check_gguf
from runtime.exports.gguf_file import export_gguf, write_gguf
from runtime.exports.gguf_tokenizer import write_tokenizer
from runtime.exports.modelfile import chat_layout, write_modelfile
from runtime.exports.source import open_source

gguf = pytest.importorskip("gguf")

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Architecture: (fields of LMConfig, tokenizer)
MODELS = {
    "qwen3": ({"rope_scaling": YARN, "vocab_size": 6464}, None),  # 64 rows of padding
    "qwen3moe": ({"use_moe": True}, None),
    "qwen2": ({"qk_norm": False, "qkv_bias": True, "head_dim": 16}, "qwen2"),
    "llama": (
        {"qk_norm": False, "tie_embeddings": False, "rope_scaling": LLAMA3},
        "llama3",
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Kind -> folder of a small tokenizer; None: ours."""
    folders = {None: ROOT / "model/minimind_tokenizer"}
    for kind in ("qwen2", "llama3", "smollm", "gpt2", "llama2", "metaspace"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        make = sentencepiece if kind in ("llama2", "metaspace") else byte_level
        make(folders[kind], kind)
    return folders


def make_model(fields: dict, vocab_size: int) -> MiniMindLM:
    """A model whose values, norms and biases included, all differ."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**{**SHAPE, "vocab_size": vocab_size, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model.eval()


def save(model, path, **fields) -> None:
    torch.save(model.state_dict(), path)
    config = json.loads(model.config.to_json()) | fields
    path.with_suffix(".json").write_text(json.dumps(config))


def read(path) -> tuple[dict, dict]:
    """Metadata and tensors of a file, as numpy arrays."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: t for t in reader.tensors}
    return fields, tensors


NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("self_attn.o_proj", "attn_output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate.", "ffn_gate_inp."),
)


def their_name(name: str) -> str:
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    name = re.sub(r"self_attn\.([qkv])(_norm)?(_proj)?", r"attn_\1\2", name)
    name = re.sub(r"mlp\.experts\.(\w+)_proj", r"ffn_\1_exps.weight", name)
    return re.sub(r"mlp\.(\w+)_proj", r"ffn_\1", name)


def in_pairs(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Llama's queries or keys: (i, i + D/2) of each head become neighbours."""
    rows = value.view(heads, -1, value.size(1))
    half = rows.size(1) // 2
    out = torch.empty_like(rows)
    out[:, 0::2], out[:, 1::2] = rows[:, :half], rows[:, half:]
    return out.flatten(0, 1)


def expected(model) -> dict[str, torch.Tensor]:
    """The tensors that a file of this model has, by their names there."""
    config, tensors = model.config, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        if not (config.qk_norm or config.qkv_bias) and re.search(r"\.[qk]_proj", name):
            value = in_pairs(value, config.n_heads if ".q_" in name else config.n_kv_heads)
        name = their_name(name)
        if "gate_up" in name:
            gate, up = value.chunk(2, dim=1)
            tensors[name.replace("gate_up", "gate")] = gate
            tensors[name.replace("gate_up", "up")] = up
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_shape(name, tokenizers, tmp_path):
    fields, kind = MODELS[name]
    tokenizer = load_tokenizer(tokenizers[kind])
    model = make_model(fields, len(tokenizer))
    config, weights, file = model.config, tmp_path / "w.pth", tmp_path / "model.gguf"
    save(model, weights)
    export_gguf(open_source(weights, str(tokenizers[kind])), file, "f32")
    metadata, tensors = read(file)

    wanted = expected(model)
    if "rope_freqs.weight" in tensors:  # what the plain frequencies are divided by
        factors = tensors.pop("rope_freqs.weight").data
        assert factors[0] == 1 and factors[-1] == 8 and (np.diff(factors) >= 0).all()
    assert tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        assert tensors[key].tensor_type.name == "F32"
        assert torch.equal(torch.from_numpy(np.array(tensors[key].data)), value), key

    assert metadata["general.architecture"] == name
    told = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(name)}
    assert told["block_count"] == 2 and told["context_length"] == 64
    assert told["attention.head_count"] == 4 and told["attention.head_count_kv"] == 2
    assert told["attention.key_length"] == told["rope.dimension_count"] == config.head_dim
    assert told["rope.freq_base"] == 1e6
    assert told["attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert told.get("rope.scaling.type") == ("yarn" if name == "qwen3" else None)
    assert told.get("expert_count") == (4 if name == "qwen3moe" else None)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == config.vocab_size
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["model.gguf"]


@pytest.mark.parametrize("dtype", ("f16", "bf16", "q8_0"))
def test_types(dtype, tokenizers, tmp_path):
    """Matrices in the type asked for, as near as it allows; vectors and the router as they are."""
    model = make_model({"use_moe": True}, 6400)
    tokenizer, file = load_tokenizer(tokenizers[None]), tmp_path / "model.gguf"
    write_gguf(model.config, model.state_dict(), tokenizer, file, dtype)
    _, tensors = read(file)
    for name, value in expected(model).items():
        tensor, value = tensors[name], value.numpy()
        if value.ndim == 1 or "ffn_gate_inp" in name:
            assert tensor.tensor_type.name == "F32" and np.array_equal(tensor.data, value)
            continue
        fits = dtype != "q8_0" or value.shape[-1] % 32 == 0
        assert tensor.tensor_type.name == (dtype.upper() if fits else "F16"), name
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
        if dtype == "bf16":
            near = torch.from_numpy(value).bfloat16().float().numpy()
            assert np.array_equal(numbers, near), name
        else:
            assert np.abs(numbers - value).max() <= np.abs(value).max() / 250, name


KINDS = {
    None: "deepseek-coder",
    "qwen2": "qwen2",
    "llama3": "llama-bpe",
    "smollm": "smollm",
    "gpt2": "gpt-2",
    "llama2": "default",
    "metaspace": "default",
}


def write_alone(tokenizer, path, vocab_size=None) -> dict:
    writer = gguf.GGUFWriter(path, "llama")
    write_tokenizer(writer, tokenizer, vocab_size or len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer(kind, tokenizers, tmp_path):
    tokenizer = load_tokenizer(tokenizers[kind])
    told = write_alone(tokenizer, tmp_path / "t.gguf", len(tokenizer) + 3)
    told = {key.removeprefix("tokenizer."): value for key, value in told.items()}
    pieces = kind in ("llama2", "metaspace")
    assert told["ggml.model"] == ("llama" if pieces else "gpt2")
    assert told["ggml.pre"] == KINDS[kind]
    assert told["chat_template"] == tokenizer.chat_template
    assert told["ggml.add_bos_token"] == (kind in ("llama2", "metaspace", "llama3"))
    assert told["ggml.bos_token_id"] == tokenizer.bos_token_id
    assert told["ggml.eos_token_id"] == tokenizer.eos_token_id
    tokens, types = told["ggml.tokens"], told["ggml.token_type"]
    assert tokens[:-3] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = gguf.TokenType
    assert types[tokenizer.eos_token_id] == kinds.CONTROL
    assert types[-3:] == [kinds.UNUSED] * 3
    if kind is None:
        assert types[tokens.index("<think>")] == kinds.USER_DEFINED
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert told["ggml.merges"] == [" ".join(merge) for merge in merges]
    if pieces:
        assert types[tokens.index("<0x0A>")] == kinds.BYTE
        assert types[tokenizer.unk_token_id] == kinds.UNKNOWN
        assert told["ggml.add_space_prefix"] is True
        # The sooner two pieces are merged, the higher the score of what they make.
        scores = told["ggml.scores"]
        assert scores[tokens.index("▁t")] > scores[tokens.index("▁the")]


def change(tokenizers, kind, edit, folder):
    """A tokenizer of a kind, with something in its tokenizer.json changed."""
    spec = json.loads((tokenizers[kind] / "tokenizer.json").read_text())
    edit(spec)
    for path in tokenizers[kind].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(folder)


def other_digits(spec):
    split = spec["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}", r"\p{N}{1,2}")


REFUSED = {
    "regex": ("qwen2", other_digits, r"no pre-tokenizer .*\{1,2\}"),
    "whole words": (
        "qwen2",
        lambda spec: spec["model"].update(ignore_merges=True),
        "with ignore_merges",
    ),
    "normalizer": (
        "gpt2",
        lambda spec: spec.update(normalizer={"type": "Lowercase"}),
        "no normalizer Lowercase",
    ),
    "step": (
        "gpt2",
        lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
        "no step .*Whitespace",
    ),
    "merges": ("llama2", lambda spec: spec["model"]["merges"].pop(50), "merges lack"),
    "order": ("llama2", lambda spec: spec["model"]["merges"].sort(), "not ordered"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_tokenizers(name, tokenizers, tmp_path):
    kind, edit, reason = REFUSED[name]
    tokenizer = change(tokenizers, kind, edit, tmp_path)
    with pytest.raises(ValueError, match=rf"^tokenizer\.json: .*{reason}"):
        write_tokenizer(gguf.GGUFWriter(None, "llama"), tokenizer, len(tokenizer))


NOT_COMPUTED = {
    "shared experts": {"use_moe": True, "n_shared_experts": 1},
    "norm_topk_prob": {"use_moe": True, "norm_topk_prob": False},
    "qkv_bias": {"qkv_bias": True},
    "rope_scaling of kind llama3": {"rope_scaling": LLAMA3},
    "beta_fast 16": {"rope_scaling": YARN | {"beta_fast": 16.0}},
    "beyond float16": {},
}


@pytest.mark.parametrize("reason", NOT_COMPUTED)
def test_refused_models(reason, tokenizers, tmp_path):
    """The reason in a line; the file that was there stays, and nothing else is left."""
    model, file = make_model(NOT_COMPUTED[reason], 6400), tmp_path / "model.gguf"
    file.write_text("old")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = 1e5 if "float16" in reason else 0
    tokenizer = load_tokenizer(tokenizers[None])
    with pytest.raises(ValueError, match=reason):
        write_gguf(model.config, model.state_dict(), tokenizer, file, "f16")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_weights_that_do_not_fit(tokenizers, tmp_path, monkeypatch):
    model, out = make_model({"qk_norm": False}, 6400), tmp_path / "m.gguf"
    save(model, tmp_path / "w.pth", qkv_bias=True)
    with pytest.raises(ValueError, match=r"w\.pth: .* has no .*q_proj\.bias"):
        export_gguf(open_source(tmp_path / "w.pth"), out, "f32")
    save(model, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="dtype q4: .*f32, f16, bf16, q8_0"):
        export_gguf(open_source(tmp_path / "w.pth"), out, "q4")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        export_gguf(open_source(tmp_path / "w.pth"), out, "f32")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("kind", (None, "qwen2", "smollm", "llama3", "llama2"))
def test_modelfile(kind, tokenizers, tmp_path):
    """The layout found in a template says what the template says, of any conversation."""
    tokenizer = load_tokenizer(tokenizers[kind])
    layout = chat_layout(tokenizer)
    bos = tokenizer.bos_token if kind in ("llama2", "llama3") else ""  # llama.cpp puts it
    for roles in ("u", "uau", "su", "suauau"):
        names = {"s": "system", "u": "user", "a": "assistant"}
        talk = [{"role": names[r], "content": f'{n} "{r}"'} for n, r in enumerate(roles)]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert bos + layout.render(talk) == text

    path = write_modelfile(tokenizer, 64, tmp_path / "toy.gguf")
    lines = path.read_text().splitlines()
    end = {"llama3": "<|eot_id|>", "llama2": "</s>"}.get(kind, "<|im_end|>")
    assert path.name == "toy.Modelfile" and lines[0] == "FROM ./toy.gguf"
    assert lines[-2:] == [f'PARAMETER stop "{end}"', "PARAMETER num_ctx 64"]
    template = re.search(r'TEMPLATE """(.*?)"""', path.read_text(), re.DOTALL)[1]
    quoted = [json.loads(text) for text in re.findall(r'{{- ("(?:[^"\\]|\\.)+") -}}', template)]
    assert [layout.system, layout.assistant_user, layout.system_user] == quoted[:3]
    assert layout.reply in ("", quoted[-1])
    assert len(re.findall(r"{{-? *(?:if|range)", template)) == template.count("end }}")


def test_llama_cpp(tokenizers, tmp_path):
    pytest.importorskip("llama_cpp")
    model = make_model({"rope_scaling": YARN}, 6400)
    save(model, tmp_path / "w.pth")
    source = open_source(tmp_path / "w.pth")
    export_gguf(source, tmp_path / "m.gguf", "f32")
    same, figures = check_gguf(tmp_path / "m.gguf", source)
    assert same, figures
