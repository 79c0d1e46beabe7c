"""Whether a folder in Hugging Face's format says in transformers what its weights say here."""

from collections.abc import Iterator
from pathlib import Path

import torch

from model.hf import config_from_hf, read_hf_tensors
from runtime.exports.compare import TEXTS, compare
from runtime.exports.ends import end_of_turn
from runtime.exports.source import Source

LIMIT = 1e-4  # of the range of a text's logits; both sides compute in float32


@torch.no_grad()
def check_hf(folder: Path, source: Source) -> tuple[bool, list[str]]:
    """Compare tensors, token ids and logits.

    Weights are rounded as those of the folder are, so that all that is left is a fault.

    Returns:
        Whether they are the same; the figures, a line each.

    Raises:
        ValueError: the folder is damaged, or cannot be loaded.
    """
    config = config_from_hf(folder)
    lazy = read_hf_tensors(folder, config)
    model = source.model()
    equal, own = 0, dict(model.named_parameters())
    for name, value in own.items():
        if name in lazy and lazy[name].shape == value.shape:
            value.copy_(value.to(lazy[name].dtype))  # in the model itself
            equal += torch.equal(value, lazy[name][:].to(value.dtype))
    lines = [f"tensors: {equal} of {len(own)} equal"]
    same = equal == len(own) and len(lazy) == len(source.tensors)
    if (kind := described(folder)) == "MiniMindForCausalLM":
        lines.append(f"logits: not compared, transformers has no {kind} without its own code")
        return same, lines
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any of its parts
        raise ValueError(f"{folder}: transformers cannot load it: {first_line(error)}") from None
    texts = list(TEXTS)
    if end_of_turn(source.tokenizer) is not None:  # else none that is trained with
        chats = [chat_text(source.tokenizer, text) for text in TEXTS]
        texts += chats
        is_template = chats == [chat_text(tokenizer, text) for text in TEXTS]
        lines.append(f"chat template: {'the same' if is_template else 'DIFFERENT'}")
        same &= is_template

    def answers() -> Iterator[tuple[list[int], torch.Tensor]]:
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            yield ids, theirs(torch.tensor([ids[: source.config.max_seq_len]])).logits[0]

    figures = compare(model, source.tokenizer, texts, answers())
    lines.append(str(figures))
    same &= figures.same_ids == figures.texts and figures.same_argmax == figures.tokens
    return same and figures.difference <= LIMIT, lines


def described(folder: Path) -> str:
    from model.hf_config import FAMILIES, Keys, family

    return FAMILIES[family(Keys(folder / "config.json"))][0]


def chat_text(tokenizer, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
