"""Chat templates of many kinds: ids of transformers, masks by construction, reasons for refusals."""

import json
import re

import pytest
from conftest import chat, write_jsonl
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.chat_templates import (
    CASES,
    CHATML,
    FORGETFUL,
    MODEL_ROLE,
    NO_END,
    case_tokenizer,
    tokenizer_of,
)
from benchmarks.fuzz_templates import fuzz
from dataset import template_checks
from dataset.chat_format import ChatCoder
from dataset.lm_dataset import SFTDataset, load_tokenizer
from dataset.prompt_dataset import PromptDataset
from dataset.talk import Talk
from dataset.template_layout import NONCE, stand_in
from dataset.template_literals import Looks

CALL = template_checks.CALL
TOOL = template_checks.TOOL


def turns(*texts: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(texts)
    return [*first, *({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))]


def coder_of(template, kind: str = "qwen") -> ChatCoder:
    """A tokenizer of a kind with a template of ours."""
    blank = tokenizer_of(kind)
    tokens = dict(blank.special_tokens_map)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=blank.backend_tokenizer, **tokens)
    tokenizer.chat_template = template
    return ChatCoder(tokenizer)


def supervised(coder: ChatCoder, messages: list[dict], tools=None, loss_on: str = "all") -> str:
    ids, mask = coder.encode_chats([(messages, tools)], loss_on)[0]
    return coder.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.fixture(scope="module")
def coders() -> dict[str, ChatCoder]:
    return {name: ChatCoder(case_tokenizer(name)) for name in CASES}


# --------------------------------------------------------------------------------------------------
# Ids and masks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_ids_masks_and_hostile_contents(coders, name):
    """As `benchmarks/fuzz_templates.py` does with more conversations."""
    case = CASES[name]
    result = fuzz(coders[name], case.fields, case.head, case.ends, cases=25, seed=1)
    assert result.faults == []
    assert result.equal >= 20 and result.hostile >= 3
    reasons = " ".join(result.refused)
    assert not result.refused or "leaves out the content" in reasons or "single tool" in reasons


def test_what_was_thought_in_old_turns_is_followed_as_the_template_drops_it(coders):
    thought = {"role": "assistant", "content": "42.", "reasoning_content": "6 times 7"}
    messages = [*turns("6 x 7?"), thought, *turns("Why?"), thought]
    last = "<think>\n6 times 7\n</think>\n\n42.<|im_end|>"
    assert supervised(coders["qwen3"], messages) == "42.<|im_end|>" + last
    assert supervised(coders["ours"], messages) == last + last
    # The prompt of a plain answer says nothing of thinking: the model says that it does not.
    empty = "<think>\n\n</think>\n\n"
    assert supervised(coders["qwen3"], turns("a", "b", "c", "d")) == (
        f"b<|im_end|>{empty}d<|im_end|>"
    )


@pytest.mark.parametrize("name", ["ours", "qwen3", "chatml"])
def test_thinking_inside_a_content_is_control_text(coders, name):
    content = "<think>\na </think b\n</think>\n\nanswer <think>"
    ids, mask = coders[name].encode_chats([(turns("q <think>", content), None)])[0]
    tokenizer = coders[name].tokenizer
    spelled = [i for i in ids if i in tokenizer.convert_tokens_to_ids(["<think>", "</think>"])]
    assert tokenizer.convert_ids_to_tokens(spelled) == ["<think>", "</think>"]
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        content + "<|im_end|>"
    )


def test_only_the_exact_shape_is_thinking_where_the_template_does_not_say_so(coders):
    exact, loose = "<think>\na\n</think>\n\nb", "<think>a</think>b"
    for name, count in (("ours", 2), ("chatml", 2), ("qwen3", 2)):
        coder = coders[name]
        ids, _ = coder.encode_chats([(turns("q", loose, "q", exact), None)])[0]
        spelled = coder.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert sum(i in spelled for i in ids) == count


def test_a_call_may_end_otherwise(coders):
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": ""}
    messages = [*turns("q"), called, result, *turns("", "warm")[1:]]
    said = '{"name": "weather", "parameters": {"city": "北京", "days": 2}}<|eom_id|>warm<|eot_id|>'
    assert supervised(coders["llama3"], messages, [TOOL]) == said


def test_tokens_that_merge_across_the_border_are_supervised(coders):
    """`\\n` + `b` is one token there: it says what the model has to say."""
    coder = coders["gemma"]
    ids, mask = coder.encode_chats([(turns("a", "b"), None)])[0]
    said = coder.tokenizer.convert_ids_to_tokens([i for i, m in zip(ids, mask, strict=True) if m])
    assert said[-1] == "<end_of_turn>" and "".join(said[:-1]).lstrip("\n") == "b"


