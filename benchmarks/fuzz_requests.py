"""Send malformed and odd requests to a server: each must be answered with 200 or 4xx, in good form.

Bodies are made by mutating good ones: fields are dropped, renamed, given values of other types and
extreme ones; the bytes are cut, doubled, flipped. An answer with 4xx must be OpenAI's error object.
Without --url a server of a tiny random model is started, whose output must hold no traceback.

    python benchmarks/fuzz_requests.py --count 2000
"""

import argparse
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODEL = "full_sft_32"
PATHS = ("/v1/chat/completions", "/v1/completions")
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a": "b"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "auto",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"5": 1},
    "seed": 1,
    "n": 2,
    "stop": ["x"],
    "max_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"enable_thinking": False},
}
JSON = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 3,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": FUNCTION["parameters"]}},
}  # fmt: skip
TEXT = {
    "model": MODEL,
    "prompt": ["a", [5, 6]],
    "max_tokens": 3,
    "logprobs": 2,
    "n": 1,
    "stream": False,
    "echo": False,
    "best_of": 1,
    "suffix": None,
    "user": "u",
}
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63),
    10**30, "", "x", "auto", "required", "none", "\u4f60\u597d", "\ud800", "\x00", "<|im_end|>",
    "<think>", "<tool_call>", "{}", "x" * 3000, [], [[]], [None], [1], ["a", 1], [[5], "a"], {},
    {"a": 1}, {"type": "function"}, {"type": "json_object"}, {"type": "json_schema"}, [{}],
    [{"role": "user"}], [{"role": "user", "content": ""}], {"$ref": "#/a"}, {"type": "object"},
    {"pattern": "("}, {"enum": []}, {"allOf": [{"type": "string"}, {"type": "number"}]},
]  # fmt: skip
NAMES = [
    "model",
    "messages",
    "prompt",
    "stream",
    "functions",
    "echo",
    "unknown",
    "",
    "a.b",
    "\ud800",
]


def mutate(value, rng: random.Random):
    """A copy of a JSON value with one place changed."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    if isinstance(value, list):
        copy, at = list(value), rng.randrange(len(value))
        action = rng.random()
        if action < 0.15:
            copy.insert(at, rng.choice(VALUES))
        elif action < 0.3:
            copy *= rng.choice((0, 2, 40))
        else:
            copy[at] = mutate(copy[at], rng)
        return copy
    copy, name = dict(value), rng.choice([*value])
    action = rng.random()
    if action < 0.15:
        del copy[name]
    elif action < 0.3:
        copy[rng.choice(NAMES)] = copy.pop(name)
    elif action < 0.45:
        copy[rng.choice(NAMES)] = rng.choice(VALUES)
    else:
        copy[name] = mutate(copy[name], rng)
    return copy


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are likely no JSON any more."""
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data + data,
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            b"[" * 100_000,
            b'{"a":' * 5000,
            data.replace(b"0.5", b"NaN").replace(b"1", b"1" * 5000),
            b"",
        ]
    )


def make_body(rng: random.Random) -> tuple[str, bytes]:
    """A path and what to send to it."""
    body = rng.choice((CHAT, CHAT, JSON, TEXT))
    path = PATHS[body is TEXT] if rng.random() < 0.95 else rng.choice(PATHS)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        body = mutate(body, rng)
    if isinstance(body, dict) and isinstance(body.get("max_tokens"), int) and rng.random() < 0.9:
        body = {**body, "max_tokens": min(body["max_tokens"], 5)}
    data = json.dumps(body).encode()
    return path, spoil(data, rng) if rng.random() < 0.1 else data


def check_answer(status: int, kind: str, data: bytes) -> str:
    """What is wrong with an answer; "": nothing."""
    text = data.decode("utf-8")
    if status == 200 and kind.startswith("text/event-stream"):
        events = text.removesuffix("\n\n").split("\n\n")
        if events[-1] != "data: [DONE]":
            return "the stream does not end with [DONE]"
        for event in events[:-1]:
            chunk = json.loads(event.removeprefix("data: "))
            if "error" in chunk:
                return f"an error in the stream: {event}"
        return ""
    answer = json.loads(text)
    if status == 200:
        return "" if answer["choices"] and answer["usage"] else "no choices"
    if not 400 <= status < 500:
        return "neither 200 nor 4xx"
    error = answer.get("error", {})
    fits = {*error} == {"message", "type", "param", "code"} and error["message"]
    return "" if fits and "\n" not in error["message"] else "not OpenAI's form of an error"


def fuzz(url: str, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Send `count` requests.

    Returns:
        How many answers had which status, and what was wrong.
    """
    statuses, faults, address = Counter(), [], urlsplit(url)
    for number in range(count):
        path, data = make_body(random.Random(f"{seed} {number}"))
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        body, kind = response.read(), response.headers.get("content-type", "")
        connection.close()
        statuses[response.status] += 1
        try:
            fault = check_answer(response.status, kind, body)
        except (ValueError, KeyError) as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            shown = data if len(data) < 600 else data[:600] + b"..."
            faults.append(f"{number}: {fault}: {response.status} {body[:300]!r} to {shown!r}")
    return statuses, faults


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """A server of a tiny random model, and its address; it prints into the file `folder/log`."""
    import torch

    from dataset.tokenizer import load_tokenizer
    from model.lm import LMConfig, MiniMindLM

    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 2048}
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **sizes))
    torch.save(model.state_dict(), folder / f"{MODEL}.pth")
    (folder / f"{MODEL}.json").write_text(model.config.to_json())
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--out_dir", str(folder)]
    command += ["--port", "0", "--device", "cpu", "--max_concurrent", "16"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    line = process.stdout.readline()
    found = re.match(r"(http://\S+:\d+)", line)
    if not found:
        raise ValueError(f"the server did not start: {(folder / 'log').read_text()}")
    return process, found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_server(Path(folder))
        try:
            statuses, faults = fuzz(url, args.count, args.seed)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        log = (Path(folder) / "log").read_text()
    print(*faults[:20], sep="\n")
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"{args.count} bodies: {counts}; {len(faults)} wrong; exit code {code}")
    if log:
        print(f"the server printed:\n{log[-3000:]}")
    return 1 if faults or log or code else 0


if __name__ == "__main__":
    sys.exit(main())
