"""The committed tokenizer and the script that trains it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from dataset.chat_template import CHAT_TEMPLATE, MARKERS
from dataset.tokenizer import load_tokenizer, own_template

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "model" / "minimind_tokenizer"
SCRIPT = ROOT / "trainer" / "train_tokenizer.py"
TOKENIZER = AutoTokenizer.from_pretrained(str(FOLDER))
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
]
SPECIAL += [f"<|reserved_{n}|>" for n in range(9)]


def run_script(*flags, cwd=ROOT):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def write_corpus(folder: Path) -> list[Path]:
    """A tiny corpus in each kind of file that the script reads."""
    chat = [
        {"role": "user", "content": "reverse the word moon"},
        {"role": "assistant", "content": "倒过来是 noom"},
    ]
    files = {
        "text.jsonl": "\n".join(
            json.dumps({"text": f"the moon and the sun, number {n}"}) for n in range(60)
        ),
        "chat.jsonl": "\n".join(json.dumps({"conversations": chat}) for _ in range(30)),
        "alpaca.json": json.dumps(
            [{"instruction": "说中文", "input": "", "output": "我说中文，你好。"}] * 40
        ),
        "code.py": "def add(left, right):\n    return left + right\n\n" * 40,
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


# --- the committed tokenizer ---


def test_has_6400_entries_and_fixed_special_ids():
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 6400
    assert TOKENIZER.convert_ids_to_tokens(list(range(16))) == SPECIAL
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(6400))
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert TOKENIZER.unk_token is None
    added = TOKENIZER.added_tokens_decoder
    assert sorted(added) == list(range(16))
    # What a model says with: `decode(skip_special_tokens=True)` of other programs must not take it
    # away.
    assert (
        [token.content for token in added.values() if not token.special]
        == SPECIAL[3:7]
        == list(MARKERS)
    )


def test_all_256_bytes_are_entries():
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab())


def test_adds_nothing_to_a_text():
    assert TOKENIZER.encode("moon") == TOKENIZER.encode("moon", add_special_tokens=False)
    assert TOKENIZER.encode("") == []


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_any_unicode_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301 é ﬁ ①",
        " .  ,\t\r\n\n don 't",
        "\x00\x1f\x7f\u200b\ufeff",
        "👩‍👩‍👧 🇨🇳",
        "ก็ हिन्दी عربى",
    ],
)
def test_hard_texts_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_digits_are_one_token_each():
    digits = [TOKENIZER.convert_tokens_to_ids(d) for d in "0123456789"]
    for text in ("0123456789", "9876543210" * 3, "2024"):
        assert TOKENIZER.encode(text) == [digits[int(d)] for d in text]
    tokens = TOKENIZER.convert_ids_to_tokens(
        TOKENIZER.encode("a12+34=46, 3.14 1,000 第12章 x86 v2")
    )
    assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))
    vocab = [token for token in TOKENIZER.get_vocab() if token not in SPECIAL]
    assert [t for t in vocab if any("0" <= c <= "9" for c in t) and len(t) > 1] == []


def test_newline_is_always_a_token_of_its_own():
    newline = TOKENIZER.encode("\n")
    assert len(newline) == 1
    for content in ("moon", " moon", "\nmoon", "\n\n  x", "\r\nx", "12", "你好", "。", "+", ""):
        assert TOKENIZER.encode("user\n" + content) == TOKENIZER.encode(
            "user"
        ) + newline + TOKENIZER.encode(content)


def test_role_words_are_single_tokens():
    assert [len(TOKENIZER.encode(role)) for role in ("system", "user", "assistant")] == [1, 1, 1]


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(
        st.text(),
        st.text(alphabet=" \t\n\r\u3000aZé你好。“，,.'_+=<①٣5\u0301😀여기ア゛\u2028\xa0—"),
    )
)
def test_pieces_are_those_of_llama_cpps_deepseek_coder(text):
    steps = [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ]
    splits = [pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps]
    known = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    assert TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(
        text
    ) == known.pre_tokenize_str(text)


def test_loads_from_a_copied_folder_also_beside_a_model_config(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "qwen3"}')
    copy = AutoTokenizer.from_pretrained(str(tmp_path / "copy"))
    text = "user\n\n\n hi 12345 使用Python “，\tfoo don't <think> é e\u0301 <|im_end|>  x"
    assert copy.encode(text) == TOKENIZER.encode(text)
    assert copy.chat_template == TOKENIZER.chat_template == CHAT_TEMPLATE
    copy.save_pretrained(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(str(tmp_path / "saved")).encode(text) == TOKENIZER.encode(
        text
    )


def test_folder_is_small_and_whole():
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in FOLDER.iterdir()) == names
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 600_000


# --- the script ---


def test_two_trainings_give_the_same_bytes(tmp_path):
    paths = write_corpus(tmp_path)
    for name in ("one", "two"):
        done = run_script(
            "--data_path", *paths, "--vocab_size", 330, "--out_dir", tmp_path / name, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "330 entries" in done.stdout and "code.py" in done.stdout
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        p.name for p in FOLDER.iterdir()
    )
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "one"))
    assert tokenizer.convert_ids_to_tokens(list(range(16))) == SPECIAL
    assert tokenizer.decode(tokenizer.encode("unseen ✂ 文字")) == "unseen ✂ 文字"


def test_committed_files_are_what_the_script_writes(tmp_path):
    paths = write_corpus(tmp_path)
    done = run_script("--data_path", *paths, "--vocab_size", 330, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (FOLDER / file).read_bytes()
    fresh, committed = (
        json.loads((d / "tokenizer.json").read_text("utf-8")) for d in (tmp_path / "out", FOLDER)
    )
    del fresh["model"], committed["model"]
    assert fresh == committed


def test_held_out_texts_are_not_trained_on(tmp_path):
    rows = [
        {"text": "zqzqzqzq zqzqzqzq" if n % 5 == 0 else "moon sun moon sun"} for n in range(1, 51)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--data_path", tmp_path / "text.jsonl", "--vocab_size", 277)
    assert run_script(*flags, "--hold_out", 5, "--out_dir", tmp_path / "held").returncode == 0
    assert run_script(*flags, "--hold_out", 0, "--out_dir", tmp_path / "all").returncode == 0
    held, whole = (
        Tokenizer.from_file(str(tmp_path / d / "tokenizer.json")).get_vocab()
        for d in ("held", "all")
    )
    assert "zq" in whole and "zq" not in held


def test_report_measures_bytes_per_token(tmp_path):
    text = "the moon 12\n" * 5 + "你好"
    (tmp_path / "sample.txt").write_text(text, encoding="utf-8")
    done = run_script("--report", tmp_path / "sample.txt", "--hold_out", 0)
    assert done.returncode == 0, done.stderr
    size, tokens = len(text.encode()), len(TOKENIZER.encode(text))
    assert done.stdout.splitlines()[1].split() == [
        str(size),
        str(tokens),
        f"{size / tokens:.3f}",
        "sample.txt",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "100"], "--vocab_size 100 is below 272"),
        (["--vocab_size", "many"], "invalid int value: 'many'"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--hold_out", "1"], "--hold_out 1 would leave nothing to train on"),
        (["--min_frequency", "0"], "--min_frequency 0: must be positive"),
        (["--data_path", "missing.jsonl"], "cannot read missing.jsonl: No such file"),
        (["--data_path", "broken.jsonl"], "broken.jsonl:2 is not JSON"),
        (["--data_path", "latin1.txt"], "latin1.txt:1: byte 0xe9 is not UTF-8; convert"),
        (["--data_path", "empty.jsonl"], "empty.jsonl has no text in it"),
        (["--data_path", "small.txt"], "--vocab_size 6400: the data gives"),
        (
            ["--report", "small.txt", "--out_dir", "nowhere"],
            "no tokenizer.json in --out_dir nowhere",
        ),
        (
            ["--data_path", "small.txt", "--vocab_size", "272", "--out_dir", "small.txt/x"],
            "cannot write to --out_dir",
        ),
    ],
)
def test_bad_use_exits_2_with_one_line(flags, message, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "small.txt").write_text("moon")
    if "--out_dir" not in flags:
        flags = [*flags, "--out_dir", "out"]
    done = run_script(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].count("error: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, fault",
    [
        (b"[]", "no JSON object"),
        (b"{", "no valid JSON"),
        (b'{"tokenizer_class": 5}', "tokenizer_class is 5"),
        (b'{"chat_template": 5}', "chat_template must be"),
        (b'{"chat_template": [{"template": "x"}]}', "chat_template must be"),
    ],
)
def test_a_damaged_tokenizer_config_is_named(text, fault, tmp_path):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(text)
    for use in (lambda: load_tokenizer(tmp_path).loaded, lambda: own_template(tmp_path)):
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {fault}"):
            use()


def test_a_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{")
    with pytest.raises(ValueError, match="chat_template.jinja: it is not UTF-8"):
        own_template(tmp_path)
