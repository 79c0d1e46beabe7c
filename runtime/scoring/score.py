"""Score a model on questions with known answers: `eval_model.py --eval_file`."""

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.checks import present
from dataset.choice_rows import has_choices, read_csv
from dataset.read_rows import Row, read_rows
from runtime.device import keep_memory
from runtime.saving.store import naming
from runtime.scoring.choices import read_choice_question, score_choices
from runtime.scoring.replies import answer_all, read_question
from runtime.scoring.table import SHARES, format_table

# What --show_wrong prints of a question and --eval_out writes, where there is such
SHOWN = ("prompt", "accept", "choices", "answer", "reply", "choice", "choice_norm", "logprobs")
CONVERSATIONS = {"conversations", "messages", "instruction", "output"}
FORMS = (  # docs/en/chat.md
    "'conversations' with 'answer' or 'accept'; 'prompt' or 'question' with 'choices' and 'answer';"
    " 'question', 'A', 'B', ... and 'answer'; 'question', 'choices' and 'answerKey'"
)
WRITTEN = ("line", "row", "task", "conversations", *SHOWN, "right", *SHARES)


def score(model, path: Path, batch_size: int, show_wrong: int, eval_out: str | None) -> None:
    """Score the model on a file, print the table and some wrong answers, write all answers.

    Args:
        model: a `chat_model.ChatModel`.
        path: the rows, see `read_questions`.
        batch_size: prompts answered at once.
        show_wrong: print so many wrong answers.
        eval_out: write every answer to this file, as JSON lines.

    Raises:
        ValueError: `file:line: reason` for the first bad row; no rows.
    """
    keep_memory()
    questions, started = read_questions(path, model), time.monotonic()
    with_choices = [question for question in questions if "choices" in question]
    others = [question for question in questions if "choices" not in question]
    if with_choices:
        score_choices(with_choices, model)
    if others:
        answer_all(others, model, batch_size)
    seconds = time.monotonic() - started
    print(f"{format_table(questions)}\n{len(questions)} prompts in {seconds:.1f} s")
    for question in [q for q in questions if not q["right"]][:show_wrong]:
        row = f", row {question['row']}" if "row" in question else ""
        print(f"\nline {question['line']}{row} ({question['task']})")
        for key, value in fields_of(question, SHOWN).items():
            print(f"  {key:6} {json.dumps(value, ensure_ascii=False)}")
    if eval_out:
        rows = [fields_of(question, WRITTEN) for question in questions]
        write_whole("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), eval_out)


def read_questions(path: Path, model) -> list[dict]:
    """The rows of an evaluation file, each of one of the kinds that we score.

    With choices, see `dataset.choice_rows`, or with an answer in words, see `read_question`.

    Raises:
        ValueError: `file:line: reason` for the first bad row; no rows.
    """
    if not path.is_file():
        raise ValueError(f"--eval_file {path}: no such file")
    questions, last = [], 0
    for number, (line, row, fault) in enumerate(read_lines(path), 1):
        # Rows of an array may share a line
        place = {"line": line} | ({"row": number} if line == last else {})
        at, last = f"{path}:{line}" + (f", row {number}" if line == last else ""), line
        try:
            if fault:
                raise ValueError(fault)
            questions.append({**place, "place": at, **read_row(row, model)})
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: no rows")
    return questions


def read_row(row: object, model) -> dict:
    """A question, see `read_questions`. ValueError: a fault of the row."""
    if has_choices(row):
        question = read_choice_question(row, model)
    elif isinstance(row, dict) and not CONVERSATIONS & present(row).keys():
        found = ", ".join(map(repr, list(row)[:10])) or "none"
        raise ValueError(f"unknown schema, keys found: {found}; accepted: {FORMS}")
    else:
        question = read_question(row, model)
    if not question["task"].isprintable():
        raise ValueError(f"'task' {question['task'][:60]!r}: must be one line of printable text")
    return question


def read_lines(path: Path) -> Iterator[Row]:
    """The rows of JSON lines, of a JSON array or, for .csv, of a table."""
    if path.suffix == ".csv":
        yield from ((line, row, "") for line, row in read_csv(path))
    else:
        yield from (row for row, _ in read_rows(path))


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def fields_of(question: dict, keys: Sequence[str]) -> dict:
    """Those of the keys that a question has, as JSON can hold them."""
    fields = {key: question[key] for key in keys if key in question}
    if "accept" in fields:
        fields["accept"] = [pattern.pattern for pattern in question["accept"]]
    return fields


def write_whole(text: str, path: str) -> None:
    """Write what --eval_out is to hold, all of it or nothing."""
    out = Path(path).absolute()
    temporary = temporary_path(out)
    with naming(out):
        temporary.write_text(text, encoding="utf-8")
    if temporary != out:
        temporary.replace(out)


def temporary_path(out: Path) -> Path:
    """The file beside `out` that replaces it once it is whole; a device or a pipe is written to."""
    special = out.exists() and not out.is_file()
    return out if special else out.with_name(f".eval_out.{os.getpid()}.tmp")


def check_writable(path: str) -> None:
    """Try whether --eval_out can be written, before the minutes that answering takes.

    Raises:
        ValueError: it cannot, and why.
    """
    out = Path(path).absolute()
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = temporary_path(out)
        if temporary != out:
            temporary.touch()
            temporary.unlink()
        elif out.is_fifo():  # an error where nobody reads it
            os.open(out, os.O_WRONLY | os.O_NONBLOCK)  # open until the end: closed, its reader ends
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
        raise ValueError(f"--eval_out {path}: {fault}; name another file") from None
