"""Score a chat model on prompts with known answers: `eval_model.py --eval_file`."""

import errno
import json
import os
import re
import sys
import time
from pathlib import Path

from dataset.chat_rows import detect_format, normalise_row
from dataset.checks import present
from dataset.read_rows import read_rows
from dataset.replies import THINK, final_answer
from model.generate import generate_batch, make_sampler
from runtime.device import keep_memory
from runtime.process.terminal import naming


def score(model, path: Path, batch_size: int, show_wrong: int, eval_out: str | None) -> None:
    """Score the model on a file, print the table and some replies, write all of them.

    Args:
        model: an `chat_model.ChatModel`.
        path: the rows, see `read_questions`.
        batch_size: prompts answered at once.
        show_wrong: print so many wrong replies.
        eval_out: write every reply to this file, as JSON lines.

    Raises:
        ValueError: `file:line: reason` for the first bad row; no rows.
    """
    keep_memory()
    questions, started = read_questions(path, model), time.monotonic()
    answer_all(questions, model, batch_size)
    seconds = time.monotonic() - started
    print(f"{format_table(questions)}\n{len(questions)} prompts in {seconds:.1f} s")
    for question in [q for q in questions if not q["right"]][:show_wrong]:
        print(f"\nline {question['line']} ({question['task']})")
        for key, value in fields_of(question, "prompt", "reply").items():
            print(f"  {key:6} {json.dumps(value, ensure_ascii=False)}")
    if eval_out:
        write_replies(questions, Path(eval_out).absolute())


# --------------------------------------------------------------------------------------------------
# Questions
# --------------------------------------------------------------------------------------------------


def read_questions(path: Path, model) -> list[dict]:
    """The rows of an evaluation file: {"task", "conversations": [..., user turn]} and the answer.

    That is "answer", the reply to the letter, or "accept", a list of regular expressions of which
    the reply must contain one, in either case. Where a user turn follows a user turn, the model
    answers the first one itself.

    Raises:
        ValueError: `file:line: reason` for the first bad row; no rows.
    """
    if not path.is_file():
        raise ValueError(f"--eval_file {path}: no such file")
    questions = []
    for (line, row, fault), _ in read_rows(path):
        try:
            if fault:
                raise ValueError(fault)
            questions.append({"line": line, **read_question(row, model)})
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: no rows")
    return questions


def read_question(row: dict, model) -> dict:
    """One row as {task, prompt, answer or accept, talk, parts, sizes}.

    talk: the conversation, nothing of which was said yet. parts: the turns up to each position
    where the model speaks. sizes: their tokens.
    """
    messages, tools = normalise_row(row, detect_format(row), need_assistant=False)
    if messages[-1]["role"] == "assistant":
        fault = "the last turn must not be the assistant's"
        raise ValueError(f"{fault}: that is what the model is to say")
    row = present(row)
    task, answer, accept = row.get("task", "all"), row.get("answer"), row.get("accept")
    if not isinstance(task, str) or not isinstance(answer, str) and accept is None:
        raise ValueError("'answer', and 'task' if it is there, must be strings")
    if answer is not None and accept is not None:
        raise ValueError("a row has 'answer' or 'accept', not both")
    question = {"task": task, "prompt": messages[-1]["content"]}
    if accept is None:
        question |= {"answer": answer, "answer_len": len(model.plain(final_answer(answer)))}
    else:
        question["accept"] = read_patterns(accept)
    turns = [message["role"] for message in messages]
    ends = [n for n in range(1, len(turns)) if turns[n - 1] == turns[n] == "user"] + [len(turns)]
    starts = [0, *ends[:-1]]
    parts = [messages[start:end] for start, end in zip(starts, ends, strict=True)]
    ids = [model.encode(part, tools if n == 0 else None) for n, part in enumerate(parts)]
    question |= {"parts": parts, "sizes": list(map(len, ids)), "talk": model.talk(tools)}
    model.check(sum(ids, []))
    return question


def read_patterns(accept: object) -> list[re.Pattern]:
    """The regular expressions of a row."""
    is_list = isinstance(accept, list) and bool(accept)
    if not is_list or not all(isinstance(pattern, str) for pattern in accept):
        raise ValueError("'accept' must be a list of regular expressions")
    try:
        return [re.compile(pattern, re.IGNORECASE) for pattern in accept]
    except re.error as error:
        raise ValueError(f"'accept': {error.pattern!r} is no regular expression: {error}") from None


