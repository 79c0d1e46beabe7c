"""Chat templates in the manner of public models, and small tokenizers of the kinds they have.

`fuzz_templates.py` and the tests hold what we make of them against `apply_chat_template`. Their
texts are ours; what they do is what public templates do: a default system text, none at all,
trimmed contents, a begin token in each pair, tools, thinking that old turns lose.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from benchmarks.toy_tokenizers import merged_pieces
from dataset.chat_template import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README_zh.md", "model/lm.py")

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_DEFAULT = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}
""" + CHATML  # fmt: skip

HEADERS = """\
{{- bos_token }}
{%- set begin = '<|start_header_id|>' %}{% set stop = '<|end_header_id|>\\n\\n' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- begin + 'system' + stop }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\n\\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}
    {%- if turns | length == 0 %}{{ raise_exception('Tools need a first user turn') }}{% endif %}
    {%- set first = turns[0]['content'] | trim %}{% set turns = turns[1:] %}
    {{- begin + 'user' + stop + 'Answer with JSON.\\n\\n' }}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in turns %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- begin + message['role'] + stop + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- begin + 'assistant' + stop + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}' + '<|eom_id|>' }}
    {%- else %}
        {{- begin + 'ipython' + stop }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ begin + 'assistant' + stop }}{% endif %}"""

