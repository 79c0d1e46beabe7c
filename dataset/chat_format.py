"""The chat layout: messages -> token ids and a loss mask. Pure functions, no torch.

    row (MiniMind, ShareGPT, Alpaca, OpenAI) -> chat_rows.normalise_row -> messages, tools
    messages, tools -> encode_chats -> ids and a mask that is 1 on what the model has to say
    ids that a model wrote -> replies.decode_reply -> text

One turn is `<|im_start|>{role}\\n{content}<|im_end|>\\n` with role system, user, assistant or tool.
A conversation is never tokenised as one string: `render` cuts it into control segments, which are
looked up by id, and text segments, which go through an encoder that does not know the control
tokens. So text that spells `<|im_end|>` stays text, and the mask is known while encoding. For
ordinary text the ids are those of `tokenizer.apply_chat_template` (`chat_template.py`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.tokenizer import PlainEncoder, plain_encoder

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
MARKERS = (THINK, END_THINK, "<tool_call>", "</tool_call>")

# Public reasoning data keeps the thinking inside the content, in exactly this shape.
_THINKING = re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)


def render(
    messages: list[dict], tools: list[dict] | None = None, loss_on: str = "all"
) -> list[tuple[str, bool, bool]]:
    """Cut a conversation into segments (text, control, loss); their texts joined are all of it.

    control: the text is a token or a turn header, to be looked up. loss: it belongs to an assistant
    turn to learn from, that is to its body or its <|im_end|>, not to its header nor to the newline
    behind it. A turn with "loss": False is not to be learned from.
    """
    if loss_on not in ("all", "last"):
        raise ValueError(f"loss_on must be 'all' or 'last', found {loss_on!r}")
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    last = max((n for n, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    segments = []
    for n, message in enumerate(messages):
        role, loss = message["role"], False
        segments.append((f"{IM_START}{role}\n", True, False))
        if role == "assistant":
            loss = (loss_on == "all" or n == last) and message.get("loss", True)
            segments += [(text, control, loss) for text, control in assistant_segments(message)]
        elif tools and n == 0:
            from dataset.tools import tools_segments

            system = tools_segments(message["content"], tools)
            segments += [(text, control, False) for text, control in system]
        else:
            segments.append((message["content"], False, False))
        segments.append((IM_END, True, loss))
        segments.append(("\n", True, False))
    return segments


def assistant_segments(message: dict) -> list[tuple[str, bool]]:
    """[<think> block] content [<tool_call> blocks] as (text, control)."""
    content = message.get("content") or ""
    thinking = message.get("reasoning_content") or None
    if thinking is None and (match := _THINKING.fullmatch(content)):
        thinking, content = match.groups()
    segments, text = [], content
    if thinking is not None:
        segments = [(THINK, True), (f"\n{thinking}\n", False), (END_THINK, True)]
        text = f"\n\n{content}"
    if calls := message.get("tool_calls"):
        from dataset.tools import call_segments

        return [*segments, *call_segments(calls, text, bool(content))]
    return [*segments, (text, False)]


@dataclass(frozen=True)
class ChatCoder:
    """What encoding a chat needs of a tokenizer. Can be pickled.

    plain: encodes the text segments. fixed: ids of the control segments by their text; a marker
    such as <think> that is no token of a foreign tokenizer is missing here and is encoded as text.
    """

    plain: PlainEncoder
    fixed: dict[str, list[int]]


def chat_coder(tokenizer) -> ChatCoder:
    """Look up once what every conversation needs.

    Raises:
        ValueError: the tokenizer lacks <|im_start|> or <|im_end|>, or is not a fast BPE.
    """
    plain, added = plain_encoder(tokenizer), tokenizer.get_added_vocab()
    for token in (IM_START, IM_END):
        if token not in added:
            advice = "add it with tokenizer.add_special_tokens and resize the model's embedding"
            ours = "use model/minimind_tokenizer"
            raise ValueError(f"the tokenizer has no {token} token: {advice}, or {ours}")
    roles = ("system", "user", "assistant", "tool")
    fixed = {f"{IM_START}{role}\n": [added[IM_START], *plain(f"{role}\n")] for role in roles}
    fixed.update({IM_END: [added[IM_END]], "\n": plain("\n")})
    fixed.update({token: [added[token]] for token in MARKERS if token in added})
    return ChatCoder(plain, fixed)


def encode_chats(
    chats: Sequence[tuple], coder: ChatCoder, loss_on: str = "all"
) -> list[tuple[list[int], list[int]]]:
    """Encode many conversations with one call of the tokenizer, which makes millions of rows quick.

    Args:
        chats: (messages, tools) as `normalise_row` gives them.
        loss_on: 'all' assistant turns or the 'last' one.

    Returns:
        (ids, mask) per conversation, of equal length; mask is 1 on every assistant body and its
        <|im_end|>.
    """
    return encode_segments([render(messages, tools, loss_on) for messages, tools in chats], coder)


def encode_segments(
    rendered: list[list[tuple[str, bool, bool]]], coder: ChatCoder
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of conversations that `render` has cut into segments."""
    texts, plans = [], []  # a plan lists (ids, or the index of a text; loss)
    for segments in rendered:
        plan = []
        for text, control, loss in segments:
            ids = coder.fixed.get(text) if control else None
            if ids is not None:
                plan.append((ids, loss))
            elif plan and isinstance(plan[-1][0], int):  # beside a marker that is no token here
                texts[-1] += text
            elif text:
                plan.append((len(texts), loss))
                texts.append(text)
        plans.append(plan)
    encoded = coder.plain.batch(texts)
    chats = []
    for plan in plans:
        ids, mask = [], []
        for part, loss in plan:
            part = encoded[part] if isinstance(part, int) else part
            ids += part
            mask += [int(loss)] * len(part)
        chats.append((ids, mask))
    return chats
