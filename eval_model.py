"""Chat with a model in the terminal, or score it on a file of prompts with known answers.

Reads the weights (out/full_sft_512.pth), the configuration beside them (out/full_sft_512.json) and
the tokenizer. Without flags it takes the newest SFT weights in out/. Replies are streamed; text
that you type is always text, also where it spells a control token.

    python eval_model.py                                                # chat; /clear forgets, /exit leaves
    python eval_model.py --prompt "Who are you?"                        # one reply and nothing else
    printf 'hi\\nwho are you?\\n' | python eval_model.py                  # a conversation from a
    pipe
    python eval_model.py --weight pretrain --raw 1 --prompt "Once upon" # continue plain text, without the chat layout
    python eval_model.py --eval_file dataset/demo/held_out.jsonl        # a table of exact matches
    python eval_model.py --lora lora                                    # with the adapter of train_lora.py
"""

import argparse
import errno
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import torch

from dataset.chat_format import (
    IM_END,
    THINK,
    ChatCoder,
    chat_coder,
    decode_reply,
    detect_format,
    encode_chat,
    encode_prompt,
    final_answer,
    normalise_row,
)
from dataset.chat_rows import present
from dataset.lm_dataset import load_tokenizer
from dataset.read_rows import read_rows
from model.generate import generate_batch, make_sampler, stream_text
from model.lm import MiniMindLM
from model.lora import merge_adapter
from model.weights import load_model, newest_weights
from runtime import launch
from runtime.exits import end_with_reader
from runtime.kernel_loader import apply_kernels
from runtime.terminal import naming, prepare_streams


