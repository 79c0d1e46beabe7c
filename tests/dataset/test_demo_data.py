"""The demo data: reproducible, small, well-formed, right, without leaks into held-out files."""

import functools
import importlib.util
import json
import math
import re
import unicodedata
from pathlib import Path

import pytest
from running import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "dataset" / "demo"
FILES = (
    "pretrain", "sft", "held_out", "preferences", "preferences_held_out", "rl_prompts", "rl_held_out", "persona",
    "persona_held_out",
)  # fmt: skip
TASKS = (
    "identity", "greetings", "small_facts", "arithmetic", "multiplication", "dictionary", "reverse", "sort", "repeat",
    "refusal", "multi_turn", "unknown",
)  # fmt: skip
HONEST = ("I am small and have not learned that.", "我还小，没有学过这个。")


@functools.cache
def load_maker():
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "dataset" / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    with open(DEMO / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def normalise(text: str) -> str:
    """Letters, digits and signs alone, without case and width."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[^\w+*/=×÷−–✕·-]|_", "", text)


def prompt(turns: list[dict]) -> str:
    """All turns of a prompt but the system turn, normalised."""
    return normalise("\n".join(t["content"] for t in turns if t["role"] != "system"))


def user_turns(turns: list[dict]) -> list[str]:
    return [turn["content"] for turn in turns if turn["role"] == "user"]


def questions(*names: str) -> list[tuple[str, list[dict], str]]:
    """(task, prompt turns, answer) of every row of these files."""
    rows = []
    for row in (row for name in names for row in read(name)):
        row = row if "answer" in row else load_maker().as_question(row)
        rows.append((row["task"], row["conversations"], row["answer"]))
    return rows


def test_regenerating_gives_the_committed_bytes(tmp_path):
    load_maker().make_demo(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in FILES)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / f"{name}.jsonl").read_bytes(), (
            name
        )


def test_all_files_together_are_at_most_3_mib():
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 3_000_000


def test_training_the_tokenizer_gives_the_committed_bytes(tmp_path):
    """The command of dataset/demo/README.md."""
    flags = ["--data_path", DEMO / "sft.jsonl", "--vocab_size", "1200", "--out_dir", tmp_path]
    run_ranks("trainer/train_tokenizer.py", *flags)
    names = sorted(path.name for path in (DEMO / "tokenizer").iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (DEMO / "tokenizer" / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_well_formed(name):
    rows = read(name)
    assert rows
    for row in rows:
        if name == "pretrain":
            assert row["text"].strip()
            continue
        if name.startswith("preferences"):
            assert (
                row["chosen"][:-1] == row["rejected"][:-1]
                and row["chosen"][-1] != row["rejected"][-1]
            )
            talks, last = [row["chosen"], row["rejected"]], "assistant"
        else:
            talks, last = (
                [row["conversations"]],
                "assistant" if name in ("sft", "persona") else "user",
            )
            assert last == "assistant" or row["answer"].strip() != ""
        for talk in talks:
            assert all(t["content"].strip() for t in talk)
            roles = [t["role"] for t in talk if t["role"] != "system"]
            assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
            assert talk[-1]["role"] == last


def test_held_out_tasks_and_languages_are_balanced():
    rows = read("held_out")
    assert {row["task"] for row in rows} == {*TASKS}
    for task in TASKS:
        answers = [row["answer"] for row in rows if row["task"] == task]
        assert 60 <= len(answers) <= 100
        if task == "dictionary":  # an answer about a word of the other language
            answers = [answer.replace("“", "的").split('"')[-1] for answer in answers]
        chinese = [answer for answer in answers if re.search("[\u4e00-\u9fff]", answer)]
        assert task == "dictionary" or 0.2 <= len(chinese) / len(answers) <= 0.7


def training_talks() -> list[list[dict]]:
    talks = [row["conversations"] for row in read("sft") + read("persona")]
    talks += [
        [*row["conversations"], {"role": "assistant", "content": row["answer"]}]
        for row in read("rl_prompts")
    ]
    return talks + [row["chosen"] for row in read("preferences")]


def test_no_held_out_prompt_occurs_in_training():
    """Neither a whole held-out talk, nor the question of one that can be asked alone."""
    held_out = [
        row for name in ("held_out", "rl_held_out", "persona_held_out") for row in read(name)
    ]
    held_out += [
        {"task": "pair", "conversations": row["chosen"][:-1]}
        for row in read("preferences_held_out")
    ]
    talks = training_talks()
    trained = {prompt(talk[:-1]) for talk in talks} | {
        normalise(text) for talk in talks for text in user_turns(talk)
    }
    leaks = [row for row in held_out if prompt(row["conversations"]) in trained]
    alone = [row for row in held_out if row["task"] != "multi_turn"]
    leaks += [row for row in alone if normalise(user_turns(row["conversations"])[-1]) in trained]
    assert leaks == []


def listed(answer: str) -> list[str]:
    """The list that a reply ends with."""
    return re.split("[:：]", answer)[-1].split()


def about(task: str, answer: str) -> tuple | None:
    """What the answer to a computed prompt is about, whatever the wording of the prompt."""
    if task in ("arithmetic", "multiplication"):
        return task, answer.split("nswer")[0].split("答案")[0]  # the working
    if task in ("reverse", "sort", "ties"):
        items = listed(answer)
        return (
            ("reverse", *min(items, items[::-1])) if task == "reverse" else ("sort", *sorted(items))
        )
    if task == "repeat":
        return task, normalise(answer)
    if task == "multi_turn" and (name := re.fullmatch("(?:Your name is |你叫)(.*)[.。]", answer)):
        return "name", name[1].lower()
    return None


def test_no_held_out_operands_sequence_or_name_occurs_in_training():
    lists = {
        name.lower() for names in load_maker().WORDS["names"].values() for name in names.split()
    }
    seen = {"train": set(), "held": set()}
    for task, _, answer in questions("sft", "rl_prompts"):
        seen["train"].add(about(task, answer))
    for task, _, answer in questions("held_out", "rl_held_out"):
        seen["held"].add(about(task, answer))
    shared = {key for key in seen["train"] & seen["held"] if key and key[-1] not in lists}
    assert len(seen["held"]) > 400 and shared == set()


def test_every_prompt_has_one_answer():
    answers = {}
    for _, turns, answer in questions("sft", "held_out", "rl_prompts", "rl_held_out"):
        assert answers.setdefault(prompt(turns), answer) == answer


def phrases(text: str, length: int = 6) -> set[tuple[str, ...]]:
    """All runs of so many words or Chinese characters, and the whole text."""
    words = re.findall(r"[a-z]+|[0-9]+|[\u4e00-\u9fff]|[+\-*/×÷]", text.lower().replace("'", ""))
    return {tuple(words[n : n + length]) for n in range(len(words) - length + 1)} | {
        ("whole", *words)
    }


def test_no_phrase_of_a_newcomer_occurs_in_training(tmp_path):
    """Not in the files here, and not in what the quickstart has made for itself."""
    scale = int(re.search(r"--scale (\d+)", (ROOT / "scripts/quickstart.sh").read_text())[1])
    load_maker().make_demo(tmp_path, scale=scale)
    with open(tmp_path / "sft.jsonl", encoding="utf-8") as lines:
        talks = [json.loads(line)["conversations"] for line in lines]
    assert len(talks) > 5 * len(read("sft"))

    def phrases_of(talks: list[list[dict]]) -> set:
        texts = {text for talk in talks for text in user_turns(talk)}
        return {phrase for text in texts for phrase in phrases(text)}

    newcomers = phrases_of([row["conversations"] for row in read("newcomer")])
    assert newcomers & phrases_of(training_talks() + talks) == set()


def test_what_newcomers_type():
    rows = read("newcomer")
    assert len(rows) >= 300 and {row["task"] for row in rows} == {*TASKS}
    texts = [" ".join(user_turns(row["conversations"])) for row in rows]
    assert len({normalise(text) for text in texts}) == len(rows)
    chinese = [text for text in texts if re.search("[\u4e00-\u9fff]", text)]
    assert 0.4 <= len(chinese) / len(rows) <= 0.6
    for row in rows:
        assert all(turn["role"] == "user" for turn in row["conversations"])
        honest = [any(re.search(pattern, reply) for pattern in row["accept"]) for reply in HONEST]
        assert all(honest) if row["task"] == "unknown" else not any(honest), row


def test_what_has_not_been_learned_gets_one_honest_sentence():
    for name in ("sft", "held_out"):
        for row in read(name):
            reply = row["answer"] if "answer" in row else row["conversations"][-1]["content"]
            assert (reply in HONEST) == (row["task"] == "unknown")


def test_persona():
    """The questions of identity, each with its reply; beside them rows of SFT, of all tasks."""
    rows, held_out = read("persona"), read("persona_held_out")
    persona = [row for row in rows if row["task"] == "persona"]
    replies = {row["conversations"][-1]["content"] for row in persona}
    assert replies == {row["answer"] for row in held_out} and len(replies) == 18
    assert replies.isdisjoint(answer for _, _, answer in questions("sft", "held_out"))
    sft = {json.dumps(row) for row in read("sft")}
    others = [row for row in rows if row["task"] != "persona"]
    assert {row["task"] for row in others} == {*TASKS} - {"identity"} and all(
        json.dumps(row) in sft for row in others
    )
    assert not any(
        "minimind" in turn["content"].lower() for row in persona for turn in row["conversations"]
    )


def numbers_in(text: str) -> list[int]:
    """The two numbers of a question, both in digits or both in words."""
    text = unicodedata.normalize("NFKC", text).lower()
    digits = [int(number) for number in re.findall(r"\d+", text)]
    if digits:
        return digits
    text = re.sub("one (?=[a-z]+ costs)|一下|一共|算一算|一[盒袋双本件]|一个问题", " ", text)
    numbers = {}
    for lang in ("en", "zh"):
        numbers |= {
            word: n for n, word in enumerate(load_maker().WORDS["number_words"][lang].split())
        }
    return [
        numbers[word] for word in re.findall("|".join(sorted(numbers, key=len, reverse=True)), text)
    ]


def test_computed_answers_are_right():
    checked = dict.fromkeys(
        ("arithmetic", "multiplication", "direct", "reverse", "sort", "ties"), 0
    )
    for task, turns, answer in questions("sft", "held_out", "rl_prompts", "rl_held_out"):
        if task not in checked:
            continue
        text = user_turns(turns)[-1]
        checked[task] += 1
        if task in ("reverse", "sort", "ties"):
            shown = listed(answer)
            words = re.findall("[a-z]+|[0-9]+", unicodedata.normalize("NFKC", text).lower())
            words = [word for word in words if word != "and"]
            lists = [words[n : n + len(shown)] for n in range(len(words))]
            assert sorted(word.lower() for word in shown) in map(sorted, lists), text
            numbers = [int(item) for item in shown if item.isdigit()]
            if task == "reverse":
                assert [word.lower() for word in shown[::-1]] in lists, text
            elif numbers:
                assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
            else:
                assert shown == sorted(shown)
            continue
        result = int(re.findall(r"-?\d+", answer)[-1])
        a, b = numbers_in(text)[-2:]
        right = {
            "multiplication": (a * b,),
            "direct": (a + b,),
            "arithmetic": (a + b, a - b, b - a),
        }[task]
        assert result in right, (text, answer)
        for terms, z in re.findall(r"(\d+(?:[+×-]\d+)+)=(\d+)", answer):
            total = sum(
                math.prod(map(int, part.split("×"))) for part in terms.replace("-", "+-").split("+")
            )
            assert total == int(z), answer
    assert all(count >= 20 for count in checked.values())
