"""scripts/convert.py: what goes out loads elsewhere and comes back bit by bit."""

import json
import os
import shutil

import pytest
import torch
from running import ROOT, run_ranks, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.lm import LMConfig, MiniMindLM
from model.lora import adapter_json, adapter_tensors, add_lora
from model.weights import load_model, read_config

TOKENIZER = ROOT / "model/minimind_tokenizer"
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=6400, max_seq_len=256)
MOE = dict(use_moe=True, n_experts=4, n_experts_per_tok=2, moe_hidden_dim=24)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "qwen3": {},
    "qwen3_untied": {"tie_embeddings": False, "head_dim": 16},
    "qwen3_moe": MOE,
    "qwen2": {"qk_norm": False, "qkv_bias": True, "rope_scaling": YARN},
    "llama": {"qk_norm": False, "tie_embeddings": False, "norm_eps": 1e-5, "rope_theta": 1e4},
}
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_untied": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def convert(*args, code: int = 0) -> str:
    return run_ranks("scripts/convert.py", *args, code=code)


def write(path, dtype=None, **shape):
    """A tiny model as NAME.pth, with values that a dtype holds exactly."""
    model = MiniMindLM(LMConfig(**{**SIZES, **shape}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
            p.copy_(p.to(dtype or torch.float32).float())
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(model.config.to_json())
    return model.eval()


def file_tensors(folder) -> dict[str, torch.Tensor]:
    return {n: v for path in folder.glob("*.safetensors") for n, v in load_file(path).items()}


def same_tensors(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        v.dtype == other[n].dtype and torch.equal(v, other[n]) for n, v in one.items()
    )


@pytest.mark.parametrize("name", SHAPES)
def test_out_and_back_again(name, tmp_path):
    """Ours -> Hugging Face -> ours -> Hugging Face: every tensor; transformers loads what is there."""
    model = write(tmp_path / "w.pth", **SHAPES[name])
    shards = ["--shard_size=300KB"] if name in ("qwen3_moe", "llama") else []
    convert("to-hf", tmp_path / "w.pth", tmp_path / "hf", *shards)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == bool(shards)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == ARCHITECTURES[name] and theirs.dtype == torch.float32
    x = torch.randint(6400, (1, 100))
    with torch.no_grad():
        ours = model(x).logits
        assert (theirs(x).logits - ours).abs().max() <= 1e-5 * ours.abs().max()

    convert("from-hf", tmp_path / "hf", tmp_path / "back.pth")
    assert same_tensors(torch.load(tmp_path / "back.pth"), model.state_dict())
    config = read_config(tmp_path / "back.pth")
    assert config.tokenizer["folder"] == str(tmp_path / "hf")
    config.tokenizer, config.moe_hidden_dim = None, model.config.moe_hidden_dim
    assert config == model.config

    convert("to-hf", tmp_path / "back.pth", tmp_path / "again")
    assert same_tensors(file_tensors(tmp_path / "again"), file_tensors(tmp_path / "hf"))
    text = (tmp_path / "hf/config.json").read_text()
    assert (tmp_path / "again/config.json").read_text() == text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_as_it_was(dtype, tmp_path):
    write(tmp_path / "w.pth", dtype=getattr(torch, dtype))
    convert("to-hf", tmp_path / "w.pth", tmp_path / "hf", f"--dtype={dtype}")
    state = file_tensors(tmp_path / "hf")
    assert {v.dtype for v in state.values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == getattr(torch, dtype)
    convert("from-hf", tmp_path / "hf", tmp_path / "back.pth")
    assert same_tensors(torch.load(tmp_path / "back.pth"), torch.load(tmp_path / "w.pth"))
    convert("to-hf", tmp_path / "hf", tmp_path / "again", f"--dtype={dtype}")
    assert same_tensors(file_tensors(tmp_path / "again"), state)


def test_minimind_with_shared_experts_goes_back_to_minimind(tmp_path):
    shape = {**MOE, "qk_norm": False, "n_shared_experts": 2, "hidden_dim": 24}
    model = write(tmp_path / "w.pth", **shape)
    convert("to-hf", tmp_path / "w.pth", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["MiniMindForCausalLM"] and config["n_shared_experts"] == 2
    state = file_tensors(tmp_path / "hf")
    shared = state["model.layers.1.mlp.shared_experts.1.down_proj.weight"]
    assert torch.equal(shared, model.model.layers[1].mlp.shared_expert.down_proj.weight[:, 24:])
    convert("from-hf", tmp_path / "hf", tmp_path / "back.pth")
    assert same_tensors(torch.load(tmp_path / "back.pth"), model.state_dict())
    assert "transformers has no MiniMind" in convert("check", tmp_path / "hf", tmp_path / "w.pth")


def test_the_tokenizer_goes_along(tmp_path):
    write(tmp_path / "w.pth")
    convert("to-hf", tmp_path / "w.pth", tmp_path / "hf")
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (TOKENIZER, tmp_path / "hf"))
    turns = [{"role": "user", "content": "你好, who are you?"}]
    turns += [{"role": "assistant", "content": "A small model.", "reasoning_content": "Who am I?"}]
    ids = ours.apply_chat_template(turns, return_dict=False)
    assert ids == theirs.apply_chat_template(turns, return_dict=False)
    # What a program shows that leaves out special tokens: thinking is none.
    assert "<think>\nWho am I?\n</think>" in theirs.decode(ids, skip_special_tokens=True)
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == ours.convert_tokens_to_ids("<|im_end|>")
    assert generation["pad_token_id"] == ours.pad_token_id


def test_generation_settings_and_template_of_the_folder_are_kept(tmp_path):
    write(tmp_path / "w.pth")
    convert("to-hf", tmp_path / "w.pth", tmp_path / "one")
    settings = {"eos_token_id": [9, 2], "temperature": 0.6, "_from_model_config": True}
    (tmp_path / "one/generation_config.json").write_text(json.dumps(settings))
    template = tmp_path / "one/chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    convert("from-hf", tmp_path / "one", tmp_path / "w2.pth")
    convert("to-hf", tmp_path / "w2.pth", tmp_path / "two")
    written = json.loads((tmp_path / "two/generation_config.json").read_text())
    assert written == {**written, "eos_token_id": [2, 9], "temperature": 0.6}
    assert "_from_model_config" not in written
    assert (tmp_path / "two/chat_template.jinja").read_text() == template.read_text()


def test_a_template_that_is_given_goes_along(tmp_path):
    write(tmp_path / "w.pth")
    own = (TOKENIZER / "chat_template.jinja").read_text()
    given = tmp_path / "given.jinja"
    given.write_text(own + "{# given #}")
    convert("to-hf", tmp_path / "w.pth", tmp_path / "hf", f"--chat_template={given}")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == given.read_text()
    convert("from-hf", tmp_path / "hf", tmp_path / "back.pth")
    assert read_config(tmp_path / "back.pth").tokenizer["chat_template"] == given.read_text()
    # Named templates of a tokenizer with several stay so.
    shutil.copytree(TOKENIZER, tmp_path / "several")
    (tmp_path / "several/chat_template.jinja").unlink()
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    names = [{"name": name, "template": own} for name in ("default", "tool_use")]
    config |= {"chat_template": names, "tokenizer_class": "TokenizersBackend"}
    (tmp_path / "several/tokenizer_config.json").write_text(json.dumps(config))
    several = f"--tokenizer_dir={tmp_path / 'several'}"
    convert("to-hf", tmp_path / "w.pth", tmp_path / "two", several)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert theirs.chat_template == {"default": own, "tool_use": own}


def test_check_tells_a_difference(tmp_path):
    write(tmp_path / "w.pth")
    convert("to-hf", tmp_path / "w.pth", tmp_path / "hf", "--dtype=bfloat16")
    said = convert("check", tmp_path / "hf", tmp_path / "w.pth")
    assert "tensors: 24 of 24 equal" in said and "the same as" in said and "8 of 8 texts" in said
    path = tmp_path / "hf/model.safetensors"
    state = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, name: state[name].flip(0)}, path, metadata={"format": "pt"})
    said = convert("check", tmp_path / "hf", tmp_path / "w.pth", code=1)
    assert "tensors: 23 of 24 equal" in said and "DIFFERS" in said
    save_file(state, path, metadata={"format": "pt"})
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "chat template: DIFFERENT" in convert(
        "check", tmp_path / "hf", tmp_path / "w.pth", code=1
    )
    write(tmp_path / "wide.pth", vocab_size=6408)  # than the folder's
    assert "DIFFERS" in convert("check", tmp_path / "hf", tmp_path / "wide.pth", code=1)


@pytest.fixture
def adapter(tmp_path):
    """A base model, an adapter for it, and the model with both."""
    model = write(tmp_path / "base.pth")
    settings = add_lora(model, None, rank=4, alpha=8.0, dropout=0.0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.05)
    torch.save(adapter_tensors(model.state_dict()), tmp_path / "lora.pth")
    (tmp_path / "lora.json").write_text(adapter_json(model.config, settings))
    return model.eval()


def test_an_adapter_is_merged_or_written_for_peft(adapter, tmp_path):
    peft = pytest.importorskip("peft")
    x = torch.randint(6400, (1, 50))
    base, lora = tmp_path / "base.pth", f"--lora={tmp_path / 'lora.pth'}"
    convert("merge", base, tmp_path / "merged.pth", lora)
    convert("to-hf", base, tmp_path / "hf")
    convert("to-hf", base, tmp_path / "hf_merged", lora)
    convert("to-hf", base, tmp_path / "peft", lora, "--peft")
    assert "the same as" in convert("check", tmp_path / "hf_merged", base, lora)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    adapted = peft.PeftModel.from_pretrained(exported, tmp_path / "peft")
    with torch.no_grad():
        want = adapter(x).logits
        for logits in (
            load_model(tmp_path / "merged.pth")(x).logits,
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf_merged")(x).logits,
            adapted(x).logits,
        ):
            assert (logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_adapter_brings_its_scaled_positions(adapter, tmp_path):
    """One trained with --rope_scaling is exported with it, whatever its base says."""
    path = tmp_path / "lora.json"
    described = json.loads(path.read_text())
    scaling = {"rope_type": "linear", "factor": 4.0}
    longer = described | {"rope_scaling": scaling, "max_seq_len": 4 * described["max_seq_len"]}
    path.write_text(json.dumps(longer))
    base, lora = tmp_path / "base.pth", f"--lora={tmp_path / 'lora.pth'}"
    convert("to-hf", base, tmp_path / "hf", lora)
    convert("merge", base, tmp_path / "merged.pth", lora)
    for place in (tmp_path / "hf", tmp_path / "merged.pth"):
        config = read_config(place)
        assert (config.rope_scaling, config.max_seq_len) == (scaling, longer["max_seq_len"])
    assert "the same as" in convert("check", tmp_path / "hf", base, lora)


def test_what_cannot_be_converted_is_told_in_a_line(tmp_path):
    """Exit code 2, and nothing that is half-written stays."""
    model = write(tmp_path / "w.pth")
    write(tmp_path / "odd.pth", qkv_bias=True)
    write(tmp_path / "small.pth", vocab_size=1000)
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = 1e6
    torch.save(model.state_dict(), tmp_path / "big.pth")
    shutil.copy(tmp_path / "w.json", tmp_path / "big.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    before = sorted(tmp_path.rglob("*"))
    w, new = tmp_path / "w.pth", tmp_path / "new"
    cases = [
        (["to-hf", w, tmp_path / "full"], "full: is there already"),
        (["to-hf", w, new, "--shard_size=much"], "--shard_size much"),
        (["to-hf", w, new, "--peft"], "--peft: name the adapter"),
        (["to-hf", tmp_path / "odd.pth", new], "qk_norm and qkv_bias"),
        (["to-hf", tmp_path / "small.pth", new], "6400 entries, the model 1000"),
        (["to-hf", tmp_path / "big.pth", new, "--dtype=float16"], "up_proj.weight has values"),
        (["to-hf", tmp_path / "no.pth", new], "no.pth: no such file"),
        (["from-hf", tmp_path / "full", tmp_path / "x.pth"], "full: there is no config.json"),
        (["from-hf", tmp_path / "none", tmp_path / "x.pth"], "none: no such file or folder"),
        (["from-hf", tmp_path / "full", tmp_path / "x.bin"], "must be a .pth file"),
        (["from-hf", "org/none", tmp_path / "x.pth"], "from-hf org/none: no such folder"),
        (["merge", w, w, f"--lora={w}"], "w.pth: is there already"),
        (["to-gguf", w, tmp_path / "x.Modelfile"], "x.Modelfile: must be a .gguf file"),
        (["to-gguf", w, tmp_path / "full"], "full: must be a .gguf file"),
        (["merge", w, tmp_path / "x.pth"], "name the adapter with --lora"),
        (["merge", w, tmp_path / "x.pth", f"--lora={w}"], "w.json"),
        (["check", new, w], "new: no such file or folder"),
        (["to-hf", w], "folder"),
        (["fly"], "fly"),
    ]
    for words, reason in cases:
        said = convert(*words, code=2)
        assert reason in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert sorted(tmp_path.rglob("*")) == before


def test_it_runs_from_a_shell_with_the_name_of_a_stage(tmp_path):
    write(tmp_path / "full_sft_32.pth")
    words = ["to-hf", "full_sft", tmp_path / "hf", f"--out_dir={tmp_path}"]
    done = run_script("scripts/convert.py", *words)
    assert done.returncode == 0 and done.stdout.endswith(f"{tmp_path / 'hf'}\n"), done.stderr


def test_a_model_that_was_only_pretrained(tmp_path):
    """Its tokenizer has no chat template: a text ends with what stands between documents."""
    write(tmp_path / "pretrain_32.pth")
    bare = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, bare)
    (bare / "chat_template.jinja").unlink()
    words = ("pretrain", tmp_path / "hf", "--out_dir", tmp_path, "--tokenizer_dir", bare)
    convert("to-hf", *words)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template is None
    assert tokenizer.convert_ids_to_tokens(config["eos_token_id"]) == "<|endoftext|>"
    convert("check", tmp_path / "hf", "pretrain", "--out_dir", tmp_path, "--tokenizer_dir", bare)


def test_a_hostile_template_ends_no_export(tmp_path):
    """It goes out as it is, with weights that nobody here has trained as a chat."""
    write(tmp_path / "a.pth")
    evil = tmp_path / "evil.jinja"
    evil.write_text("{% for a in range(99999) %}{{ 'x' * 9999999 }}{% endfor %}")
    words = (tmp_path / "a.pth", tmp_path / "hf", "--chat_template", evil)
    convert("to-hf", *words)
    convert("check", tmp_path / "hf", tmp_path / "a.pth", "--chat_template", evil)


def test_a_missing_stage_and_what_is_no_file(tmp_path):
    said = convert("to-hf", "nonsense", tmp_path / "hf", "--out_dir", tmp_path, code=2)
    assert "no nonsense weights" in said and "train_nonsense" not in said
    os.mkfifo(tmp_path / "config.json")
    assert "there is no config.json" in convert("from-hf", tmp_path, tmp_path / "x.pth", code=2)
    (tmp_path / "config.json").unlink()
    write(tmp_path / "a.pth")
    convert("to-hf", tmp_path / "a.pth", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    os.mkfifo(tmp_path / "hf/model.safetensors")
    assert "no weights in it" in convert("from-hf", tmp_path / "hf", tmp_path / "x.pth", code=2)
