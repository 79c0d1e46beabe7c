"""A model with what chatting with it needs: how its tokenizer and chat template spell a talk.

open_chat_model(path, device) -> ChatModel -> encode(messages) -> ids -> ... -> decode(reply ids)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.chat_format import ChatCoder
from dataset.text_encoder import TextEncoder, text_encoder
from dataset.tokenizer import LazyTokenizer
from model.lm import MiniMindLM
from model.weights import load_model
from runtime.device import choose_device, dtype_of
from runtime.kernel_loader import apply_kernels
from runtime.recorded_tokenizer import check_size, open_tokenizer

MAX_NEW_TOKENS = 256  # of a reply, where nothing else is said


@dataclass
class ChatModel:
    """What producing a reply needs."""

    model: MiniMindLM
    coder: ChatCoder | None  # None: plain text is continued
    decode: Callable[[list[int]], str]  # ids of a reply -> its text
    thinking: bool | None  # None: as the chat template does by itself
    sampling: dict  # arguments of MiniMindLM.stream
    plain: TextEncoder  # text that is no chat -> its ids
    tokenizer: LazyTokenizer

    def __post_init__(self) -> None:
        self.context = self.model.config.max_seq_len
        self.opening = ""  # of a reply, in the prompt already
        if self.coder:
            check_thinking(self.coder, self.thinking)
            self.end_of_turn = self.sampling["eos_token_id"] = self.coder.end_of_turn
            self.opening = self.coder.opening(self.thinking)

    def encode(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """The prompt ids of a conversation, up to where the model is to speak."""
        assert self.coder
        return self.coder.encode_prompt(messages, tools, self.thinking)

    def check(self, ids: list[int]) -> list[int]:
        """The ids of a prompt. ValueError: they leave no room for a reply."""
        if len(ids) >= self.context:
            sizes = f"{len(ids)} tokens, the context of the model is {self.context}"
            raise ValueError(f"the prompt makes {sizes}: shorten it")
        return ids


def open_device(name: str) -> torch.device:
    """The device of --device, for scripts on one process. ValueError: it is not there."""
    try:
        return torch.zeros(1, device=choose_device(name, ddp=False)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def open_chat_model(
    path: Path,
    device: torch.device,
    *,
    dtype: str | None = None,
    lora: Path | None = None,
    tokenizer_dir: str | None = None,
    chat_template: str | None = None,
    rope_scaling: str | None = None,
    device_map: str | None = None,
    max_memory: list[str] | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    sampling: dict | None = None,
) -> ChatModel:
    """Load weights, their tokenizer and, unless raw, its chat template.

    Args:
        path: a .pth file or a folder in Hugging Face's format.
        dtype: of weights and products; None: bfloat16 on a GPU, else float32.
        lora: an adapter to merge. The other flags are those of eval_model.py.
        raw: plain text is continued; a chat template is not needed.
        sampling: arguments of `MiniMindLM.stream`, without eos_token_id.

    Raises:
        ValueError: weights, adapter, tokenizer or template do not fit, and what to do.
    """
    dtype = dtype_of(dtype, device)
    if device_map:
        from runtime.device_map import load_spread

        model = load_spread(path, getattr(torch, dtype), max_memory)
    else:
        model = load_model(path)
    record = model.config.tokenizer
    if lora:
        from model.lora import merge_adapter

        record = merge_adapter(model, lora).tokenizer or record
    if rope_scaling:
        from model.rope import extend_context

        extend_context(model.config, rope_scaling)
    if not device_map:
        model = model.to(device, getattr(torch, dtype))
        apply_kernels(model, device, dtype)
    tokenizer, may_be_padded = open_tokenizer(path, record, tokenizer_dir, chat_template)
    check_size(tokenizer, model.config.vocab_size, may_be_padded)
    sampling = {"max_new_tokens": MAX_NEW_TOKENS} | (sampling or {})
    if raw:
        from dataset.pretrain_dataset import end_of_text

        plain, sampling["eos_token_id"] = text_encoder(tokenizer), end_of_text(tokenizer)
        return ChatModel(model, None, tokenizer.decode, None, sampling, plain, tokenizer)
    coder = ChatCoder(tokenizer)
    return ChatModel(model, coder, coder.decode_reply, thinking, sampling, coder.plain, tokenizer)


def check_thinking(coder: ChatCoder, thinking: bool | None) -> None:
    """ValueError: thinking is asked for, of a chat template that can turn none on."""
    if not thinking:
        return
    template = coder.readers[0].template
    if "enable_thinking" not in template.source:
        fault = f"{template.place} has no enable_thinking, so it can turn nothing on"
        raise ValueError(f"--thinking 1: {fault}; leave the flag out")