def test_which_turns_are_learned(coders):
    messages = turns("a", "b", "c", "d")
    messages[1]["loss"] = False
    assert supervised(coders["llama2"], messages).split() == ["d", "</s>"]
    assert supervised(coders["phi"], turns("a", "b", "c", "d"), loss_on="last") == "d<|end|>"


def test_a_template_may_have_another_for_tools():
    named = {"default": CHATML, "tool_use": FORGETFUL}
    coder = coder_of(named)
    assert coder.encode_chats([(turns("a", "b"), None)]) == coder_of(CHATML).encode_chats(
        [(turns("a", "b"), None)]
    )
    assert "weather" in coder.tokenizer.decode(coder.encode_prompt(turns("a"), [TOOL]))
    with pytest.raises(ValueError, match="no template is named 'default' \\(found: rag\\)"):
        coder_of({"rag": CHATML})


def test_arguments_as_json_text_for_templates_that_want_them():
    template = CHATML.replace(
        "m['content']",
        "m['content'] + (m.tool_calls[0].function.arguments if m.tool_calls else '')",
    )
    template = template.replace("+ (m.", "+ (m.tool_calls[0].function.name + m.")
    called = {"role": "assistant", "content": "x", "tool_calls": [CALL]}
    said = supervised(coder_of(template), [*turns("q"), called])
    assert said == 'xweather{"city": "北京", "days": 2}<|im_end|>'


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


def m_content(expression: str) -> str:
    return CHATML.replace("m['content']", expression)


THOUGHT = {"role": "assistant", "content": "b", "reasoning_content": "t"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (MODEL_ROLE, (turns("a", "b", system="s"), None), "System role not supported"),
        (MODEL_ROLE, (turns("a", "b", "c")[1:], None), "roles must alternate"),
        (CHATML, ([*turns("a"), THOUGHT], None), "turn 2: the chat template leaves out the think"),
        (CHATML, ([*turns("a"), THOUGHT, *turns("a", "b")], None), "turn 2: .* the thinking"),
        (FORGETFUL, ([*turns("a"), THOUGHT, *turns("a", "b")], None), ""),
        (CHATML, (turns("a", "b"), [TOOL]), "leaves tools out"),
        (CHATML, ([*turns("a"), CALLED], None), "turn 2: .* leaves out a call"),
        (m_content("m['content'] | upper"), None, "leaves turns out"),
        (m_content("m['content'][:20]"), None, "does not write texts|leaves turns out"),
        (m_content("m['content'].replace('x', 'y')"), (turns("a", "xx"), None), "turn 2: .*yy<"),
        (m_content("m['content'].replace('x', 'y')"), (turns("a", "b"), None), ""),
        (m_content("('no' if m['content'] == 'Yes' else m['content'])"), (turns("a", "Yes"), None),
         "turn 2: the chat template changes what the row says: it writes 'assistant"),
        (m_content("(m['content'] if m['content'] | length < 100 else 'long')"),
         (turns("a", "b" * 120), None), "turn 2: "),
        ("{% for m in messages if m.role != 'tool' %}" + CHATML.partition("%}")[2],
         ([*turns("a", "b"), {"role": "tool", "content": "r"}, *turns("c", "d")], None),
         "turn 3: the chat template leaves out the content of this tool turn"),
    ],
)  # fmt: skip
def test_what_a_template_changes_or_refuses_is_told(template, chat, reason):
    try:
        coder = coder_of(template, "spaces" if template == MODEL_ROLE else "qwen")
        supervised(coder, *(chat or (turns("hello", "hello to you, too"), None)))
    except ValueError as error:
        assert reason and re.search(reason, str(error)) and "\n" not in str(error)
    else:
        assert not reason


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}\n{{ m.role }", "chat template:2: unexpected '}'"),
        ("{% for m in messages %}\n\n{% endif %}", "chat template:3: "),
        (NO_END, "no token ends an assistant turn: behind it stands ''; name another with --chat"),
        ("{{ messages[0]['content'] }}<|im_end|>", "leaves turns out"),
        ("{{ raise_exception('not today') }}", "refuses the conversation: not today"),
        ("{{ messages[0].a.b }}", "fails on the conversation: "),
        ("{{ '<|im_start|>' }}", "leaves turns out"),
        (None, "there is no chat template"),
    ],
)
def test_a_template_with_a_fault_is_refused_in_one_line(template, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        coder_of(template)
    assert "\n" not in str(error.value) and "--chat_template FILE" in str(error.value)


def test_ids_that_differ_from_transformers_are_found_at_the_start(monkeypatch):
    original = PreTrainedTokenizerFast.apply_chat_template

    def other(self, messages, **options):
        return [*original(self, messages, **options), 7]

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", other)
    with pytest.raises(ValueError, match=r"token \d+ of a conversation of 2 turns is .*gives"):
        coder_of(CHATML)


# --------------------------------------------------------------------------------------------------
# Files and data sets
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer like Qwen's whose template forgets thinking."""
    case_tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_the_template_of_a_folder_counts_or_the_one_that_is_given(folder, tmp_path):
    own = load_tokenizer(folder)
    assert own.chat_template == FORGETFUL
    (tmp_path / "mine.jinja").write_text(CHATML)
    for given in (tmp_path / "mine.jinja", str(tmp_path / "mine.jinja"), CHATML):
        assert load_tokenizer(folder, chat_template=given).chat_template == CHATML
    data = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), chat("c", "d")])
    cache = tmp_path / "cache"
    first, again, other = (
        SFTDataset(data, load_tokenizer(folder, chat_template=given), 64, cache)
        for given in (None, None, CHATML)
    )
    assert first.key == again.key != other.key
    assert first.supervised.sum() > other.supervised.sum()  # the empty think block
    (folder / "chat_template.jinja").write_text(CHATML)
    assert SFTDataset(data, load_tokenizer(folder), 64, cache).key == other.key


