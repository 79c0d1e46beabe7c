"""LoRA: start and merging, adapter files, peft's logits, runs that train the adapter alone."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import RUN_FLAGS, SIZES, check_same_run, checkpoint_tensors, curve
from running import run_ranks, run_script
from stage_runs import resumed_three_times, same_bits

from model.lm import LMConfig, MiniMindLM
from model.lora import (
    TARGETS,
    LoRALinear,
    adapter_json,
    adapter_tensors,
    add_lora,
    merge_adapter,
    write_peft,
)
from model.weight_hash import hash_weights
from model.weights import load_model

PLAIN = {"targets": None, "rank": 4, "alpha": 8.0, "dropout": 0.0}


def make_model(**options) -> MiniMindLM:
    return MiniMindLM(LMConfig(**{**SIZES, "vocab_size": 100, "max_seq_len": 32, **options}))


def write_base(model, path):
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(model.config.to_json())
    return path


def write_adapter(model, settings, path):
    """An adapter as if it were trained: B is not zero any more."""
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.05)
    torch.save(adapter_tensors(model.state_dict()), path)
    path.with_suffix(".json").write_text(adapter_json(model.config, settings))
    return path


@pytest.fixture
def ids():
    return torch.randint(100, (2, 12))


# --------------------------------------------------------------------------------------------------
# The layers and the files
# --------------------------------------------------------------------------------------------------


def test_starts_as_the_base_model_and_trains_nothing_else(ids):
    model = make_model().eval()
    expected, before = (
        model(ids).logits,
        {name: p.clone() for name, p in model.state_dict().items()},
    )
    settings = add_lora(model, **PLAIN)
    assert settings["targets"] == [*TARGETS] and settings["base_sha256"] == hash_weights(before)
    assert torch.equal(model(ids).logits, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert (
        trained == [name for name in model.state_dict() if ".lora_" in name]
        and len(trained) == 2 * 7 * 2
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(3):
        model.train()(ids).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.allclose(model.eval()(ids).logits, expected, atol=1e-3)


def test_update_is_the_formula():
    """Eq. 3: W x + alpha / rank B A x, and dropout on the way to A alone."""
    base = torch.nn.Linear(8, 6, bias=False)
    layer, x = LoRALinear(base, 3, 6.0, 0.5), torch.randn(5, 8)
    torch.nn.init.normal_(layer.lora_B)
    update = layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.eval()(x), x @ (base.weight + 2 * update).T, atol=1e-5)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.allclose(layer.train()(x), x @ base.weight.T + 2 * dropped @ update.T, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False},
        {"use_moe": True, "n_shared_experts": 1},
        {"qk_norm": False, "qkv_bias": True},
    ],
)
def test_merged_weights_are_the_same_model(ids, tmp_path, options):
    model = make_model(**options).eval()
    base = write_base(model, tmp_path / "base.pth")
    adapter = write_adapter(model, add_lora(model, **PLAIN), tmp_path / "lora.pth")
    merged = load_model(base)
    plain = merged(ids).logits
    merge_adapter(merged, adapter)
    assert merged.state_dict().keys() == torch.load(base, weights_only=True).keys()
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, plain, atol=1e-3)


def test_an_adapter_brings_its_positions_and_fits_whatever_the_tokenizer_is_called(ids, tmp_path):
    """Trained with --rope_scaling on a base that knows nothing of it."""
    model = make_model().eval()
    base = write_base(model, tmp_path / "base.pth")
    scaling = {"rope_type": "linear", "factor": 4.0}
    model.config = replace(model.config, rope_scaling=scaling, max_seq_len=128)
    model.config.tokenizer = {"folder": "elsewhere", "sha256": "0", "chat_template": None}
    adapter = write_adapter(model, add_lora(model, **PLAIN), tmp_path / "lora.pth")
    merged = load_model(base)
    merge_adapter(merged, adapter)
    assert merged.config.rope_scaling == scaling and merged.config.max_seq_len == 128
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_peft_loads_the_adapter(ids, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="pip install peft")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = make_model().eval()
    c = model.config
    theirs = Qwen3Config(
        hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, vocab_size=c.vocab_size,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, intermediate_size=c.hidden_dim,
        tie_word_embeddings=True, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    exported = Qwen3ForCausalLM(theirs).eval()
    exported.load_state_dict(model.state_dict())
    settings = add_lora(model, **{**PLAIN, "targets": targets, "dropout": 0.1})
    adapter = write_adapter(model, settings, tmp_path / "lora.pth")
    write_peft(adapter, tmp_path / "peft", "base")
    with torch.no_grad():
        ours, plain = model(ids).logits, exported(ids).logits
        adapted = peft.PeftModel.from_pretrained(exported, tmp_path / "peft")
        assert torch.allclose(adapted(ids).logits, ours, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize(
    "options, settings, message",
    [
        ({}, {"rank": 0}, "--lora_rank 0: must be at least 1"),
        ({}, {"alpha": 0.0}, "--lora_alpha 0.0: must be positive"),
        ({}, {"dropout": 1.0}, r"--lora_dropout 1.0: must lie in \[0, 1\)"),
        (
            {},
            {"targets": ["q_proj", "wq"]},
            "--lora_targets wq: the blocks of this model have q_proj k_proj v_proj",
        ),
        ({}, {"targets": ["lm_head"]}, "--lora_targets lm_head: the blocks"),
        (
            {"use_moe": True},
            {"targets": ["gate_proj"]},
            "routed experts are stacked tensors, which LoRA does not",
        ),
        ({"use_moe": True}, {"targets": ["gate"]}, "--lora_targets gate: the blocks"),
    ],
)
def test_settings_that_cannot_be(options, settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make_model(**options), **{**PLAIN, **settings})


def test_a_mixture_has_its_attention_and_shared_expert_adapted():
    model = make_model(use_moe=True)
    assert add_lora(model, **PLAIN)["targets"] == [*TARGETS[:4]]
    assert add_lora(make_model(use_moe=True, n_shared_experts=1), **PLAIN)["targets"] == [*TARGETS]


def test_an_adapter_of_something_else(tmp_path):
    model = make_model()
    base = write_base(model, tmp_path / "base.pth")
    adapter = write_adapter(model, add_lora(model, **PLAIN), tmp_path / "lora.pth")

    def error(onto) -> str:
        with pytest.raises(ValueError) as caught:
            merge_adapter(onto, adapter)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(ValueError, match="lora.pth: an adapter: name its base model here"):
        load_model(adapter)
    assert "an adapter for a model of another shape: dim 32, here 64, head_dim 8," in error(
        make_model(dim=64)
    )
    assert "an adapter for another base: it was trained on other weights" in error(make_model())
    tensors = torch.load(adapter, weights_only=True)
    torch.save({name: value[:1] for name, value in tensors.items()}, adapter)
    assert (
        "mlp.down_proj is (32, 128), which does not fit rank 4, B (1, 4) and A (1, 128)"
        in error(load_model(base))
    )
    torch.save(dict(list(tensors.items())[:2]), adapter)
    assert "its tensors are not those of the layers q_proj" in error(load_model(base))
    adapter.write_bytes(b"torn")
    assert "not a weights file" in error(load_model(base))
    shutil.copy(base.with_suffix(".json"), adapter.with_suffix(".json"))
    assert "it has no LoRA settings" in error(load_model(base))


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

RUN = (
    "--lora_rank=4 --learning_rate=3e-3 --epochs=2 --global_batch_size=4 --replica_check=1"
    " --eval_ratio=0.1".split()
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """Weights to start from, dense and MoE."""
    folder, paths = tmp_path_factory.mktemp("bases"), {}
    for use_moe in (0, 1):
        torch.manual_seed(use_moe)
        model = make_model(
            vocab_size=len(tokenizer),
            max_seq_len=128,
            use_moe=bool(use_moe),
            n_shared_experts=use_moe,
        )
        for p in model.parameters():  # far from symmetry
            torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
        paths[use_moe] = write_base(model, folder / f"base_{use_moe}.pth")
    return paths


@pytest.fixture(scope="module")
def train(job, bases):
    def run(name, *flags, use_moe=0, **options):
        flags = [*RUN, f"--from_weight={bases[use_moe]}", f"--use_moe={use_moe}", *flags]
        return job(
            name, 90, *flags, f"--n_shared_experts={use_moe}", script="train_lora", **options
        )

    return run


@pytest.fixture(scope="module")
def one(train):
    return train("one", "--batch_size=2", "--max_steps=20")


@pytest.mark.parametrize(
    "strategy, batch_size", [("ddp", 2), ("ddp", 1), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_two_ranks_are_one_process(train, one, bases, job, strategy, batch_size):
    name = f"{strategy}_{batch_size}"
    flags = [
        *RUN_FLAGS,
        *RUN,
        f"--from_weight={bases[0]}",
        f"--out_dir={job.folder / name}",
        "--max_steps=20",
    ]
    flags += [
        f"--data_path={job.data[90]}",
        f"--cache_dir={job.folder / 'cache'}",
        f"--strategy={strategy}",
        "--ddp",
    ]
    printed = run_ranks(
        "tests/watch_frozen.py",
        "trainer/train_lora.py",
        *flags,
        f"--batch_size={batch_size}",
        nproc=2,
    )
    check_same_run(job.folder / name / "lora_32", one)
    state = torch.load(bases[0], weights_only=True)
    assert {*re.findall("frozen weights (.*)", printed)} == {hash_weights(state)}


def test_checkpoints_and_weights_hold_the_adapter_alone(one):
    names = [
        name.removeprefix("model.")
        for name in checkpoint_tensors(next((one / "checkpoints").glob("step_*")))
    ]
    assert all(
        name.endswith((".lora_A", ".lora_B")) for name in names if not name.startswith("optimizer.")
    )
    assert all(".lora_" in name for name in names)
    weights = torch.load(f"{one}.pth", weights_only=True)
    assert {*weights} == {name for name in names if not name.startswith("optimizer.")} and len(
        weights
    ) == 2 * 7 * 2
    losses = [line["loss"] for line in curve(one) if "loss" in line]
    assert losses[-1] < losses[0] - 0.2


def test_mixture_on_two_ranks(train, bases):
    reference = train("moe", "--batch_size=4", "--max_steps=6", use_moe=1)
    check_same_run(
        train("moe_2", "--strategy=zero3", "--batch_size=1", "--max_steps=6", use_moe=1, nproc=2),
        reference,
    )
    assert all(line["aux_loss"] > 0 for line in curve(reference) if "loss" in line)
    merge_adapter(load_model(bases[1]), f"{reference}.pth")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(train, one, dtype):
    lines = [
        line for line in curve(train(dtype, f"--dtype={dtype}", "--max_steps=4")) if "loss" in line
    ]
    expected = [line["loss"] for line in curve(one) if "loss" in line][:4]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=0.02)


def test_three_resumes_are_bit_identical(train, one):
    flags = ["--dropout=0.1", "--lora_dropout=0.1", "--optimizer=muon", "--batch_size=4"]
    same_bits(
        resumed_three_times(train, *flags),
        train("whole", *flags, "--save_interval=2", "--max_steps=8"),
    )


def test_another_base_is_another_run(job, one, bases, tmp_path):
    """Also: exit code and line of a user's mistake, and nothing half-written."""
    torch.manual_seed(7)
    other = write_base(
        make_model(vocab_size=load_model(bases[0]).config.vocab_size), tmp_path / "other.pth"
    )
    flags = [
        *RUN_FLAGS,
        *RUN,
        "--batch_size=2",
        f"--data_path={job.data[90]}",
        f"--cache_dir={job.folder / 'cache'}",
    ]
    resume = [
        "--max_steps=20",
        f"--out_dir={one.parent}",
        f"--from_weight={other}",
        "--resume=auto",
    ]
    done = run_script("trainer/train_lora.py", *flags, *resume)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(
        "error: --resume .*: this is another run: the weights of --from_weight was", done.stderr
    )
    done = run_script("trainer/train_lora.py", *flags, f"--out_dir={tmp_path / 'new'}")
    assert (
        done.returncode == 2
        and "full_sft_32.pth: no such weights file; train that stage first" in done.stderr
    )
    assert not (tmp_path / "new").exists() or not [*(tmp_path / "new").glob("*")]


def test_adapter_in_chat_scoring_and_export(one, bases, tmp_path):
    names = [f"--lora={one}.pth", f"--weight={bases[0]}"]
    merged = tmp_path / "merged.pth"
    run_ranks("scripts/convert.py", "merge", bases[0], merged, names[0])
    run_ranks("scripts/convert.py", "to-hf", bases[0], tmp_path / "peft", names[0], "--peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["r"] == 4
    rows = [{"conversations": [{"role": "user", "content": "what is it"}], "answer": "yes"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = []
    for n, flags in enumerate((names, [f"--weight={merged}"], [f"--weight={bases[0]}"])):
        flags = [
            *flags,
            f"--eval_file={tmp_path / 'q.jsonl'}",
            f"--eval_out={tmp_path / str(n)}",
            "--device=cpu",
        ]
        run_ranks("eval_model.py", *flags, "--max_new_tokens=8")
        replies.append(json.loads((tmp_path / str(n)).read_text())["reply"])
    assert replies[0] == replies[1] != replies[2]
