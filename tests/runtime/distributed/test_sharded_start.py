"""The start of a model that processes share: no process ever holds all of it, and the run is the
same."""

import json

import pytest
import torch
from conftest import conversations, curve, write_jsonl
from running import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import LMConfig
from model.lm import MiniMindLM

SIZES = {"dim": 128, "n_layers": 16, "n_heads": 4, "n_kv_heads": 2}
SHARED = ["--strategy=zero3", "--strategy=zero2", "--strategy=ddp --tensor_parallel=2"]
RUN = "--device=cpu --max_seq_len=64 --global_batch_size=8 --max_steps=4 --log_interval=1".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tokenizer):
    """What a run with the seed 42 begins with."""
    path = tmp_path_factory.mktemp("weights") / "start.pth"
    torch.manual_seed(42)
    model = MiniMindLM(LMConfig(**SIZES, vocab_size=len(tokenizer)))
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(model.config.to_json())
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    """A folder with untied weights of a Llama, as transformers writes it, and our tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 12}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**shape))
    theirs.save_pretrained(folder, max_shard_size="2MB")
    tokenizer.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder.with_suffix(".pth"))
    return folder


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("source", ["random", "file", "folder"])
def test_no_process_ever_holds_the_whole_model(shared, source, weights, llama):
    flags = [f"--from_weight={llama if source == 'folder' else weights}"]
    if source == "random":
        flags = ["--from_weight=none", *(f"--{name}={size}" for name, size in SIZES.items())]
    whole = llama.with_suffix(".pth") if source == "folder" else weights
    words = ["tests/share_model.py", whole, *shared.split(), "--device=cpu", "--ddp", *flags]
    printed = run_ranks(*words, nproc=2)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"peak')]
    assert len(lines) == 2
    for line in lines:  # its half, and at most one tensor more
        assert line["peak"] < line["size"] / 2 + line["largest"] * 1.1 < line["size"] * 0.85


def test_the_curve_is_that_of_one_process(llama, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", conversations(40))
    words = ["trainer/train_full_sft.py", *RUN, f"--data_path={data}", f"--from_weight={llama}"]
    words += [f"--cache_dir={tmp_path / 'cache'}", "--save_interval=0"]
    curves = []
    for number, shared in enumerate(["", *SHARED[::2]]):
        out, nproc = tmp_path / str(number), 2 if shared else None
        more = [*shared.split(), "--ddp"] if shared else []
        run_ranks(
            *words, *more, f"--out_dir={out}", f"--batch_size={8 // (nproc or 1)}", nproc=nproc
        )
        curves.append([line["loss"] for line in curve(out / "full_sft_64")])
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=0, abs=1e-6)
