"""Whether a GGUF file says in llama.cpp what its weights say here: token ids and logits."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.progress import count_bar
from runtime.exports.ends import end_of_turn
from runtime.exports.source import Source

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
INSTALL = "pip install llama-cpp-python (which compiles llama.cpp: ten minutes and more)"
TEXTS = (
    "The capital of France is Paris, and it isn't far from here: 1,234 km.",
    "今天天气很好，我们去公园吧！你好，世界。",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\nprint(f(12345))\n",
    "Ünïcödé … “quotes”, tabs\tand   runs of spaces; e = mc², ¼ and Ⅷ.",
)
# Largest difference of a logit, as a share of the range of all; of the argmax they say nothing
LIMITS = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}


@dataclass(frozen=True)
class Figures:
    """What comparing some texts gave."""

    texts: int
    same_ids: int  # of the texts
    tokens: int
    same_argmax: int  # of the tokens
    difference: float  # the largest of a logit, over the range of its text's logits

    def __str__(self) -> str:
        return (
            f"token ids equal in {self.same_ids} of {self.texts} texts; argmax equal at"
            f" {self.same_argmax} of {self.tokens} tokens; logits differ by up to"
            f" {self.difference:.1e} of their range"
        )


def check_gguf(
    path: Path, source: Source, texts: Sequence[str] = TEXTS, python: str = sys.executable
) -> tuple[bool, Figures]:
    """Compare a GGUF file, in llama.cpp, with the weights that it was made of, in float32 here.

    Args:
        texts: a chat of each is compared, too, where the tokenizer has a template.
        python: the Python that has llama_cpp.

    Returns:
        Whether they are the same, as far as the type of its matrices allows; the figures.

    Raises:
        ValueError: llama.cpp is not installed, or cannot load the file; says what it says.
    """
    tokenizer, model = source.tokenizer, source.model()
    texts = list(texts)
    if end_of_turn(tokenizer) is not None:
        turns = ([{"role": "user", "content": text}] for text in list(texts))
        options = {"tokenize": False, "add_generation_prompt": True}
        texts += [tokenizer.apply_chat_template(turn, **options) for turn in turns]
    figures = compare(model, tokenizer, texts, run_llama_cpp(path, texts, python))
    exact = figures.same_ids == figures.texts
    limit = LIMITS[dtype_of(path)]
    same = figures.same_argmax == figures.tokens or limit > LIMITS["f32"]
    return exact and same and figures.difference <= limit, figures


def dtype_of(path: Path) -> str:
    """The type of a file's embedding: one of `gguf_file.DTYPES`."""
    from runtime.exports.gguf_file import import_gguf

    tensors = import_gguf().GGUFReader(path).tensors
    return next(t.tensor_type.name.lower() for t in tensors if t.name == "token_embd.weight")


@torch.no_grad()
def compare(
    model, tokenizer, texts: Sequence[str], theirs: Iterator[tuple[list[int], Tensor]]
) -> Figures:
    """Figures of one model: ours against (token ids, logits (T, vocab)) of each text elsewhere."""
    same_ids = tokens = same_argmax = 0
    difference = 0.0
    bar = count_bar(len(texts), "comparing", "texts")
    for text, (ids, logits) in zip(texts, theirs, strict=True):
        bar.update()
        same_ids += tokenizer.backend_tokenizer.encode(text).ids == ids
        ids = ids[: model.config.max_seq_len]
        vocab_size = model.config.vocab_size
        if logits.size(-1) < vocab_size or max(ids, default=0) >= vocab_size:
            difference = math.inf  # another model's vocabulary
            continue
        ours = model(torch.tensor([ids])).logits[0]
        logits = logits[: len(ids), : ours.size(-1)]
        same_argmax += int((ours.argmax(-1) == logits.argmax(-1)).sum())
        tokens += len(ids)
        worst = (ours - logits).abs().max() / (ours.max() - ours.min())
        difference = max(difference, worst.item())
    bar.close()
    return Figures(len(texts), same_ids, tokens, same_argmax, difference)


def run_llama_cpp(
    path: Path, texts: Sequence[str], python: str = sys.executable
) -> Iterator[tuple[list[int], Tensor]]:
    """Token ids and logits (T, vocab) float32 that llama.cpp gives for each text.

    In a process of its own: llama.cpp talks much, and ends its process where a file is wrong.

    Raises:
        ValueError: it is not installed, or it cannot load the file.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(WORKER), str(path), folder]
        given = json.dumps(list(texts))
        done = subprocess.run(command, input=given, capture_output=True, text=True)
        if "No module named 'llama_cpp'" in done.stderr:
            raise ValueError(f"llama.cpp is not installed: {INSTALL}")
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()
            line = next((word for word in said if "error" in word.lower()), said[-1])
            raise ValueError(f"{path}: llama.cpp cannot run it: {line[:300]}")
        all_ids = json.loads(done.stdout.splitlines()[-1])
        for n, ids in enumerate(all_ids):
            yield ids, torch.from_numpy(np.load(Path(folder) / f"{n}.npy"))