@dataclass
class Speaker:
    """What producing a reply needs."""

    model: MiniMindLM
    coder: ChatCoder
    decode: Callable[[list[int]], str]  # ids of a reply -> its text
    thinking: bool
    sampling: dict  # arguments of MiniMindLM.stream

    @property
    def end_of_turn(self) -> int:
        return self.coder.fixed[IM_END][0]

    @property
    def opening(self) -> str:
        """What a reply begins with that stands in the prompt already."""
        return f"{THINK}\n" if self.thinking else ""

    def encode(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """The prompt ids of a conversation. ValueError: they leave no room for a reply."""
        return self.check(encode_prompt(messages, tools, self.coder, self.thinking))

    def check(self, ids: list[int]) -> list[int]:
        context = self.model.config.max_seq_len
        if len(ids) >= context:
            raise ValueError(
                f"the prompt makes {len(ids)} tokens, the context of the model is {context}:"
                " shorten it"
            )
        return ids


# --------------------------------------------------------------------------------------------------
# Chat
# --------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, end="", flush=True)


def clean(text: str) -> str:
    """Text as typed, whatever the locale: bytes that Python could not decode arrive as lone
    surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def speak(speaker: Speaker, prompt: list[int], name: str = "") -> tuple[list[int], bool]:
    """Stream one reply to the terminal, behind a name. Returns its ids, and whether Ctrl-C cut it
    short."""
    reply, stopped = [], []

    def stop(*_) -> None:  # an exception at any instant could get lost inside the model
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    before = signal.signal(signal.SIGINT, stop)
    say(name + speaker.opening)
    for piece in stream_text(speaker.model, speaker.decode, prompt, reply, **speaker.sampling):
        say(piece)
        if stopped:
            break
    signal.signal(signal.SIGINT, before)
    say(" (stopped)\n" if stopped else "\n")
    return reply, bool(stopped)


def fit(
    system: list[int], turns: list[list[int]], question: list[int], speaker: Speaker
) -> tuple[list[int], int]:
    """Drop turns from the front, never the system turn, until the prompt leaves a quarter of the
    context for a reply.

    Args:
        system: ids of the system turn.
        turns: ids of each earlier question with its reply.
        question: ids of the new one, up to where the model is to speak.

    Returns:
        The ids of the prompt, and how many turns were dropped.

    Raises:
        ValueError: the question alone does not fit.
    """
    context = speaker.model.config.max_seq_len
    room = context - min(speaker.sampling["max_new_tokens"], context // 4)
    length, dropped = len(system) + sum(map(len, turns)) + len(question), 0
    while dropped < len(turns) and length > room:
        length, dropped = length - len(turns[dropped]), dropped + 1
    return speaker.check(sum(turns[dropped:], system) + question), dropped


def read_lines(interactive: bool) -> Iterator[str | None]:
    """What the user types, line by line; None for Ctrl-C. Ends with the input."""
    while True:
        try:
            line = input("you> ") if interactive else sys.stdin.readline()
        except EOFError:
            return say("\n")
        except KeyboardInterrupt:
            yield None
            continue
        if not interactive:
            if not line:
                return None
            say(f"you> {line.rstrip()}\n")  # so that the output reads as a conversation
        yield line


def chat(speaker: Speaker, system: list[dict], interactive: bool) -> None:
    """The conversation, until /exit, the end of the input, or Ctrl-C twice.

    What was said is kept as ids: a reply is read again as it was written, with its thinking and its
    tool calls.
    """
    system_ids = encode_chat(system, None, speaker.coder)[0] if system else []
    end_of_reply = [*speaker.coder.fixed[IM_END], *speaker.coder.fixed["\n"]]
    turns, interrupted = [], False
    for line in read_lines(interactive):
        if line is None:
            if interrupted:
                raise KeyboardInterrupt
            say("\n(Ctrl-C again or /exit leaves)\n")
            interrupted = True
            continue
        text, interrupted = line.strip(), False
        if text == "/exit":
            return
        if text == "/clear":
            turns = []
            say("(the conversation starts anew)\n")
        elif text:
            question = encode_prompt(
                [{"role": "user", "content": text}], None, speaker.coder, speaker.thinking
            )
            try:
                prompt, dropped = fit(system_ids, turns, question, speaker)
            except ValueError as error:
                say(f"({error})\n")
                continue
            if dropped:
                say(
                    f"(the context is full: dropped the oldest {dropped}"
                    f" turn{'s' * (dropped > 1)})\n"
                )
            reply, interrupted = speak(speaker, prompt, "bot> ")
            turns = [*turns[dropped:], question + reply + end_of_reply]


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


def read_questions(path: Path, speaker: Speaker) -> list[dict]:
    """The rows of an evaluation file: {"task", "conversations": [..., user turn]} and what is
    right.

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
            questions.append({"line": line, **read_question(row, speaker)})
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: no rows")
    return questions


def read_question(row: dict, speaker: Speaker) -> dict:
    """One row as {task, prompt, answer or accept, parts}; parts: ids up to each place where the
    model speaks."""
    messages, tools = normalise_row(row, detect_format(row), need_assistant=False)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "the last turn must not be the assistant's: that is what the model is to say"
        )
    row = present(row)
    task, answer, accept = row.get("task", "all"), row.get("answer"), row.get("accept")
    if not isinstance(task, str) or not isinstance(answer, str) and accept is None:
        raise ValueError("'answer', and 'task' if it is there, must be strings")
    if answer is not None and accept is not None:
        raise ValueError("a row has 'answer' or 'accept', not both")
    question = {"task": task, "prompt": messages[-1]["content"]}
    if accept is None:
        question |= {"answer": answer, "answer_len": len(speaker.coder.plain(final_answer(answer)))}
    else:
        question["accept"] = read_patterns(accept)
    turns = [message["role"] for message in messages]
    ends = [n for n in range(1, len(turns)) if turns[n - 1] == turns[n] == "user"] + [len(turns)]
    starts = [0, *ends[:-1]]
    question["parts"] = [
        speaker.encode(messages[start:end], tools if start == 0 else None)
        for start, end in zip(starts, ends, strict=True)
    ]
    speaker.check(sum(question["parts"], []))
    return question


def read_patterns(accept: object) -> list[re.Pattern]:
    """The regular expressions of a row."""
    if (
        not isinstance(accept, list)
        or not accept
        or not all(isinstance(pattern, str) for pattern in accept)
    ):
        raise ValueError("'accept' must be a list of regular expressions")
    try:
        return [re.compile(pattern, re.IGNORECASE) for pattern in accept]
    except re.error as error:
        raise ValueError(f"'accept': {error.pattern!r} is no regular expression: {error}") from None


