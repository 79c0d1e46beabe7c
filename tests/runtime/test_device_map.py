"""Layers over several devices: CPU memory and disk here, the same logits and replies as whole."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from running import STAGE_SCRIPTS, run_script

from model.lm import LMConfig, MiniMindLM
from model.meta_device import on_meta_device
from model.weights import load_model
from runtime import device_map

pytest.importorskip("accelerate")

SHAPE = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
GENEROUS = 1 << 30


def save(folder, **fields) -> Path:
    config = LMConfig(**{**SHAPE, **fields})
    torch.manual_seed(0)
    model = MiniMindLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.1)
    path = folder / "toy_32.pth"
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(config.to_json())
    return path


def needed(config: LMConfig, blocks: int) -> int:
    """Bytes of float32 for embedding, norm, head and so many blocks."""
    with on_meta_device():
        model = MiniMindLM(config)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    rest = total - config.n_layers * block
    return 4 * (rest + blocks * (block + device_map.cache_values(config)))


@pytest.mark.parametrize("fields", ({}, {"tie_embeddings": False, "use_moe": True}))
def test_part_on_disk(fields, tmp_path):
    path = save(tmp_path, **fields)
    whole = load_model(path)
    limit = needed(whole.config, 2)  # one stays, the others are fetched into the place of a second
    model = device_map.load_spread(path, torch.float32, [f"cpu={limit}"])
    assert device_map.describe(model) == "blocks: 1 on cpu, 3 on disk"
    folder = Path(model.offload_folder.name)
    assert {file.name.split(".")[2] for file in folder.glob("*.dat")} == {"1", "2", "3"}
    assert all(p.is_meta for p in model.model.layers[1].parameters())

    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        assert torch.equal(model(ids).logits, whole(ids).logits)
    generated = model.generate(ids, max_new_tokens=8)
    assert torch.equal(generated, whole.generate(ids, max_new_tokens=8))
    del model
    gc.collect()
    assert not folder.exists()


def test_blocks_on_other_devices(tmp_path):
    """Two names of the CPU stand for two GPUs: layouts and caches go along, all ends on the first."""
    path = save(tmp_path, use_moe=True)
    whole, model = load_model(path), load_model(path)
    places = {"": "cpu", **{f"model.layers.{n}": "cpu:0" for n in range(4)}}
    places["model.layers.0"] = "disk"  # fetched, and computed on the first device
    device_map.keep_layout_near(model, places)
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    assert torch.equal(model(ids, mask).logits, whole(ids, mask).logits)
    ends = {"max_new_tokens": 8, "eos_token_id": int(whole.generate(ids, max_new_tokens=3)[0, 2])}
    assert torch.equal(model.generate(ids, mask, **ends), whole.generate(ids, mask, **ends))


def test_filling_devices():
    config = LMConfig(**SHAPE)
    with on_meta_device():
        model = MiniMindLM(config)
    fixed, first = needed(config, 0), needed(config, 1)
    block = first - fixed

    def place(**memory) -> str:
        sizes = {int(k[1:]) if k[0] == "g" else k: v for k, v in memory.items()}
        places = device_map.place_blocks(model, torch.float32, sizes)
        return " ".join(str(places[f"model.layers.{n}"]) for n in range(4))

    assert place(cpu=GENEROUS) == "cpu cpu cpu cpu"
    assert place(g0=fixed + 2 * block, g1=2 * block, cpu=GENEROUS) == "0 0 1 1"
    # Where blocks are fetched, there is room for one.
    assert place(g0=fixed + 2 * block, g1=block, cpu=block) == "0 1 cpu disk"
    assert place(cpu=first) == "disk disk disk disk"
    with pytest.raises(ValueError, match="embedding, head and one block take"):
        place(g0=first - 1, cpu=GENEROUS)


def test_chat(tmp_path):
    """eval_model.py says the same with it, whole or with a part on disk."""
    path = save(tmp_path)
    words = ["eval_model.py", "--weight", path, "--prompt", "hello", "--max_new_tokens", "8"]
    words += ["--device", "cpu"]
    plain = run_script(*words)
    limit = needed(LMConfig(**SHAPE), 2)
    spread = ["--device_map", "auto", "--max_memory", f"cpu={limit}"]
    there = run_script(*words, *spread, env={"TMPDIR": tmp_path})
    assert plain.returncode == there.returncode == 0, there.stderr
    assert plain.stdout == there.stdout and not there.stderr
    assert not list(tmp_path.glob("minimind_offload_*"))


@pytest.mark.parametrize(
    ("flags", "fault"),
    (
        (["--max_memory", "cpu=1GiB"], "--max_memory .*: must come with --device_map auto"),
        (["--device_map", "auto", "--lora", "x"], "--lora x: must not come with --device_map"),
        (["--device_map", "auto", "--max_memory", "cpu=much"], "--max_memory cpu=much: must be"),
        (["--device_map", "auto", "--max_memory", "7=1GiB"], "the devices here are .*cpu"),
        (["--device_map", "auto", "--max_memory", "cpu=1KiB"], "embedding, head and one block"),
    ),
)
def test_wrong_flags(flags, fault, tmp_path):
    path = save(tmp_path)
    done = run_script("eval_model.py", "--weight", path, "--prompt", "hello", *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert re.search(fault, done.stderr), done.stderr


@pytest.mark.parametrize("stage", STAGE_SCRIPTS)
def test_training_says_what_to_take_instead(stage):
    done = run_script(STAGE_SCRIPTS[stage], "--device_map", "auto")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch("error: --device_map is for eval_model.py: .* --strategy .*\n", done.stderr)


def test_without_accelerate(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match="pip install accelerate"):
        device_map.load_spread(save(tmp_path), torch.float32)