def test_where_the_template_is_from_is_told(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{% if %}")
    place = re.escape(f"{folder / 'chat_template.jinja'}:1: ")
    with pytest.raises(ValueError, match=place):
        ChatCoder(load_tokenizer(folder))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: there is no chat template"):
        ChatCoder(load_tokenizer(folder))
    bad = tmp_path / "bad.jinja"
    bad.write_text("a\n{{ b")
    with pytest.raises(ValueError, match=f"{re.escape(str(bad))}:2: "):
        ChatCoder(load_tokenizer(folder, chat_template=bad))
    with pytest.raises(ValueError, match="--chat_template .*nowhere.jinja: No such file"):
        load_tokenizer(folder, chat_template=tmp_path / "nowhere.jinja")
    bad.write_text(" \n")
    with pytest.raises(ValueError, match="bad.jinja: the file is empty"):
        load_tokenizer(folder, chat_template=bad)


def test_tokenizers_that_are_none_of_ours_are_refused(folder, tmp_path):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="no tokenizer.json; tokenizer.model alone is a slow"):
        load_tokenizer(tmp_path / "slow")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="is a WordLevel tokenizer: only fast BPE tokenizers"):
        ChatCoder(load_tokenizer(folder))


def test_a_class_of_its_own_is_loaded_as_transformers_does(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(folder)
    loaded = load_tokenizer(folder).loaded
    assert type(loaded) is type(expected)
    text = "The moon, 12 你好。"
    assert loaded.encode(text) == expected.encode(text)


def test_rows_that_a_template_refuses_are_row_faults(tmp_path):
    tokenizer = case_tokenizer("gemma")
    rows = [chat("a", "b"), {"messages": turns("a", "b", system="s")}]
    rows = [{"messages": row.get("messages") or row["conversations"]} for row in rows]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match=r"data.jsonl:2: the chat template refuses .* System role"):
        SFTDataset(data, tokenizer, 64, tmp_path / "cache")
    kept = SFTDataset(data, tokenizer, 64, tmp_path / "cache", skip_bad=True)
    assert len(kept) == kept.stats["bad"] == 1 and "System role" in kept.stats["first_bad"]
    with pytest.raises(ValueError, match=r"data.jsonl:2: the chat template refuses"):
        PromptDataset(data, tokenizer, 64, 8)


# --------------------------------------------------------------------------------------------------
# Prompts and replies
# --------------------------------------------------------------------------------------------------


def test_prompts_pass_enable_thinking_on(coders):
    for name, openings in {"qwen3": ("", "", ""), "ours": ("", "", "<think>\n")}.items():
        coder = coders[name]
        for thinking, opening in zip((None, False, True), openings, strict=True):
            flags = {} if thinking is None else {"enable_thinking": thinking}
            expected = coder.tokenizer.apply_chat_template(
                turns("a"), add_generation_prompt=True, return_dict=False, **flags
            )
            assert coder.encode_prompt(turns("a"), thinking=thinking) == expected
            assert coder.opening(thinking) == opening
    assert coders["deepseek"].opening() == "<think>\n"


