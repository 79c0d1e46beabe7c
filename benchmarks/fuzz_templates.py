"""Random conversations in chat templates of many kinds: ids and masks against transformers.

For each template of `chat_templates.py` (or for the tokenizer in a folder, with --tokenizer_dir):
ids must equal those of `apply_chat_template`, the mask must cover each assistant turn with its
end-of-turn token and nothing else, and contents that spell every added token must give not one
control id more than harmless ones. What a template refuses must be refused.

    python benchmarks/fuzz_templates.py --cases 300
    python benchmarks/fuzz_templates.py --tokenizer_dir FOLDER --cases 300
"""

import argparse
import contextlib
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.chat_templates import CASES, case_tokenizer
from dataset.chat_format import ChatCoder
from dataset.template_checks import BATTERY
from dataset.template_layout import stand_in
from dataset.text_encoder import is_control

WORDS = (
    "hello you the moon 42 3.14 user assistant system tool 你好 世界 schön naïve 😀 👩‍👩‍👧 e\u0301 ﬁ"
    " don't I'm `code` def f(x): return [1] {a} \"quoted\" 'single' back\\slash a|b <b> & % $ # --"
    " INST im_end think end_of_turn www.x.org A's ． … é\u200d"
).split()
GAPS = ("", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "    ", "\n\n\n")


@dataclass
class Result:
    """What came of the conversations of one template."""

    equal: int = 0
    refused: Counter = field(default_factory=Counter)  # by both, or by us with a reason
    hostile: int = 0
    faults: list[str] = field(default_factory=list)


def text(rng: random.Random, tokens: list[str] = ()) -> str:
    """A text, perhaps empty, perhaps with white space at its ends; spells these tokens."""
    parts = []
    for _ in range(rng.choice((0, 1, 2, 3, 6, 15))):
        spelled = tokens and rng.random() < 0.5
        parts += [rng.choice(tokens if spelled else WORDS), rng.choice(GAPS)]
    lead = rng.choice(GAPS) if rng.random() < 0.2 else ""
    joined = lead + "".join(parts)
    return joined if rng.random() < 0.5 else joined.rstrip()


def call(rng: random.Random, tokens: list[str]) -> dict:
    keys = ["city", "n", *tokens[:2]]
    values = [text(rng, tokens), rng.randint(-9, 9), None, True, [text(rng, tokens), 1.5]]
    arguments = {rng.choice(keys): rng.choice(values) for _ in range(rng.randint(0, 3))}
    function = {"name": rng.choice(["search", "weather", *tokens[:3]]), "arguments": arguments}
    return {"type": "function", "id": f"call{rng.randint(10000, 99999)}", "function": function}


def tool(rng: random.Random, tokens: list[str]) -> dict:
    described = {"type": "string", "description": text(rng, tokens)}
    parameters = {"type": "object", "properties": {"city": described}, "required": ["city"]}
    name = rng.choice(["search", "weather"])
    function = {"name": name, "description": text(rng, tokens), "parameters": parameters}
    return {"type": "function", "function": function}


def conversation(
    rng: random.Random, fields: tuple[str, ...], tokens: list[str] = ()
) -> tuple[list[dict], list[dict] | None]:
    """A conversation as `normalise_row` gives it, which ends with an assistant turn.

    Args:
        fields: what it may have: system, tools, thinking.
        tokens: its texts spell them.
    """
    messages = []
    if "system" in fields and rng.random() < 0.4:
        messages.append({"role": "system", "content": text(rng, tokens)})
    tools = None
    if "tools" in fields and rng.random() < 0.4:
        tools = [tool(rng, tokens) for _ in range(rng.randint(1, 2))]
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text(rng, tokens)})
        if tools and rng.random() < 0.5:
            calls = [call(rng, tokens) for _ in range(rng.choice((1, 1, 2)))]
            content = text(rng, tokens) if rng.random() < 0.2 else ""
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            for made in calls:
                known = {"name": made["function"]["name"], "tool_call_id": made["id"]}
                messages.append({"role": "tool", "content": text(rng, tokens), **known})
        answer = {"role": "assistant", "content": text(rng, tokens)}
        if "thinking" in fields and rng.random() < 0.4:
            answer["reasoning_content"] = text(rng, tokens)
        messages.append(answer)
    return messages, tools


def expected_mask(
    tokenizer, messages: list[dict], tools: list | None, head: str, ends: tuple[str, ...]
) -> list[int]:
    """1 on every token that reaches into what stands between a head and the end token behind it.

    Args:
        head: a pattern; contents do not match it, nor do they spell an end token.
    """
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    added = tokenizer.added_tokens_decoder
    mask, at = [0] * len(encoded.input_ids), 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        begins = re.compile(head).search(whole, at)
        if not begins:
            return []
        begin = begins.end()
        stops = [(n, end) for end in ends if (n := whole.find(end, begin)) >= 0]
        at = min(stops)[0] + len(min(stops)[1])
        for n, (first, last) in enumerate(encoded.offset_mapping):
            behind = first < begin and encoded.input_ids[n] in added
            if last > begin and first < at and not behind:
                mask[n] = 1
    return mask


