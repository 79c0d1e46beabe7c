"""Questions that a model answers in words: its replies, and whether they are right."""

import contextlib
import re
import signal
from collections.abc import Iterator

from dataset.chat_rows import detect_format, normalise_row
from dataset.checks import present
from dataset.progress import count_bar
from dataset.replies import THINK, final_answer
from dataset.talk import Talk
from model.generate_batch import generate_batch
from model.sampling import make_sampler
from runtime.scoring.calls import check_offered, judge_calls, read_expected_calls

SECONDS = 5.0  # of the CPU, for the regular expressions of a row

# --------------------------------------------------------------------------------------------------
# Questions
# --------------------------------------------------------------------------------------------------


def read_question(row: dict, model) -> dict:
    """One row: {"task", "conversations": [..., user turn]} and what would be a right reply.

    That is "answer", the reply to the letter or the tool calls in it, or "accept", a list of
    regular expressions of which the reply must contain one, in either case. Where a user turn
    follows a user turn, the model answers the first one itself.

    Returns:
        {prompt, talk, parts, sizes} and what `read_answer` gives. talk: the conversation, nothing
        of which was said yet. parts: the turns up to each position where the model speaks. sizes:
        their tokens.

    Raises:
        ValueError: a fault of the row, or it does not fit the context.
    """
    if model.coder is None:
        raise ValueError("--raw 1: only rows with 'choices' are scored without the chat layout")
    messages, tools = normalise_row(row, detect_format(row), need_assistant=False)
    if messages[-1]["role"] == "assistant":
        fault = "the last turn must not be the assistant's"
        raise ValueError(f"{fault}: that is what the model is to say")
    question = {"prompt": messages[-1]["content"], **read_answer(present(row), model)}
    if len(messages) > 1:
        question["conversations"] = messages
    if "calls" in question:
        check_offered(question["calls"], tools)
    turns = [message["role"] for message in messages]
    ends = [n for n in range(1, len(turns)) if turns[n - 1] == turns[n] == "user"] + [len(turns)]
    starts = [0, *ends[:-1]]
    parts = [messages[start:end] for start, end in zip(starts, ends, strict=True)]
    ids = [model.encode(part, tools if n == 0 else None) for n, part in enumerate(parts)]
    question |= {
        "parts": parts,
        "sizes": list(map(len, ids)),
        "talk": Talk(model.coder, tools, model.thinking),
    }
    model.check(sum(ids, []))
    return question


def read_answer(row: dict, model) -> dict:
    """{task} and {answer, answer_len}, {answer, calls} or {accept} of a row."""
    task, answer, accept = row.get("task", "all"), row.get("answer"), row.get("accept")
    if not isinstance(task, str) or not isinstance(answer, str | dict) and accept is None:
        raise ValueError("'answer', and 'task' if it is there, must be strings")
    if answer is not None and accept is not None:
        raise ValueError("a row has 'answer' or 'accept', not both")
    if accept is not None:
        return {"task": task, "accept": read_patterns(accept)}
    if isinstance(answer, dict):
        return {"task": task, "answer": answer, "calls": read_expected_calls(answer)}
    return {"task": task, "answer": answer, "answer_len": len(model.plain(final_answer(answer)))}


def read_patterns(accept: object) -> list[re.Pattern]:
    """The regular expressions of a row."""
    is_list = isinstance(accept, list) and bool(accept)
    if not is_list or not all(isinstance(pattern, str) for pattern in accept):
        raise ValueError("'accept' must be a list of regular expressions")
    if "" in accept:
        raise ValueError("'accept': an empty regular expression is found in every reply")
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
        judge(question)


def judge(question: dict) -> None:
    """Fill in whether the reply is right, and for tool calls what of it."""
    reply = final_answer(question["reply"])
    if "calls" in question:
        judge_calls(question)
    elif "accept" in question:
        with time_limit(f"{question['place']}: 'accept': a regular expression"):
            question["right"] = any(pattern.search(reply) for pattern in question["accept"])
    else:
        question["right"] = reply == final_answer(question["answer"])


@contextlib.contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Stop what takes long: a regular expression of nested repeats may search for years.

    Raises:
        ValueError: it has taken more than SECONDS of the CPU; never on Windows, which has no timer.
    """

    def stop(*_) -> None:
        raise ValueError(f"{what} takes more than {SECONDS:g} s: write it without nested repeats")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def reply_limit(question: dict, model) -> int:
    """The most tokens of the last reply."""
    longest = model.sampling["max_new_tokens"]
    if model.thinking or "answer_len" not in question:
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
    steps = generate_batch(model, prompts, limits, greedy, eos, batch_size=batch_size)
    with count_bar(len(questions), "scoring", " replies") as bar:
        for row, _, token in steps:
            for number, token_id in zip(row.tolist(), token.tolist(), strict=True):
                replies[number].append(token_id)
                bar.update(token_id == eos or len(replies[number]) == limits[number])
    for question, reply in zip(questions, replies, strict=True):
        question["reply_ids"] = reply[: reply.index(eos)] if eos in reply else reply
        question["reply"] = chat_model.opening + chat_model.decode(reply)