BRACKETS = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set turns = messages %}{% set system = false %}{% endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system != false %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}{% set content = message['content'] %}{% endif %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{ '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}
                    {%- else %}{{ '"' + key + '": ' + val | tojson }}{% endif %}
                    {%- if not loop.last %}{{ ', ' }}{% endif %}
                {%- endfor %}{{ '}}' }}{% if not loop.last %}{{ ', ' }}{% endif %}
            {%- endfor %}{{ '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}{{ out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}{{ ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{ ', ' }}{% else %}{{ ']' + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user, assistant and tool roles are supported!') }}{% endif %}
{%- endfor %}"""

MODEL_ROLE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

BARS = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ENDS = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

FORGETFUL = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(looking=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == 'user' and message.content is string %}
        {%- if not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
            {%- set ns.looking = false %}{% set ns.last = index %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{ content }}{% endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{ '\\n' }}{% endif %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' }}{{ tool_call.name }}{{ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{ tool_call.arguments }}
            {%- else %}{{ tool_call.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

STARTED = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

CHANNELS = """\
{{- '<|start|>system<|message|>Be good.<|end|>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if loop.last and message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last else '<|end|>' }}
    {%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

NO_END = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@dataclass(frozen=True)
class Case:
    """A template with the tokenizer it is tried with, and what it makes of an assistant turn.

    head: a pattern of what stands before one. ends: what may end one.
    fields: what conversations may have besides users' and assistants' turns.
    """

    template: str
    tokenizer: str
    head: str
    ends: tuple[str, ...]
    fields: tuple[str, ...] = ("system",)


_ALL = ("system", "tools", "thinking")
_TURN, _END = r"<\|im_start\|>assistant\n", ("<|im_end|>",)
_HEADER = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
CASES = {
    "ours": Case(CHAT_TEMPLATE, "ours", _TURN, _END, _ALL),
    "chatml": Case(CHATML, "qwen", _TURN, _END),
    "chatml_default": Case(CHATML_DEFAULT, "smol", _TURN, _END),
    "llama3": Case(HEADERS, "llama3", _HEADER, ("<|eot_id|>", "<|eom_id|>"), ("system", "tools")),
    "llama2": Case(BRACKETS, "prepend", r" \[/INST\]", ("</s>",)),
    "mistral": Case(
        MISTRAL,
        "metaspace",
        r"\[/INST\]|\[/TOOL_RESULTS\](?!\[TOOL_RESULTS\])",
        ("</s>",),
        ("tools",),
    ),
    "gemma": Case(MODEL_ROLE, "spaces", r"<start_of_turn>model\n", ("<end_of_turn>",), ()),
    "zephyr": Case(BARS, "prepend", r"<\|assistant\|>\n", ("</s>",)),
    "phi": Case(ENDS, "phi", r"<\|assistant\|>\n", ("<|end|>",)),
    "qwen3": Case(FORGETFUL, "qwen", _TURN, _END, _ALL),
    "deepseek": Case(STARTED, "deepseek", "<｜Assistant｜>", ("<｜end▁of▁sentence｜>",)),
    "channels": Case(CHANNELS, "channels", r"<\|start\|>assistant", ("<|return|>", "<|end|>")),
}

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"


@functools.cache
def pages() -> list[str]:
    return [(ROOT / name).read_text(encoding="utf-8") for name in PAGES]


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _byte_level(steps: list, regex: bool = False, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(pages(), trainer)
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    """A BPE with ▁ and bytes; kind: who writes the ▁ in front: 'prepend', 'metaspace', 'none'."""
    tokenizer = merged_pieces(pages(), 900)
    replace = normalizers.Replace(" ", "▁")
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if kind != "none" else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


def _special(*names: str, **flags) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **flags) for name in names]


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer without a template."""
    if kind == "ours":
        return PreTrainedTokenizerFast.from_pretrained(ROOT / "model" / "minimind_tokenizer")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "qwen":
        backend = _byte_level([_split(rf"{_CASELESS}|\p{{N}}|{_WORDS}")], nfc=True)
        added = _special(*CHAT_TOKENS)
        added += [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
        tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    elif kind == "smol":
        backend = _byte_level([pre_tokenizers.Digits(individual_digits=True)], regex=True)
        added, tokens = _special(*CHAT_TOKENS), {"eos_token": "<|im_end|>"}
    elif kind == "llama3":
        backend = _byte_level([_split(rf"{_CASELESS}|\p{{N}}{{1,3}}|{_WORDS}")])
        names = "begin_of_text end_of_text start_header_id end_header_id eot_id eom_id python_tag"
        added = _special(*(f"<|{name}|>" for name in names.split()))
        tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    elif kind == "deepseek":
        backend = _byte_level([_split(rf"{_CASELESS}|\p{{N}}{{1,3}}|{_WORDS}")])
        added = _special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
        marks = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
        added += [AddedToken(mark, special=False, normalized=False) for mark in marks]
        tokens = {"bos_token": added[0].content, "eos_token": added[1].content}
    elif kind == "channels":
        backend = _byte_level([_split(rf"{_CASELESS}|\p{{N}}{{1,3}}|{_WORDS}")])
        names = "start end message channel return call"
        added = _special(*(f"<|{name}|>" for name in names.split()))
        tokens = {"eos_token": "<|return|>"}
    elif kind == "spaces":  # runs of blanks are tokens, as Gemma has them
        backend, added = _sentencepiece("none"), _special("<start_of_turn>", "<end_of_turn>")
        runs = [text * n for text in ("\n", "▁", " ") for n in range(2, 6)]
        added += [AddedToken(run, special=False, normalized=False) for run in runs]
    elif kind == "phi":  # tokens that take the white space behind them
        backend, added = _sentencepiece("prepend"), _special("<|endoftext|>")
        added += _special("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True)
        tokens |= {"eos_token": "<|endoftext|>"}
    else:
        backend, added = _sentencepiece(kind), []
        if kind == "metaspace":
            names = "INST /INST TOOL_CALLS AVAILABLE_TOOLS /AVAILABLE_TOOLS TOOL_RESULTS"
            added = _special(*(f"[{name}]" for name in (*names.split(), "/TOOL_RESULTS")))
    if "bos_token" in tokens and kind not in ("llama3", "deepseek"):
        backend.add_special_tokens(_special("<unk>", "<s>", "</s>"))
    backend.add_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def case_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a case, with its template."""
    case = CASES[name]
    blank = tokenizer_of(case.tokenizer)
    tokens = dict(blank.special_tokens_map)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=blank.backend_tokenizer, **tokens)
    tokenizer.chat_template = case.template
    return tokenizer
