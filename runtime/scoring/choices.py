"""Questions with choices, scored by the log-probability of each choice."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from dataset.chat_rows import detect_format, normalise_row
from dataset.choice_rows import read_choice_row
from dataset.pretrain_dataset import end_of_text
from dataset.progress import count_bar
from runtime.scoring.likelihood import Continuation, score_continuations, text_begin


def read_choice_question(row: dict, model) -> dict:
    """One row as {task, prompt, choices, answer (its number), continuations}.

    Args:
        model: a `chat_model.ChatModel`; one that was opened raw continues the text of the row.

    Raises:
        ValueError: a fault of the row; it does not fit the context.
    """
    question = read_choice_row(row)
    messages, tools = [{"role": "user", "content": question.text}], None
    if not question.text:
        rest = {name: value for name, value in row.items() if name not in ("choices", "answer")}
        messages, tools = normalise_row(rest, detect_format(rest), need_assistant=False)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last turn must not be the assistant's: choices are what it says")
    if model.coder is None:
        if len(messages) > 1 or tools:
            raise ValueError(
                "--raw 1 continues a text: give it as 'prompt', without turns or tools"
            )
        text = messages[0]["content"]
        before = text_begin(model.tokenizer)
        gap = " " if needs_blank(text) else ""
        texts = [f"{text}{gap}{choice}" for choice in question.choices]
    else:
        before = []
        text = model.coder.prompt_text(messages, tools, thinking=False)
        texts = [f"{text}{choice}" for choice in question.choices]
    wholes = [before + ids for ids in model.plain.batch(texts)]
    continuations = split_choices(before + model.plain(text), wholes)
    if not continuations[0].context:
        continuations = [Continuation([end_of_text(model.tokenizer)], ids) for ids in wholes]
    longest = max(len(ids) + len(context) for context, ids in continuations)
    if longest > model.context + 1:
        sizes = f"{longest} tokens, the context of the model is {model.context}"
        raise ValueError(f"the prompt with its longest choice makes {sizes}: shorten it")
    earlier = {"conversations": messages} if len(messages) > 1 else {}
    return earlier | {
        "task": question.task,
        "prompt": messages[-1]["content"],
        "choices": question.choices,
        "answer": question.right,
        "continuations": continuations,
    }


def needs_blank(text: str) -> bool:
    """Whether a blank stands between a text and what continues it: not in Chinese."""
    return not text[-1:].isspace() and unicodedata.east_asian_width(text[-1:] or " ") not in "WF"


def split_choices(prompt: list[int], wholes: Sequence[list[int]]) -> list[Continuation]:
    """Texts as a prompt, the same for all, and what continues it.

    The last tokens of the prompt may merge with the beginnings of choices: these count as choice.
    """
    most = min(len(prompt), *(len(ids) - 1 for ids in wholes))
    pairs = (zip(prompt[:most], ids, strict=False) for ids in wholes)
    same = min(next((n for n, (a, b) in enumerate(pair) if a != b), most) for pair in pairs)
    return [Continuation(prompt[:same], ids[same:]) for ids in wholes]


def score_choices(questions: Sequence[dict], model) -> None:
    """Fill in `logprobs`, `choice`, `right`, and the same normalised by length, of every question.

    Normalised is the log-probability per byte of the choice, as in lm-eval's acc_bytes.
    """
    continuations = [part for question in questions for part in question["continuations"]]
    with count_bar(len(continuations), "scoring choices", " choices") as bar:
        likelihoods = score_continuations(model.model, continuations, bar.update)
    scores = iter(likelihood.logprob for likelihood in likelihoods)
    for question in questions:
        logprobs = np.array([next(scores) for _ in question["choices"]])
        sizes = np.array([len(choice.encode()) for choice in question["choices"]])
        best, best_norm = int(logprobs.argmax()), int((logprobs / sizes).argmax())
        question["logprobs"], question["choice"] = logprobs.tolist(), best
        question["right"] = best == question["answer"]
        question["choice_norm"] = best_norm
        question["right_norm"] = best_norm == question["answer"]
