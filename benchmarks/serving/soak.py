"""Thousands of requests as the world sends them, and what is left of a server afterwards.

Most ask and read the answer, streamed or whole; a fifth hang up in the middle of a stream; some
send what is no request; some read slowly. Every answer must be what the model says alone, to the
letter; then no slot may be taken, and the memory must be that of the start.

    python benchmarks/serving/soak.py                                   # 10,000 requests
    python benchmarks/serving/soak.py --weight out/full_sft_192.pth --requests 2000
"""

import argparse
import asyncio
import collections
import json
import random
import re
import tempfile
import urllib.request
from itertools import takewhile
from pathlib import Path

import run  # beside this file; it puts the project on sys.path
import torch
from client import Server, post, serve

from dataset.pretrain_dataset import end_of_text
from model.generate_batch import generate_batch
from model.sampling import make_sampler
from model.weights import load_model
from runtime.chat_model import open_chat_model

AT_ONCE, PROMPTS, NEW = 96, 60, 40
KINDS = {"streamed": 0.45, "whole": 0.2, "leaves": 0.2, "malformed": 0.1, "slow": 0.05}
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b'{"prompt": 3}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "n": 1e9}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "a", "model": "nobody"}',
    b'{"prompt": [1, 99999999]}',
    b"[" * 10_000,
]


def references(path: Path) -> list[tuple[list[int], str]]:
    """Prompts, and what the model says to each when it is alone."""
    chat = open_chat_model(path, torch.device("cpu"))
    model, prompts = chat.model, run.random_prompts(PROMPTS, 4, 40, chat.model.config.vocab_size)
    prompts += [[*prompts[0], *ids] for ids in prompts[:10]]  # that begin alike
    answers, tokenizer = [], chat.coder.tokenizer
    ends = {*chat.coder.ends, end_of_text(tokenizer)}
    for ids in prompts:
        sampler = make_sampler([ids], model.config.vocab_size, torch.device("cpu"))
        steps = generate_batch(model, [ids], [NEW], sampler)
        tokens = [int(token) for _, _, token in steps]
        answers.append((ids, tokenizer.decode(list(takewhile(lambda t: t not in ends, tokens)))))
    return answers


async def one(server: Server, kind: str, dice: random.Random, answers: list) -> str:
    """A request; returns what was wrong with the answer."""
    if kind == "malformed":
        reply = await post(server, dice.choice(MALFORMED))
        error = json.loads(reply.body).get("error", {})
        good = 400 <= reply.status < 500 and {"message", "type", "param", "code"} <= error.keys()
        return "" if good else f"{reply.status} {reply.body[:200]!r}"
    ids, wanted = dice.choice(answers)
    body = run.body(ids, NEW, stream=kind != "whole")
    leave = dice.randint(1, 6) if kind == "leaves" else None
    reply = await post(server, body, leave_after=leave, slow=0.05 if kind == "slow" else 0.0)
    if reply.status == 429:
        return "busy"
    text = json.loads(reply.body)["choices"][0]["text"] if kind == "whole" else reply.text
    right = wanted.startswith(text) if kind == "leaves" else text == wanted
    return "" if right and reply.status == 200 else f"{reply.status} {text!r}, not {wanted!r}"


async def soak(server: Server, count: int, answers: list) -> collections.Counter:
    """Send so many requests, AT_ONCE at a time; returns what went wrong, and how often."""
    dice, faults = random.Random(0), collections.Counter()
    kinds = dice.choices(list(KINDS), list(KINDS.values()), k=count)
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            try:
                fault = await one(server, kinds[number], dice, answers)
            except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
                fault = repr(error)
            if fault == "busy":
                faults["busy"] += 1
            elif fault:
                faults[f"{kinds[number]}: {fault}"] += 1
            if number % 1000 == 999:
                print(f"{number + 1} requests, {memory(server):.0f} MiB", flush=True)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return faults


def memory(server: Server) -> float:
    """MiB that the server's process holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{server.host}:{server.port}/metrics") as page:
        lines = page.read().decode().splitlines()
    values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in values}


async def until_idle(server: Server) -> bool:
    for _ in range(100):
        now = await asyncio.to_thread(metrics, server)
        if not now["minimind_requests_running"] and not now["minimind_requests_waiting"]:
            return True
        await asyncio.sleep(0.1)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", help="a .pth file; default: a random model of 26 M")
    parser.add_argument("--requests", type=int, default=10_000, help="how many")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(args.weight) if args.weight else run.random_weights(Path(scratch))
        answers = references(path)
        context = str(min(load_model(path).config.max_seq_len, 512))
        flags = f"--model=bench={path}", f"--context={context}", "--max_waiting=64"
        with serve(*flags) as server:
            asyncio.run(soak(server, 200, answers))
            start = memory(server)
            faults = asyncio.run(soak(server, args.requests, answers))
            idle = asyncio.run(until_idle(server))
            end = memory(server)
    busy = faults.pop("busy", 0)
    for fault, count in faults.most_common(5):
        print(f"{count} x {fault}")
    print(
        f"{args.requests} requests: {faults.total()} wrong (0), {busy} refused as too many; ",
        end="",
    )
    print(
        f"{'no slot' if idle else 'SLOTS'} taken afterwards; memory {start:.0f} MiB after 200 ",
        end="",
    )
    print(f"requests, {end:.0f} at the end, {100 * (end / start - 1):+.1f} % (within 5 %)")


if __name__ == "__main__":
    main()