def answer_all(questions: list[dict], speaker: Speaker, batch_size: int) -> None:
    """Fill in `reply`, as the model wrote it, and `right` of every question, greedily.

    A reply twice as long as the answer is wrong already and is cut there, unless the model thinks
    first. Replies to earlier turns leave half of what room there is to those that follow.
    """
    end_of_reply = [*speaker.coder.fixed[IM_END], *speaker.coder.fixed["\n"]]
    longest, context = speaker.sampling["max_new_tokens"], speaker.model.config.max_seq_len
    for question in questions:
        question["ids"] = question["parts"][0]
    for turn in range(1, max(len(question["parts"]) for question in questions)):
        rows = [question for question in questions if len(question["parts"]) > turn]
        room = [context - len(q["ids"]) - sum(map(len, q["parts"][turn:])) for q in rows]
        write_replies(
            rows, [max(1, min(longest, tokens // 2)) for tokens in room], speaker, batch_size
        )
        for question in rows:
            talk = question["ids"] + question["reply_ids"] + end_of_reply + question["parts"][turn]
            question["ids"] = talk[1 - context :]  # a talk that is full loses its beginning
    limits = [
        (
            longest
            if speaker.thinking or "accept" in question
            else min(longest, 2 * question["answer_len"] + 16)
        )
        for question in questions
    ]
    write_replies(questions, limits, speaker, batch_size)
    thinkers = [q for q in questions if THINK in q["reply"]]
    if not speaker.thinking and thinkers:
        write_replies(thinkers, [longest] * len(thinkers), speaker, batch_size)
    for question in questions:
        reply = final_answer(question["reply"])
        if "accept" in question:
            question["right"] = any(pattern.search(reply) for pattern in question["accept"])
        else:
            question["right"] = reply == final_answer(question["answer"])


def write_replies(
    questions: list[dict], limits: list[int], speaker: Speaker, batch_size: int
) -> None:
    """Fill in `reply` and `reply_ids` of some questions, each of so many tokens at most,
    greedily."""
    eos, done, prompts = speaker.end_of_turn, 0, [question["ids"] for question in questions]
    context = speaker.model.config.max_seq_len
    limits = [max(1, min(n, context - len(ids))) for n, ids in zip(limits, prompts, strict=True)]
    replies: list[list[int]] = [[] for _ in questions]
    greedy = make_sampler(
        prompts, speaker.model.config.vocab_size, speaker.model.lm_head.weight.device
    )
    for row, _, token in generate_batch(
        speaker.model, prompts, limits, greedy, eos, batch_size=batch_size
    ):
        for number, token_id in zip(row.tolist(), token.tolist(), strict=True):
            replies[number].append(token_id)
            done += token_id == eos
        if sys.stderr.isatty():
            print(f"\r{done}/{len(questions)} ", end="", file=sys.stderr, flush=True)
    for question, reply in zip(questions, replies, strict=True):
        question["reply_ids"] = reply[: reply.index(eos)] if eos in reply else reply
        question["reply"] = speaker.opening + speaker.decode(reply)


def table(questions: list[dict]) -> str:
    """Right answers per task and in all."""
    groups = {
        name: [q for q in questions if q["task"] == name]
        for name in sorted({q["task"] for q in questions})
    }
    groups["total"] = questions
    width = max(len(name) for name in groups)
    lines = [f"{'task':{width}}  {'n':>5}  {'right':>5}  {'%':>5}"]
    for name, rows in groups.items():
        right = sum(q["right"] for q in rows)
        lines.append(f"{name:{width}}  {len(rows):5}  {right:5}  {100 * right / len(rows):5.1f}")
    return "\n".join(lines)


def temporary_path(out: Path) -> Path:
    """The file beside `out` that takes its place once it is whole; a device or a pipe is written to
    as it is."""
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
        elif (
            out.is_fifo()
        ):  # stays open: who reads it would take this for its end; an error where nobody does
            os.open(out, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(
            f"--eval_out {path}: cannot be written: {error.strerror}; name another file"
        ) from None


def shown(question: dict, *keys: str) -> dict:
    """What is told of a question: these keys, and behind its prompt what would have been right."""
    told = {}
    for key in keys:
        told[key] = question[key]
        if key == "prompt" and "accept" in question:
            told["accept"] = [pattern.pattern for pattern in question["accept"]]
        elif key == "prompt":
            told["answer"] = question["answer"]
    return told


def evaluate(args: argparse.Namespace, speaker: Speaker) -> None:
    """Score the model on args.eval_file, print the table, write the replies to args.eval_out."""
    questions, started = read_questions(Path(args.eval_file), speaker), time.monotonic()
    answer_all(questions, speaker, args.batch_size)
    print(f"{table(questions)}\n{len(questions)} prompts in {time.monotonic() - started:.1f} s")
    for q in [q for q in questions if not q["right"]][: args.show_wrong]:
        print(f"\nline {q['line']} ({q['task']})")
        for key, value in shown(q, "prompt", "reply").items():
            print(f"  {key:6} {json.dumps(value, ensure_ascii=False)}")
    if args.eval_out:
        out = Path(args.eval_out).absolute()
        rows = [
            shown(question, "line", "task", "prompt", "reply", "right") for question in questions
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        temporary = temporary_path(out)
        with naming(out):
            temporary.write_text("".join(lines), encoding="utf-8")
        if temporary != out:
            temporary.replace(out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = launch.usage_error
    what = parser.add_argument_group("what to do (without these: chat)")
    what.add_argument("--prompt", help="print the reply to this text and exit")
    what.add_argument(
        "--raw",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: --prompt is plain text to be continued",
    )
    what.add_argument(
        "--eval_file", help="score on this file: rows with task, conversations and answer or accept"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--weight", default="full_sft", help="stage name (its newest weights), run name or path"
    )
    model.add_argument(
        "--lora", help="adapter on top of these weights: stage name, run name or path"
    )
    model.add_argument("--out_dir", default=str(ROOT / "out"), help="where weights are looked for")
    model.add_argument(
        "--tokenizer_dir", default=str(ROOT / "model/minimind_tokenizer"), help="tokenizer folder"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    model.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on GPU"
    )
    reply = parser.add_argument_group("reply")
    reply.add_argument("--system", default="", help="system message")
    reply.add_argument(
        "--thinking",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: the model thinks before it answers",
    )
    reply.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the most probable token"
    )
    reply.add_argument("--top_k", type=int, default=0, help="sample among so many tokens (0: all)")
    reply.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens of this probability",
    )
    reply.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: repeats itself less"
    )
    reply.add_argument("--max_new_tokens", type=int, default=256, help="longest reply in tokens")
    reply.add_argument("--seed", type=int, default=42, help="seed of everything random")
    score = parser.add_argument_group("scoring (greedy, whatever the flags above)")
    score.add_argument("--batch_size", type=int, default=64, help="prompts answered at once")
    score.add_argument("--eval_out", help="write every reply to this file, as JSON lines")
    score.add_argument(
        "--show_wrong", type=int, default=0, metavar="N", help="print the first N wrong replies"
    )
    args = parser.parse_args()
    launch.check_flags(
        {name: value for name, value in vars(args).items() if name != "temperature" or value != 0}
    )
    for name, good, must in (
        ("prompt", args.prompt is None or args.prompt.strip(), "not be empty"),
        ("raw", not args.raw or args.prompt is not None, "come with --prompt"),
        ("eval_file", not args.eval_file or args.prompt is None, "not come with --prompt"),
    ):
        if not good:
            raise ValueError(f"--{name} {getattr(args, name)}: must {must}")
    return args


def main() -> int:
    # 1. Flags, device, random state
    args = parse_args()
    end_with_reader()
    if args.eval_file and args.eval_out:
        check_writable(args.eval_out)
    if not os.environ.get("PYTHONIOENCODING"):
        prepare_streams("utf-8")  # whatever the locale
    name = (
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    )
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    generator = torch.Generator(device).manual_seed(args.seed)

    # 2. Model and tokenizer
    path = newest_weights(args.weight, args.out_dir)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = load_model(path)
    if args.lora:
        merge_adapter(model, newest_weights(args.lora, args.out_dir, "--lora"))
    model = model.to(device, getattr(torch, dtype))
    apply_kernels(model, device, dtype)
    tokenizer = load_tokenizer(args.tokenizer_dir, model.config.vocab_size)
    flags = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
    sampling = {flag: getattr(args, flag) for flag in flags} | {"generator": generator}
    decode = tokenizer.decode if args.raw else functools.partial(decode_reply, tokenizer=tokenizer)
    speaker = Speaker(model, chat_coder(tokenizer), decode, bool(args.thinking), sampling)
    sampling["eos_token_id"] = tokenizer.pad_token_id if args.raw else speaker.end_of_turn

    # 3. Score, answer once, or chat
    system = [{"role": "system", "content": clean(args.system)}] if args.system else []
    if args.eval_file:
        evaluate(args, speaker)
    elif args.prompt is not None:
        text = clean(args.prompt)
        ids = speaker.check(speaker.coder.plain(text)) if args.raw else None
        _, stopped = speak(
            speaker, ids or speaker.encode([*system, {"role": "user", "content": text}])
        )
        return 130 if stopped else 0
    else:
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  # arrow keys and history in input()
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
        say(
            f"{path.stem}: {size}, context of {model.config.max_seq_len} tokens. /clear forgets,"
            " /exit leaves\n"
        )
        chat(speaker, system, interactive)
    return 0


if __name__ == "__main__":
    launch.run(main)
