"""The committed demo data: reproducible, small, well-formed, right, and without leaks into the held-out files."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "dataset" / "demo"
FILES = (
    "pretrain", "sft", "held_out", "preferences", "preferences_held_out", "rl_prompts", "rl_held_out", "persona",
    "persona_held_out",
)  # fmt: skip
TASKS = (
    "identity", "greetings", "small_facts", "arithmetic", "dictionary", "reverse", "sort", "refusal", "multi_turn",
)  # fmt: skip


def load_maker():
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "dataset" / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    with open(DEMO / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def normalise(text: str) -> str:
    return "".join(text.split()).lower()


def prompt(turns: list[dict]) -> str:
    """All turns of a prompt but the system turn, normalised."""
    return normalise("\n".join(t["content"] for t in turns if t["role"] != "system"))


def questions() -> list[tuple[str, list[dict], str]]:
    """(task, prompt turns, answer) of every training and held-out row that has an answer."""
    rows = [(r["task"], r["conversations"][:-1], r["conversations"][-1]["content"]) for r in read("sft")]
    for name in ("held_out", "rl_prompts", "rl_held_out"):
        rows += [(r["task"], r["conversations"], r["answer"]) for r in read(name)]
    return rows


def test_regenerating_gives_the_committed_bytes(tmp_path):
    load_maker().make_demo(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in FILES)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / f"{name}.jsonl").read_bytes(), name


def test_all_files_together_are_at_most_3_mib():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 3_000_000


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_well_formed(name):
    rows = read(name)
    assert rows
    for row in rows:
        if name == "pretrain":
            assert row["text"].strip()
            continue
        if name.startswith("preferences"):
            assert row["chosen"][:-1] == row["rejected"][:-1] and row["chosen"][-1] != row["rejected"][-1]
            talks, last = [row["chosen"], row["rejected"]], "assistant"
        else:
            talks, last = [row["conversations"]], "assistant" if name in ("sft", "persona") else "user"
            assert last == "assistant" or row["answer"] == row["answer"].strip() != ""
        for talk in talks:
            assert all(t["content"].strip() for t in talk)
            roles = [t["role"] for t in talk if t["role"] != "system"]
            assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
            assert talk[-1]["role"] == last


def test_held_out_tasks_and_languages_are_balanced():
    rows = read("held_out")
    for task in TASKS:
        mine = [r for r in rows if r["task"] == task]
        texts = [re.sub('".*?"|“.*?”', "", r["conversations"][-1]["content"]) for r in mine]
        chinese = [text for text in texts if re.search("[\u4e00-\u9fff]", text)]
        assert 60 <= len(mine) <= 100
        assert 0.3 <= len(chinese) / len(mine) <= 0.7


def test_no_held_out_prompt_occurs_in_training():
    talks = [r["conversations"] for r in read("sft") + read("rl_prompts") + read("persona")]
    talks += [r["chosen"] for r in read("preferences")]
    text = "\n".join([prompt(talk) for talk in talks] + [normalise(r["text"]) for r in read("pretrain")])
    held_out = [r["conversations"] for r in read("held_out") + read("rl_held_out") + read("persona_held_out")]
    held_out += [r["chosen"][:-1] for r in read("preferences_held_out")]
    leaks = [p for p in map(prompt, held_out) if p in text]
    assert leaks == []


def test_no_held_out_operands_or_sequence_occur_in_training():
    def about(task: str, turns: list[dict]) -> tuple | None:
        """What a computed prompt is about, whatever its wording and order."""
        text = turns[-1]["content"]
        if task in ("arithmetic", "direct"):
            return task, tuple(sorted(re.findall(r"\d+", text)))
        if task in ("reverse", "sort", "ties"):
            items = items_of(text)
            return ("reverse", tuple(min(items, items[::-1]))) if task == "reverse" else ("sort", tuple(sorted(items)))
        return None

    def operation(turns: list[dict]) -> str:
        return "-" if re.search(r"\d-|- |minus|subtract|away|left|减|差|剩", turns[-1]["content"]) else "+"

    seen = {"train": set(), "held": set()}
    for name, split in (("sft", "train"), ("rl_prompts", "train"), ("held_out", "held"), ("rl_held_out", "held")):
        for row in read(name):
            turns = row["conversations"][:-1] if name == "sft" else row["conversations"]
            if key := about(row["task"], turns):
                seen[split].add((*key, operation(turns) if row["task"] == "arithmetic" else ""))
    assert seen["train"] and seen["held"] and not seen["train"] & seen["held"]


def items_of(text: str) -> list[str]:
    """The list at the end of a reverse or sort prompt."""
    return text.split(": ")[1].split()


def test_every_prompt_has_one_answer():
    answers = {}
    for _, turns, answer in questions():
        assert answers.setdefault(prompt(turns), answer) == answer


def test_persona():
    """The questions of identity, each with a reply of its own; beside them rows that SFT has, of every other task."""
    rows, held_out = read("persona"), read("persona_held_out")
    persona = [row for row in rows if row["task"] == "persona"]
    replies = {row["conversations"][-1]["content"] for row in persona}
    assert replies == {row["answer"] for row in held_out} and len(replies) == 16
    assert replies.isdisjoint(answer for _, _, answer in questions())
    sft = {json.dumps(row) for row in read("sft")}
    others = [row for row in rows if row["task"] != "persona"]
    assert {row["task"] for row in others} == {*TASKS} - {"identity"} and all(json.dumps(row) in sft for row in others)
    assert not any("MiniMind" in turn["content"] for row in persona for turn in row["conversations"])


def test_computed_answers_are_right():
    checked = dict.fromkeys(("arithmetic", "direct", "reverse", "sort", "ties"), 0)
    for task, turns, answer in questions():
        if task not in checked:
            continue
        text = turns[-1]["content"]
        checked[task] += 1
        if task == "reverse":
            assert answer.split(": ")[1].split() == items_of(text)[::-1]
        elif task in ("sort", "ties"):
            items = items_of(text)
            right = sorted(items, key=int) if items[0].isdigit() else sorted(items)
            if re.search("large to small|falling|largest first|从大到小|最大|降序", text):
                right = right[::-1]
            assert answer.split(": ")[1].split() == right
        else:
            a, b = (int(n) for n in re.findall(r"\d+", text))
            result = int(re.findall(r"\d+", answer)[-1])
            assert result in (a + b, a - b) if task == "arithmetic" else result == a + b
            for x, sign, y, z in re.findall(r"(?<![\d+-])(\d+)([+-])(\d+)=(\d+)", answer):
                assert int(z) == (int(x) + int(y) if sign == "+" else int(x) - int(y))
            for terms, z in re.findall(r"((?:\d+[+-]){2}\d+)=(\d+)", answer):
                assert sum(int(n) for n in re.findall(r"[+-]?\d+", terms)) == int(z)
    assert all(count >= 100 for count in checked.values())