# --------------------------------------------------------------------------------------------------
# Replies
# --------------------------------------------------------------------------------------------------


def answer_all(questions: list[dict], model, batch_size: int) -> None:
    """Fill in `reply`, as the model wrote it, and `right` of every question, greedily.

    A reply twice as long as the answer is wrong already and is cut there, unless the model thinks
    first. Replies to earlier turns leave half of what room there is to those that follow.
    """
    longest = model.sampling["max_new_tokens"]
    for question in questions:
        question["ids"] = question["talk"].prompt(question["parts"][0])
    for turn in range(1, max(len(question["parts"]) for question in questions)):
        rows = [question for question in questions if len(question["parts"]) > turn]
        room = [model.context - len(q["ids"]) - sum(q["sizes"][turn:]) for q in rows]
        limits = [max(1, min(longest, tokens // 2)) for tokens in room]
        generate_replies(rows, limits, model, batch_size)
        for question in rows:
            question["talk"].add(question["parts"][turn - 1], question["reply_ids"])
            prompt = question["talk"].prompt(question["parts"][turn])
            question["ids"] = prompt[1 - model.context :]  # a full context loses its beginning
    limits = [reply_limit(question, model) for question in questions]
    generate_replies(questions, limits, model, batch_size)
    thinkers = [question for question in questions if THINK in question["reply"]]
    if not model.thinking and thinkers:
        generate_replies(thinkers, [longest] * len(thinkers), model, batch_size)
    for question in questions:
        reply = final_answer(question["reply"])
        if "accept" in question:
            question["right"] = any(pattern.search(reply) for pattern in question["accept"])
        else:
            question["right"] = reply == final_answer(question["answer"])


def reply_limit(question: dict, model) -> int:
    """The most tokens of the last reply."""
    longest = model.sampling["max_new_tokens"]
    if model.thinking or "accept" in question:
        return longest
    return min(longest, 2 * question["answer_len"] + 16)


def generate_replies(questions: list[dict], limits: list[int], chat_model, batch_size: int) -> None:
    """Fill in `reply` and `reply_ids` of questions, each of so many tokens at most, greedily."""
    model, eos = chat_model.model, chat_model.end_of_turn
    prompts = [question["ids"] for question in questions]
    room = [chat_model.context - len(ids) for ids in prompts]
    limits = [max(1, min(pair)) for pair in zip(limits, room, strict=True)]
    greedy = make_sampler(prompts, model.config.vocab_size, model.lm_head.weight.device)
    replies: list[list[int]] = [[] for _ in questions]
    done = 0
    steps = generate_batch(model, prompts, limits, greedy, eos, batch_size=batch_size)
    for row, _, token in steps:
        for number, token_id in zip(row.tolist(), token.tolist(), strict=True):
            replies[number].append(token_id)
            done += token_id == eos
        if sys.stderr.isatty():
            print(f"\r{done}/{len(questions)} ", end="", file=sys.stderr, flush=True)
    for question, reply in zip(questions, replies, strict=True):
        question["reply_ids"] = reply[: reply.index(eos)] if eos in reply else reply
        question["reply"] = chat_model.opening + chat_model.decode(reply)


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def format_table(questions: list[dict]) -> str:
    """Right answers per task and in all."""
    names = sorted({question["task"] for question in questions})
    groups = {name: [q for q in questions if q["task"] == name] for name in names}
    groups["total"] = questions
    width = max(len(name) for name in groups)
    lines = [f"{'task':{width}}  {'n':>5}  {'right':>5}  {'%':>5}"]
    for name, rows in groups.items():
        right = sum(question["right"] for question in rows)
        share = 100 * right / len(rows)
        lines.append(f"{name:{width}}  {len(rows):5}  {right:5}  {share:5.1f}")
    return "\n".join(lines)


def fields_of(question: dict, *keys: str) -> dict:
    """These keys of a question, and behind its prompt what would have been right."""
    fields = {}
    for key in keys:
        fields[key] = question[key]
        if key == "prompt" and "accept" in question:
            fields["accept"] = [pattern.pattern for pattern in question["accept"]]
        elif key == "prompt":
            fields["answer"] = question["answer"]
    return fields


def write_replies(questions: list[dict], out: Path) -> None:
    keys = ("line", "task", "prompt", "reply", "right")
    rows = [fields_of(question, *keys) for question in questions]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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
