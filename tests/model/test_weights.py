"""What the model and its files refuse, and in which words."""

import math
import os
import re
import zipfile

import pytest
import torch
from test_model import MOE, TINY, build, ids

from model.lm import LMConfig, MiniMindLM
from model.newest import newest_weights
from model.tensor_file import read_tensors
from model.weights import config_from_json, load_weights, open_weights

# --------------------------------------------------------------------------------------------------
# What does not fit
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, numbers",
    [
        (dict(input_ids=torch.zeros(1, 257, dtype=torch.int64)), ("257", "256")),
        (
            dict(input_ids=torch.zeros(1, 300, dtype=torch.int64), doc_lens=[257, 43]),
            ("257", "256"),
        ),
        (dict(input_ids=torch.tensor([[5, 97]])), ("97", "97 entries")),
        (dict(input_ids=torch.tensor([[5, -1]])), ("-1", "97")),
        (dict(input_ids=torch.zeros(1, 9, dtype=torch.int64), doc_lens=[5, 5]), ("9 tokens", "10")),
        (dict(input_ids=torch.zeros(2, 9, dtype=torch.int64), doc_lens=[9]), ("9", "rows: 2")),
    ],
)
def test_what_the_model_cannot_take_is_an_error_with_both_numbers(arguments, numbers):
    with pytest.raises(ValueError) as error:
        build()(**arguments)
    for number in numbers:
        assert number in str(error.value)


