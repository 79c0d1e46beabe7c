"""Prompts and replies: ids up to where the model is to speak, and the text of what it wrote."""

from collections.abc import Sequence

from dataset.chat_format import (
    END_THINK,
    IM_END,
    IM_START,
    THINK,
    ChatCoder,
    assistant_segments,
    encode_chats,
    encode_segments,
    render,
)


def encode_chat(
    messages: list[dict], tools: list[dict] | None, coder: ChatCoder, loss_on: str = "all"
) -> tuple[list[int], list[int]]:
    """Encode one conversation: (ids, mask), see `encode_chats`."""
    return encode_chats([(messages, tools)], coder, loss_on)[0]


def encode_prompt(
    messages: list[dict], tools: list[dict] | None, coder: ChatCoder, enable_thinking: bool = False
) -> list[int]:
    """Ids of a conversation up to where the assistant is to speak."""
    segments = [*render(messages, tools), (f"{IM_START}assistant\n", True, False)]
    if enable_thinking:
        segments += [(THINK, True, False), ("\n", True, False)]
    return encode_segments([segments], coder)[0][0]


def decode_reply(ids: Sequence[int], tokenizer) -> str:
    """What a model wrote, as text: all of it, up to its end-of-turn token; padding is left out.

    Markers such as <think> stay, whether this tokenizer calls them special or not.
    """
    end, ids = tokenizer.convert_tokens_to_ids(IM_END), list(ids)
    if end in ids:
        ids = ids[: ids.index(end)]
    ids = [token for token in ids if token != tokenizer.pad_token_id]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turn_text(message: dict) -> str:
    """An assistant turn as `decode_reply` gives it: thinking, content, tool calls."""
    return "".join(text for text, _ in assistant_segments(message))


def final_answer(text: str) -> str:
    """What a reply, or a reference answer, says behind its thinking, stripped."""
    return text.rpartition(END_THINK)[2].strip()
