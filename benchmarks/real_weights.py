"""A public model of a folder in Hugging Face's format: what transformers computes, we compute.

Logits and greedy answers to 20 prompts, in float32, with and without kernels, and the way out and
back again, bit by bit.

    python benchmarks/real_weights.py FOLDER        # of SmolLM2-135M-Instruct, for one
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.weights import load_model
from runtime.exports.hf_folder import export_hf
from runtime.exports.source import open_source
from runtime.kernel_loader import apply_kernels, report

PROMPTS = """
What is the capital of France?
Who wrote Romeo and Juliet?
Explain gravity to a child in two sentences.
Write a haiku about the sea.
List three primary colours.
What is 17 + 25?
Translate "good morning" into Spanish.
Why is the sky blue?
Give me a recipe for pancakes.
Write a Python function that reverses a string.
What does HTTP stand for?
Name the planets of the solar system.
Summarise the story of Cinderella in one paragraph.
What should I pack for a week at the beach?
How do plants make food?
Tell me a short joke.
What is the difference between a list and a tuple in Python?
Write a polite e-mail that declines an invitation.
你好，你是谁？
Who are you?
""".strip().splitlines()
LIMIT = 1e-5


@torch.no_grad()
def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of an answer")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    theirs = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
    turns = ([{"role": "user", "content": prompt}] for prompt in PROMPTS)
    prompts = [tokenizer.apply_chat_template(turn, **options) for turn in turns]
    end = {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": args.max_new_tokens}
    answers = [theirs.generate(ids, do_sample=False, **end)[0, ids.size(1) :] for ids in prompts]

    failed = 0
    for kernels in (False, True):
        model = load_model(args.folder)
        if kernels:
            apply_kernels(model, torch.device("cpu"), "float32")
        worst, same = 0.0, 0
        for ids, answer in zip(prompts, answers, strict=True):
            ours, expected = model(ids).logits, theirs(ids).logits
            worst = max(worst, ((ours - expected).abs().max() / expected.abs().max()).item())
            same += torch.equal(model.generate(ids, **end)[0], answer)
        print(f"{report() if kernels else 'plain PyTorch'}", flush=True)
        print(f"  logits: {worst:.1e} of the largest one; greedy answers: {same} of {len(prompts)}")
        failed += worst > LIMIT or same < len(prompts)

    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(args.folder)
        torch.save(source.state_dict(), f"{scratch}/w.pth")
        Path(f"{scratch}/w.json").write_text(source.config.to_json())
        back = open_source(f"{scratch}/w.pth", str(args.folder))
        export_hf(back.config, back.tensors, source.tokenizer, Path(scratch) / "hf")
        again = open_source(f"{scratch}/hf").tensors
        pairs = ((source.tensors[name][:], again[name][:]) for name in source.tensors)
        equal = sum(torch.equal(a.float(), b) for a, b in pairs)
        print(f"out and back again: {equal} of {len(again)} tensors bit-equal")
        failed += equal < len(again)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
