"""The chat layout: four row formats in, token ids and loss masks out. Pure functions, no torch.

    row (MiniMind, ShareGPT, Alpaca, OpenAI) -> normalise_row -> messages, tools
    messages, tools -> encode_chats -> ids and a mask that is 1 on what the model has to say
    ids that a model wrote -> decode_reply -> text -> final_answer -> what is compared with a
    reference answer

One turn is `<|im_start|>{role}\\n{content}<|im_end|>\\n` with role system, user, assistant or tool.
A conversation is never tokenised as one string: `render` cuts it into control segments, which are
looked up by id, and text segments, which go through an encoder that does not know the control
tokens. So text that spells `<|im_end|>` stays text, and the mask is known while encoding. For
ordinary text the ids are those of `tokenizer.apply_chat_template` (template below).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dataset.chat_rows import detect_format, dump_json, normalise_row

__all__ = [
    "CHAT_TEMPLATE",
    "ChatCoder",
    "PlainEncoder",
    "chat_coder",
    "decode_reply",
    "detect_format",
    "encode_chat",
    "encode_chats",
    "encode_prompt",
    "final_answer",
    "normalise_row",
    "plain_encoder",
    "render",
    "turn_text",
]

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
MARKERS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)

TOOLS_HEAD = (
    "# Tools\n\nYou can call these functions, given as one JSON object per line:\n<tools>\n"
)
TOOLS_TAIL = "</tools>\n\nTo call a function, answer with its name and its arguments as JSON:\n"
TOOLS_SHAPE = '\n{"name": "...", "arguments": {...}}\n'

# The same layout for transformers and every server that reads a chat template; tests hold it equal
# to `render`.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' and messages[0].content -%}
        {{- messages[0].content + '\\n\\n' -}}
    {%- endif -%}
    {{- HEAD -}}
    {%- for tool in tools -%}
        {{- (tool | tojson) + '\\n' -}}
    {%- endfor -%}
    {{- TAIL -}}
    {{- '<tool_call>' + SHAPE + '</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content or '' -%}
    {%- if message.role == 'system' and loop.first and tools -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- content -}}
        {%- for tool_call in message.tool_calls or [] -%}
            {%- set call = tool_call.function or tool_call -%}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' + arguments -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking else '') -}}
{%- endif -%}
"""
for _name, _text in (("HEAD", TOOLS_HEAD), ("TAIL", TOOLS_TAIL), ("SHAPE", TOOLS_SHAPE)):
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_name, "'" + _text.replace("\n", "\\n") + "'")

# Public reasoning data keeps the thinking inside the content, in exactly this shape.
_THINKING = re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)


def render(
    messages: list[dict], tools: list[dict] | None = None, loss_on: str = "all"
) -> list[tuple[str, bool, bool]]:
    """Cut a conversation into segments (text, control, loss); the texts joined are the whole
    conversation.

    control: the text is a token or a turn header, to be looked up. loss: it belongs to an assistant
    turn to learn from, that is to its body or its <|im_end|>, not to its header nor to the newline
    behind it. A turn with "loss": False is not to be learned from.
    """
    if loss_on not in ("all", "last"):
        raise ValueError(f"loss_on must be 'all' or 'last', found {loss_on!r}")
    last = max(
        (n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1
    )
    if tools and messages[0]["role"] != "system":
        messages, last = [{"role": "system", "content": ""}, *messages], last + 1
    segments = []
    for n, message in enumerate(messages):
        role = message["role"]
        loss = role == "assistant" and (loss_on == "all" or n == last) and message.get("loss", True)
        segments.append((f"{IM_START}{role}\n", True, False))
        if role == "assistant":
            segments += [(text, control, loss) for text, control in _assistant_body(message)]
        elif tools and n == 0:
            segments += [
                (text, control, False) for text, control in _tools_body(message["content"], tools)
            ]
        else:
            segments.append((message["content"], False, False))
        segments += [(IM_END, True, loss), ("\n", True, False)]
    return segments


def _assistant_body(message: dict) -> list[tuple[str, bool]]:
    """[<think> block] content [<tool_call> blocks] as (text, control)."""
    content, thinking = message.get("content") or "", message.get("reasoning_content") or None
    if thinking is None and (match := _THINKING.fullmatch(content)):
        thinking, content = match.groups()
    body = []
    if thinking is not None:
        body += [(THINK, True), (f"\n{thinking}\n", False), (END_THINK, True)]
    text = ("\n\n" if body else "") + content
    for n, call in enumerate(message.get("tool_calls") or []):
        call = call.get("function") or call
        text += "\n" if content or n > 0 else ""
        shown = dump_json({"name": call["name"], "arguments": call["arguments"]})
        body += [(text, False), (TOOL_CALL, True), (f"\n{shown}\n", False), (END_TOOL_CALL, True)]
        text = ""
    return body + [(text, False)]


def _tools_body(system: str, tools: list[dict]) -> list[tuple[str, bool]]:
    """The system turn that offers tools. Its last two control tokens are the layout's own, never
    the row's."""
    listed = "".join(dump_json(tool) + "\n" for tool in tools)
    text = (system + "\n\n" if system else "") + TOOLS_HEAD + listed + TOOLS_TAIL
    return [(text, False), (TOOL_CALL, True), (TOOLS_SHAPE, False), (END_TOOL_CALL, True)]


@dataclass(frozen=True)
class PlainEncoder:
    """Text to ids, never to the id of an added token, whatever the text spells. Can be pickled."""

    backend: Tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]


