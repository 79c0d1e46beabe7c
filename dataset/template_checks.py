"""Conversations that are encoded at the start, to compare with `apply_chat_template` id by id."""


def _turns(*texts: str, system: str | None = None) -> list[dict]:
    """Turns of the user and the assistant, behind a system turn where there is one."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    for n, text in enumerate(texts):
        turns.append({"role": ("user", "assistant")[n % 2], "content": text})
    return turns


CALL = {
    "type": "function",
    "id": "call12345",
    "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" of a city.',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
ASKED = [
    *_turns("How warm is it?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "21 degrees"},
]
THOUGHT = {"role": "assistant", "content": "42.", "reasoning_content": "6 times 7\n\nis 42."}

BATTERY: list[tuple[list[dict], list | None]] = [
    (_turns("Hello", "Hi, how can I help?"), None),
    (_turns("a", "b", "What is 2+2?", "4\n", "Danke, schön!", "Gern: 你好。"), None),
    (_turns("Hello", "Hi!", "And?", "Yes.", system="Be brief."), None),
    (_turns("\n two\n\nlines \n", " \n\ncode:\n```\n\tx = 1\n```\n\n", "  ", "ok"), None),
    (_turns("12", "", system=""), None),
    ([*_turns("6 x 7?"), THOUGHT, *_turns("Why?"), THOUGHT], None),
    ([*_turns("6 x 7?"), {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}], None),
    ([*ASKED, *_turns("", "It is 21 degrees.")[1:]], [TOOL]),
    (_turns("Hello", "Hi!", system="Be brief."), [TOOL]),
]


def check_battery(reader, tool_reader, tokenizer) -> None:
    """Compare what template readers read with the tokenizer's own `apply_chat_template`.

    A conversation that the template refuses is none to compare: a row like it is refused, too.

    Raises:
        ValueError: an id differs, and where.
    """
    for messages, tools in BATTERY:
        of = tool_reader if tools else reader
        try:
            chat = of.read(messages, tools)
            prompt = of.read(messages[:-1], tools, add_generation_prompt=True)
        except ValueError:
            continue
        _compare(chat, of, tokenizer, messages, tools)
        _compare(prompt, of, tokenizer, messages[:-1], tools, add_generation_prompt=True)


def _compare(chat, reader, tokenizer, messages, tools, **flags) -> None:
    # The text is that of our sandbox: transformers' has no budget
    ids, text = reader.encoder(chat.text), reader.template.render(messages, tools, **flags)
    expected = tokenizer.apply_chat_template(
        messages, chat_template="{{ text }}", text=text, return_dict=False
    )
    if ids == expected:
        return
    pairs = enumerate(zip(ids, expected, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(ids), len(expected)))
    found, wanted = (tokenizer.convert_ids_to_tokens(row[at : at + 3]) for row in (ids, expected))
    where = f"token {at} of a conversation of {len(messages)} turns is {found}"
    fault = f"{where}, apply_chat_template gives {wanted}"
    place = reader.template.place
    raise ValueError(f"{place}: {fault}: this tokenizer with this template is not supported")