def test_a_packed_row_may_be_longer_than_the_context():
    assert build()(ids(1, 400), doc_lens=[200, 200]).logits.shape == (1, 400, TINY["vocab_size"])


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"dim": 30}, ("dim 30", "n_heads 4")),
        ({"n_kv_heads": 3}, ("n_heads 4", "n_kv_heads 3")),
        ({"dim": 12}, ("head_dim 3", "odd")),
        ({"n_layers": 0}, ("n_layers", "0")),
        ({"vocab_size": -1}, ("vocab_size", "-1")),
        (
            {"use_moe": True, "n_experts": 2, "n_experts_per_tok": 3},
            ("n_experts_per_tok 3", "1..2"),
        ),
        ({"use_moe": True, "moe_hidden_dim": 21}, ("moe_hidden_dim 21", "multiples of 8")),
        ({"use_moe": True, "dim": 36, "head_dim": 8}, ("dim 36", "multiples of 8")),
        ({"dropout": 1.0}, ("dropout 1.0",)),
        ({"n_layers": 10**12}, ("n_layers", str(10**12))),
        ({"head_dim": -4}, ("head_dim", "-4")),
        ({"norm_eps": float("nan")}, ("norm_eps", "nan")),
        ({"rope_theta": 0}, ("rope_theta", "0")),
    ],
)
def test_sizes_that_do_not_fit_together_are_an_error(shape, words):
    with pytest.raises(ValueError) as error:
        LMConfig(**{**TINY, **shape})
    for word in words:
        assert word in str(error.value)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"tie_embeddings": False}, {**MOE, "n_shared_experts": 1, "head_dim": 10}]
)
def test_weights_and_configuration_survive_the_disk(tmp_path, shape):
    model = build(**shape)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    (tmp_path / "m.json").write_text(model.config.to_json())
    config = config_from_json(tmp_path / "m.json")
    assert config == model.config
    loaded = MiniMindLM(config).eval()
    load_weights(loaded, tmp_path / "m.pth")
    x = ids(2, 30)
    assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"hidden_size": 8}', '{"dim": "512"}', '{"n_heads": 3}', "\xff"]
)
def test_a_spoilt_configuration_file_is_named(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a model configuration")):
        config_from_json(path)


def weights_error(model, path) -> str:
    """What `load_weights` says; who reads the file in parts hears the same."""
    with pytest.raises(ValueError) as error:
        load_weights(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError) as in_parts:
        for tensor in open_weights(model, path, lazily=True).values():
            tensor[:]
    assert str(in_parts.value) == str(error.value)
    return str(error.value)


def test_weight_files_that_do_not_fit_are_named_with_the_tensor(tmp_path):
    model, path = build(), tmp_path / "m.pth"
    assert "no such weights file" in weights_error(model, path)

    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        assert "not a weights file" in weights_error(model, path)
    path.write_text('{"no": "weights"}')
    assert "not a weights file" in weights_error(model, path)
    torch.save({"model": model.state_dict(), "step": 5}, path)
    assert "not a plain state dict" in weights_error(model, path)

    torch.save(build(dim=48, n_heads=6, n_kv_heads=3).state_dict(), path)
    message = weights_error(model, path)
    assert (
        "model.embed_tokens.weight is (97, 48) in the file and (97, 32) here" in message
        and "--dim" in message
    )

    state = model.state_dict()
    del state["model.layers.1.self_attn.q_norm.weight"]
    torch.save(state, path)
    assert "the file has no model.layers.1.self_attn.q_norm.weight" in weights_error(model, path)

    torch.save(build(n_layers=3).state_dict(), path)
    assert "the model has no model.layers.2." in weights_error(model, path)
    torch.save(build(**MOE).state_dict(), path)
    assert "--use_moe" in weights_error(model, path)


def test_no_bit_of_a_weights_file_changes_in_silence(tmp_path):
    """It is refused, or it is one between the tensors, of which nothing is read."""
    model, path = build(), tmp_path / "m.pth"
    torch.save(model.state_dict(), path)
    whole, refused = path.read_bytes(), 0
    places = range(7, len(whole), len(whole) // 150)
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            state = read_tensors(path)
            assert all(
                torch.equal(state[name], value) for name, value in model.state_dict().items()
            ), at
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.8 * len(places)
    path.write_bytes(whole[:9000] + bytes(4096) + whole[9000 + 4096 :])
    assert "its content is not what was saved" in weights_error(model, path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    model, path = build(), tmp_path / "m.pth"
    state = model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    torch.save(state, path)
    assert "model.layers.1.mlp.up_proj.weight has values that are not finite" in weights_error(
        model, path
    )


def test_large_weights_and_files_without_checksums_load(tmp_path):
    """A sum that overflows is no infinite weight; a saver that was told so writes no CRC."""
    model, path = build(), tmp_path / "m.pth"
    model.model.norm.weight.data.fill_(3e38)
    torch.save(model.state_dict(), path)
    load_weights(build(), path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(model.state_dict(), path)
    torch.serialization.set_crc32_options(before)
    load_weights(build(), path)


def test_a_tied_model_loads_a_file_that_stores_the_matrix_once_and_refuses_an_untied_one(tmp_path):
    model, path = build(), tmp_path / "m.pth"
    state = model.state_dict()
    del state["lm_head.weight"]
    torch.save(state, path)
    loaded = build()
    load_weights(loaded, path)
    x = ids(1, 20)
    assert torch.equal(loaded(x).logits, model(x).logits)
    torch.save(build(tie_embeddings=False).state_dict(), path)
    assert "lm_head.weight" in weights_error(model, path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False}, {**MOE, "n_shared_experts": 1}])
def test_a_file_read_at_once_is_the_file_read_in_parts(tmp_path, dtype, shape):
    model, path = build(**shape), tmp_path / "m.pth"
    torch.save({name: value.to(dtype) for name, value in model.state_dict().items()}, path)
    whole, in_parts = open_weights(model, path), open_weights(model, path, lazily=True)
    loaded = build(**shape)
    load_weights(loaded, path)
    assert list(whole) == list(in_parts) == list(loaded.state_dict())
    for name, value in loaded.state_dict().items():
        assert whole[name].dtype == in_parts[name].dtype == dtype
        assert torch.equal(whole[name], in_parts[name][:])
        assert torch.equal(whole[name][1:3], in_parts[name][1:3])
        assert torch.equal(value, whole[name].float())
    assert loaded.lm_head.weight.data_ptr() != whole["lm_head.weight"].data_ptr()


def test_views_and_ties_of_a_file(tmp_path):
    """Tensors that share memory when they are saved, and one that is stored column by column."""
    model, path = build(tie_embeddings=False), tmp_path / "m.pth"
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"]
    both = torch.cat([state[name] for name in names])
    for name, part in zip(names, both.chunk(2), strict=True):
        state[name] = part
    gate = "model.layers.0.mlp.gate_proj.weight"
    state[gate] = state[gate].T.contiguous().T
    torch.save(state, path)
    loaded = build(tie_embeddings=False)
    load_weights(loaded, path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match=f"{gate} is stored in a form that cannot be read in part"):
        open_weights(model, path, lazily=True)


def test_what_no_model_has_is_refused(tmp_path):
    model, path = build(), tmp_path / "m.pth"
    for value in (torch.ones(32, dtype=torch.int64), torch.ones(32).to_sparse()):
        torch.save({**model.state_dict(), "model.norm.weight": value}, path)
        assert "model.norm.weight is of type" in weights_error(model, path)
    torch.save({**model.state_dict(), 5: torch.ones(2)}, path)
    assert "not a plain state dict" in weights_error(model, path)
    torch.save(model.state_dict(), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.pth", "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED)
    assert "compressed" in weights_error(model, tmp_path / "z.pth")


def test_which_weights_a_name_means(tmp_path):
    for age, name in enumerate(
        ["full_sft_64_moe", "full_sft_64", "full_sft_512", "pretrain_64", "full_sftx"]
    ):
        (tmp_path / f"{name}.pth").write_bytes(b"")
        os.utime(tmp_path / f"{name}.pth", (1000 + age, 1000 + age))
    assert newest_weights("full_sft", tmp_path).name == "full_sft_512.pth"
    assert newest_weights("full_sft_64", tmp_path).name == "full_sft_64.pth"
    assert newest_weights("pretrain", tmp_path).name == "pretrain_64.pth"
    assert newest_weights(str(tmp_path / "full_sftx.pth"), "elsewhere").name == "full_sftx.pth"
    with pytest.raises(ValueError, match="no such file"):
        newest_weights("./none.pth", tmp_path)
    with pytest.raises(ValueError, match="no dpo weights"):
        newest_weights("dpo", tmp_path)