def plain_encoder(tokenizer) -> PlainEncoder:
    """Copy a transformers tokenizer without its added tokens.

    Raises:
        ValueError: the tokenizer is not a BPE of the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"{type(tokenizer).__name__}: only fast BPE tokenizers are supported (Qwen, Llama 3,"
            " our own)"
        )
    # A token can be produced by the model only if the model lists it. So an added token that the
    # model lists as well leaves it too, with every merge that makes or uses it: then its id is out
    # of reach by construction.
    added = {token["content"] for token in spec["added_tokens"]}
    added_ids = {token["id"] for token in spec["added_tokens"]}
    model["vocab"] = {
        t: n for t, n in model["vocab"].items() if t not in added and n not in added_ids
    }
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [
        m for m in merges if all(t in model["vocab"] for t in (m[0], m[1], m[0] + m[1]))
    ]
    if model.get("unk_token") not in model["vocab"]:
        model["unk_token"] = None
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return PlainEncoder(Tokenizer.from_str(json.dumps(spec)))


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
            raise ValueError(
                f"the tokenizer has no {token} token: add it with tokenizer.add_special_tokens and"
                " resize the model's embedding, or use model/minimind_tokenizer"
            )
    roles = ("system", "user", "assistant", "tool")
    fixed = {f"{IM_START}{role}\n": [added[IM_START], *plain(f"{role}\n")] for role in roles}
    fixed.update({IM_END: [added[IM_END]], "\n": plain("\n")})
    fixed.update({token: [added[token]] for token in MARKERS if token in added})
    return ChatCoder(plain, fixed)


def encode_chats(
    chats: Sequence[tuple], coder: ChatCoder, loss_on: str = "all"
) -> list[tuple[list[int], list[int]]]:
    """Encode many conversations with one call of the tokenizer, which is what makes millions of
    rows quick.

    Args:
        chats: (messages, tools) as `normalise_row` gives them.
        coder: from `chat_coder`.
        loss_on: 'all' assistant turns or the 'last' one.

    Returns:
        (ids, mask) per conversation, of equal length; mask is 1 on every assistant body and its
        <|im_end|>.
    """
    return _encode([render(messages, tools, loss_on) for messages, tools in chats], coder)


def encode_chat(
    messages: list[dict], tools: list[dict] | None, coder: ChatCoder, loss_on: str = "all"
):
    """Encode one conversation: (ids, mask), see `encode_chats`."""
    return encode_chats([(messages, tools)], coder, loss_on)[0]


def encode_prompt(
    messages: list[dict], tools: list[dict] | None, coder: ChatCoder, enable_thinking: bool = False
):
    """Ids of a conversation up to where the assistant is to speak: list[int]."""
    segments = [*render(messages, tools), (f"{IM_START}assistant\n", True, False)]
    if enable_thinking:
        segments += [(THINK, True, False), ("\n", True, False)]
    return _encode([segments], coder)[0][0]


def _encode(
    rendered: list[list[tuple[str, bool, bool]]], coder: ChatCoder
) -> list[tuple[list[int], list[int]]]:
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
    """What a model has to write for an assistant turn, as `decode_reply` gives it: thinking,
    content, tool calls."""
    return "".join(text for text, _ in _assistant_body(message))


def final_answer(text: str) -> str:
    """What a reply, or a reference answer, says behind its thinking, without the space around
    it."""
    return text.rpartition(END_THINK)[2].strip()