@pytest.mark.parametrize("name", ["ours", "llama2", "phi", "zephyr"])
def test_replies_end_at_the_templates_own_token(coders, name):
    coder = coders[name]
    ids, mask = coder.encode_chats([(turns("a", "two words"), None)])[0]
    said = [i for i, m in zip(ids, mask, strict=True) if m]
    assert said[-1] == coder.end_of_turn
    assert coder.decode_reply([*said, *said]).split()[-2:] == ["two", "words"]


def test_a_talk_follows_the_template_and_reads_replies_as_they_were_written(coders):
    for name in ("qwen3", "ours"):
        coder = coders[name]
        talk, (think, end_think) = (
            Talk(coder),
            (coder.plain.ids[t] for t in ("<think>", "</think>")),
        )
        reply = [think, *coder.plain("\nhm </think>\n"), end_think, *coder.plain("\n\nyes")]
        talk.add(turns("a <think>"), reply)
        prompt = coder.tokenizer.decode(talk.prompt(turns("b")))
        spelled = [i for i in talk.prompt(turns("b")) if i in (think, end_think)]
        kept = "<think>\nhm </think>\n</think>\n\nyes<|im_end|>"
        assert ("yes<|im_end|>" if name == "qwen3" else kept) in prompt
        assert spelled == ([] if name == "qwen3" else [think, end_think])
    assert talk.prompt(turns("c"), dropped=2) == coder.encode_prompt(turns("c"))


# --------------------------------------------------------------------------------------------------
# What a template looks for
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "seen", "unseen"),
    [
        ("{{ m.content }}", [], ["</think>", "user", "x"]),
        ("{% if m.role == 'user' %}{{ '<b>' + m.content }}{% endif %}", ["user"], ["<b>", "users"]),
        ("{% if '</think>' in c %}{{ c.split('|')[-1] }}{% endif %}", ["a</think>", "a|b"], ["a"]),
        ("{% set x = '@@' %}{% if x in c %}{% endif %}", ["a@@", "any"], []),
        ("{{ c.strip('\\n') }}{{ c | trim }}{{ c.lstrip('#') }}", ["a#b"], ["a\nb", " a "]),
        ("{{ c | tojson }}{{ tools | length }}", [], ["a"]),
        ("{{ content[:5] }}", ["anything"], []),
        ("{% if m.content | length > 5 %}{% endif %}", ["anything"], []),
        ("{{ c | wordcount }}", ["anything"], []),
        ("{{ c.title() }}", ["anything"], []),
        ("{% for line in c.splitlines() %}{% endfor %}", ["anything"], []),
        ("{{ c[:5] }}", ["anything"], []),
        ("{{ messages[1:] }}{{ message.tool_calls[0] }}{{ messages[-1].role }}", [], ["a"]),
        ("{% if message == users[-1] %}{% endif %}", ["anything"], []),
        ("{% if m.role == role or loop.index0 == last %}{% endif %}", [], ["a"]),
        ("{% generation %}{{ c }}{% endgeneration %}", [], ["a"]),
        ("{% if m.content[-1] == '?' %}{% endif %}", ["anything"], []),
        ("{% if messages | map(attribute='content') | join | length > 9 %}{% endif %}", ["a"], []),
        ("{% set c = m.content %}{% set user = c %}{{ user | length }}", ["anything"], []),
        ("{% macro f(turn) %}{{ turn | last }}{% endmacro %}", ["anything"], []),
        ("{% set rest = messages[1:] %}{% for message in rest %}{% endfor %}", [], ["a"]),
    ],
)
def test_what_a_template_looks_for(template, seen, unseen):
    looks = Looks(template)
    assert [text for text in seen if not looks.sees(text)] == []
    assert [text for text in unseen if looks.sees(text)] == []


def test_a_turn_that_equals_another(coders):
    """A template that compares turns: with tools it lists them before every last question."""
    twice = [*turns("a", "b"), *turns("a", "d")]
    with pytest.raises(ValueError, match="changes what the row says"):
        coders["mistral"].encode_chats([(twice, [TOOL])])
    coders["mistral"].encode_chats([(turns("a", "b", "c", "d"), [TOOL])])


def test_no_text_can_be_a_stand_in(coders):
    hostile = f"{NONCE} {stand_in(0)} {stand_in(1)}"
    for name in ("ours", "llama3"):
        ids, mask = coders[name].encode_chats([(turns(hostile, hostile), None)])[0]
        text = coders[name].tokenizer.decode(ids)
        assert text.count(hostile) == 2 and sum(mask) > 10
