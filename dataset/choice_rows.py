"""Rows of questions with choices, in the forms in which they are published.

    ours    {"prompt": text, or "conversations" up to a user turn; "choices": [...], "answer"}
    MMLU    {"question", "choices": [...], "answer"}
    C-Eval  {"question", "A", "B", "C", "D", "answer"}
    ARC     {"question", "choices": {"text": [...], "label": [...]}, "answerKey"}

The answer is the number of a choice, counted from 0, its letter or its text. MMLU and C-Eval list
the choices in the question, behind which stands "Answer:" (of a Chinese one its translation), and
their letters are what is scored; of the others it is the texts.
Besides JSON, CSV with these names in its first line is read, and MMLU's without them.
"""

import csv
import io
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.checks import check_text, json_type, present
from dataset.read_text import read_text

LETTERS = string.ascii_uppercase
CHINESE = re.compile("[\u4e00-\u9fff]")
MMLU_NAMES = ("question", "A", "B", "C", "D", "answer")


@dataclass(frozen=True)
class ChoiceRow:
    """A question with choices.

    text: what stands before the choices; "": the row has a conversation instead. choices: what is
    scored. right: the number of the right one.
    """

    task: str
    text: str
    choices: list[str]
    right: int


def has_choices(row: object) -> bool:
    """Whether a row has choices, in whichever form."""
    return isinstance(row, dict) and (
        row.get("choices") is not None or {"question", "A", "B"} <= row.keys()
    )


def read_choice_row(row: dict) -> ChoiceRow:
    """A row of one of the four forms.

    Raises:
        ValueError: a fault of the row, in one line, without the file and line.
    """
    row = present(row)
    names = [name for name in ("task", "subject") if name in row]
    task = check_text(row[names[0]], f"{names[0]!r}") if names else "all"
    if "accept" in row:
        raise ValueError("a row has 'choices' or 'accept', not both")
    question = row.get("question", row.get("prompt", ""))
    question = check_text(question, "'question'" if "question" in row else "'prompt'").strip()
    texts = {"question", "prompt", "conversations", "messages"} & row.keys()
    if len(texts) != 1 or not question and texts <= {"question", "prompt"}:
        found = ", ".join(sorted(texts)) or "none"
        needs = "needs one of 'prompt', 'question', 'conversations' and 'messages'"
        raise ValueError(f"a row with 'choices' {needs}, not empty; found: {found}")
    if "choices" not in row:  # C-Eval
        row["choices"] = [row[letter] for letter in LETTERS if letter in row]
        labels = [letter for letter in LETTERS if letter in row]
        return listed(task, question, read_texts(row["choices"]), labels, row)
    if isinstance(row["choices"], dict):  # ARC
        texts, labels = read_labelled(row["choices"])
        right = find_answer(row.get("answerKey"), "answerKey", labels, texts)
        return ChoiceRow(task, f"Question: {question}\nAnswer:", texts, right)
    texts = read_texts(row["choices"])
    labels = list(LETTERS[: len(texts)])
    if "question" in row:  # MMLU
        return listed(task, question, texts, labels, row)
    right = find_answer(row.get("answer"), "answer", texts, labels)
    return ChoiceRow(task, row.get("prompt", "").rstrip(), texts, right)


def listed(task: str, question: str, texts: list[str], labels: list[str], row: dict) -> ChoiceRow:
    """A question that lists its choices: their letters are scored."""
    right = find_answer(row.get("answer"), "answer", labels, texts)
    lines = [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]
    ask = "答案：" if CHINESE.search(question) else "Answer:"
    return ChoiceRow(task, "\n".join([question, *lines, ask]), labels, right)


def read_texts(choices: object) -> list[str]:
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        found = f"{len(choices)}" if isinstance(choices, list) else json_type(choices)
        raise ValueError(f"'choices' must be a list of 2 to {len(LETTERS)} texts, found {found}")
    texts = []
    for n, choice in enumerate(choices, 1):
        if not isinstance(choice, str) and isinstance(choice, int | float):
            choice = str(choice)
        if not check_text(choice, f"choice {n}").strip():
            raise ValueError(f"choice {n} is empty")
        texts.append(choice.strip())
    return texts


def read_labelled(choices: dict) -> tuple[list[str], list[str]]:
    """(texts, labels) of ARC."""
    texts, labels = read_texts(choices.get("text")), choices.get("label")
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise ValueError(f"'choices' must have as many in 'label' as in 'text', {len(texts)}")
    return texts, [check_text(label, "a label of 'choices'") for label in labels]


def find_answer(answer: object, key: str, *names: list[str]) -> int:
    """The number of the right choice, counted from 0.

    Args:
        key: of the answer, for messages.
        names: lists of what may name a choice, the likeliest first.

    Raises:
        ValueError: it names none.
    """
    count = len(names[0])
    if isinstance(answer, str):
        for spelled in (answer.strip(), answer.strip().upper()):
            for known in (*names, [str(n) for n in range(count)]):
                if spelled in known:
                    return known.index(spelled)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return answer
    ways = f"its text, its letter or its number (0 to {count - 1})"
    found = "nothing" if answer is None else repr(answer)[:40]
    raise ValueError(f"{key!r} must name the right choice by {ways}, found {found}")


# --------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a CSV file, with the lines where they begin.

    Raises:
        ValueError: `file: reason` or `file:line: reason`.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line, names = 1, None
    try:
        for fields in reader:
            begin, line = line, reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if names is None:
                names = MMLU_NAMES if is_headless(fields) else [name.strip() for name in fields]
                if names is not MMLU_NAMES:
                    continue
            if len(fields) != len(names):
                fault = f"has {len(fields)} fields, the first line {len(names)}"
                raise ValueError(f"{path}:{begin}: {fault}")
            yield begin, {name: text for name, text in zip(names, fields, strict=True) if text}
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: broken CSV: {error}") from None


def is_headless(fields: list[str]) -> bool:
    """Whether a first line is a row of MMLU, its answer right or wrong."""
    return len(fields) == len(MMLU_NAMES) and len(fields[-1].strip()) == 1