def check_ordinary(
    coder: ChatCoder, chat: tuple, head: str, ends: tuple[str, ...], result: Result
) -> None:
    messages, tools = chat
    apply = coder.tokenizer.apply_chat_template
    try:
        expected = apply(messages, tools=tools, return_dict=False)
    except Exception as error:  # whatever a template raises
        expected, reason = None, f"the template's own: {error}"
    try:
        ids, mask = coder.encode_chats([chat])[0]
    except ValueError as error:
        reason = re.sub(r"turn \d+", "turn N", str(error)) if expected else reason
        reason = re.sub(r"it writes .*", "it writes ...", reason)
        result.refused[reason] += 1
        return
    if ids != expected:
        result.faults.append(f"ids differ: {messages} {tools}: {ids} {expected}")
    elif mask != expected_mask(coder.tokenizer, messages, tools, head, ends):
        result.faults.append(f"mask differs: {messages} {tools}")
    else:
        result.equal += 1
    cut = next(n for n, m in enumerate(messages) if m["role"] == "assistant")
    try:
        expected = apply(messages[:cut], tools=tools, return_dict=False, add_generation_prompt=True)
        if coder.encode_prompt(messages[:cut], tools) != expected:
            result.faults.append(f"the prompt's ids differ: {messages[:cut]} {tools}")
    except ValueError as error:
        result.refused[f"prompt: {error}"[:90]] += 1


def harmless(value, tokens: list[str]):
    """A conversation without the spelling of these tokens."""
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, "".join(f"{c}\u2060" for c in token if c.strip()))
        return value
    if isinstance(value, dict):
        return {harmless(k, tokens): harmless(item, tokens) for k, item in value.items()}
    return [harmless(item, tokens) for item in value] if isinstance(value, list) else value


def check_hostile(coder: ChatCoder, chat: tuple, tokens: list[str], result: Result) -> None:
    """Contents that spell control tokens give the control ids that others give."""
    control = set(coder.plain.ids.values())
    found = []
    for messages, tools in (chat, (harmless(chat[0], tokens), harmless(chat[1], tokens))):
        try:
            ids = coder.encode_chats([(messages, tools)])[0][0]
            if any(
                "<think>" in (m["content"] or "")[:20] for m in messages if m["role"] == "assistant"
            ):
                return  # thinking is control text
            found.append([n for n in ids if n in control])
        except ValueError:
            return
    result.hostile += 1
    if found[0] != found[1]:
        result.faults.append(f"control ids from content: {chat}: {found}")


def fuzz(coder: ChatCoder, fields, head: str, ends: tuple[str, ...], cases: int, seed: int):
    """Check `cases` ordinary conversations, and as many that spell control tokens."""
    rng, result = random.Random(seed), Result()
    added = [t for t in coder.tokenizer.added_tokens_decoder.values()]
    tokens = [t.content for t in added if is_control({"special": t.special, "content": t.content})]
    shapes = ["<|im_end|>", "[INST]", "</s>", "<think>\n", "</think>\n\n", stand_in(0)]
    for _ in range(cases):
        check_ordinary(coder, conversation(rng, fields), head, ends, result)
        check_hostile(coder, conversation(rng, fields, tokens + shapes), tokens, result)
    return result


def show(name: str, result: Result, seconds: float) -> None:
    refused = sum(result.refused.values())
    counts = f"{result.equal} equal, {refused} refused, {result.hostile} hostile"
    print(f"{name:15} {counts}, {len(result.faults)} faults, {seconds:.1f} s")
    for reason, count in result.refused.most_common(6):
        print(f"    {count:4} refused: {reason[:140]}")
    for fault in result.faults[:3]:
        print(f"    FAULT {fault[:900]}")


def known_fields(coder: ChatCoder) -> tuple[str, ...]:
    """What a template knows besides the turns of users and assistants."""
    chats = {"system": BATTERY[2], "tools": BATTERY[-1], "thinking": BATTERY[5]}
    known = []
    for name, chat in chats.items():
        with contextlib.suppress(ValueError):
            coder.read_chat(*chat)
            known.append(name)
    return tuple(known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="conversations of each template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one template of chat_templates.py")
    parser.add_argument("--tokenizer_dir", help="the tokenizer in a folder, with its template")
    args = parser.parse_args()
    faults = 0
    for name in [args.only] if args.only else CASES:
        start = time.monotonic()
        if args.tokenizer_dir:
            from dataset.tokenizer import load_tokenizer

            coder = ChatCoder(load_tokenizer(args.tokenizer_dir).loaded)
            manner = coder.readers[0].manner
            head, ends = "|".join(map(re.escape, manner.heads)), tuple(manner.ends)
            name, fields = args.tokenizer_dir, known_fields(coder)
        else:
            coder, case = ChatCoder(case_tokenizer(name)), CASES[name]
            head, ends, fields = case.head, case.ends, case.fields
        result = fuzz(coder, fields, head, ends, args.cases, args.seed)
        show(name, result, time.monotonic() - start)
        faults += len(result.faults)
        if args.tokenizer_dir:
            break
    print(f"{faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
