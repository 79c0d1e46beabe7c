"""The server's speed beside generation without a server, transformers and llama.cpp, in one run.

    python benchmarks/serving/run.py                                    # a random model of 26 M
    python benchmarks/serving/run.py --weight out/full_sft_192.pth      # and a trained one
    python benchmarks/serving/run.py --only first_token gaps
    python benchmarks/serving/run.py --only peers --llama_python /opt/llama/bin/python

Needs requirements-serve.txt. `peers` is transformers' generate, one request after the other, and
llama.cpp's server (pip install "llama-cpp-python[server]") with the same weights in float32. Parts
take turns and medians count.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.serving.client import Reply, Server, post, serve
from model.generate_batch import generate_batch
from model.lm import LMConfig, MiniMindLM
from model.sampling import make_sampler
from model.weights import load_model
from runtime.chat_model import open_chat_model
from runtime.kernel_loader import apply_kernels

PARTS = ("throughput", "peers", "first_token", "gaps")
SHAPE = LMConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, max_seq_len=8192)  # 26 M
CLIENTS, NEW = 64, 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--weight", help="a .pth file; default: a random model of 26 M")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each variant takes")
    parser.add_argument("--llama_python", help="a Python that has llama_cpp with its server")
    return parser.parse_args()


def random_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    model, path = MiniMindLM(SHAPE), folder / "random.pth"
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(asdict(SHAPE)))
    return path


def random_prompts(count: int, low: int, high: int, vocab: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(300, vocab, (n,), generator=generator).tolist() for n in lengths]


def body(prompt: list[int] | str, new: int, stream: bool = True) -> dict:
    options = {"stream": stream, "temperature": 0, "max_tokens": new}
    if stream:
        options["stream_options"] = {"include_usage": True}
    return {"model": "bench", "prompt": prompt, **options}


async def at_once(
    server: Server, prompts: list[list[int]] | list[str], new: int, stream: bool
) -> list[Reply]:
    return await asyncio.gather(*(post(server, body(p, new, stream)) for p in prompts))


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def offline(model: MiniMindLM, prompts: list[list[int]], new: int) -> int:
    """Tokens of `generate_batch` for these prompts, end tokens included."""
    sampler = make_sampler(prompts, model.config.vocab_size, torch.device("cpu"))
    steps = generate_batch(model, prompts, [new] * len(prompts), sampler, end_of(model))
    return sum(len(token) for _, _, token in steps)


def end_of(model: MiniMindLM) -> int:
    """A token that ends a text."""
    return open_chat_model(model.path, torch.device("cpu")).end_of_turn


def throughput(model: MiniMindLM, server: Server, rounds: int) -> None:
    """64 clients at once, streaming and not, and `generate_batch` with the same prompts."""
    prompts = random_prompts(CLIENTS, 8, 60, model.config.vocab_size)
    new = min(NEW, model.config.max_seq_len - 64)
    asyncio.run(at_once(server, prompts, new, True))
    offline(model, prompts, new)
    speeds = {"offline": [], "streamed": [], "whole": []}
    for turn in range(rounds):
        prompts = random_prompts(CLIENTS, 8, 60, model.config.vocab_size, seed=turn + 1)
        started = time.perf_counter()
        count = offline(model, prompts, new)
        speeds["offline"].append(count / (time.perf_counter() - started))
        for name in ("streamed", "whole"):
            prompts = random_prompts(CLIENTS, 8, 60, model.config.vocab_size, seed=100 * turn + 7)
            # Other prompts than before: what the server has read is not read again.
            prompts = [[300 + turn, len(name), *ids] for ids in prompts]
            started = time.perf_counter()
            replies = asyncio.run(at_once(server, prompts, new, name == "streamed"))
            seconds = time.perf_counter() - started
            speeds[name].append(sum(tokens_of(reply) for reply in replies) / seconds)
    base = statistics.median(speeds["offline"])
    print(f"generate_batch, {CLIENTS} prompts: {base:.0f} tokens/s")
    for name in ("streamed", "whole"):
        speed = statistics.median(speeds[name])
        print(
            f"{CLIENTS} clients, {name}: {speed:.0f} tokens/s, {speed / base:.2f} of it (>= 0.85)"
        )


def tokens_of(reply: Reply) -> int:
    assert reply.status == 200, reply
    usage = reply.usage or json.loads(reply.body)["usage"]
    return usage["completion_tokens"]


def peers(model: MiniMindLM, server: Server, rounds: int, llama_python: str | None) -> None:
    prompts = random_prompts(CLIENTS, 8, 60, model.config.vocab_size)
    new = min(NEW, model.config.max_seq_len - 64)
    with tempfile.TemporaryDirectory() as scratch:
        export = [sys.executable, str(ROOT / "scripts/convert.py")]
        subprocess.run([*export, "to-hf", model.path, f"{scratch}/hf"], check=True)
        one_by_one = {"transformers": hf_speed(f"{scratch}/hf", prompts[:4], new)}
        if llama_python:
            chat = open_chat_model(model.path, torch.device("cpu"))
            texts = [chat.decode(ids) for ids in prompts]
            subprocess.run(
                [*export, "to-gguf", model.path, f"{scratch}/m.gguf", "--dtype=f32"], check=True
            )
            one_by_one["llama.cpp's server"] = llama_speed(
                llama_python, f"{scratch}/m.gguf", texts, new, model.config.max_seq_len
            )
    asyncio.run(at_once(server, prompts[::-1], new, True))
    speeds = []
    for turn in range(rounds):
        ours = [[300 + turn, *ids] for ids in prompts]
        started = time.perf_counter()
        replies = asyncio.run(at_once(server, ours, new, True))
        speeds.append(sum(map(tokens_of, replies)) / (time.perf_counter() - started))
    speed = statistics.median(speeds)
    for name, peer in one_by_one.items():
        print(f"{CLIENTS} clients / {name}: {speed:.0f} / {peer:.0f} tokens/s = {speed / peer:.1f}")


def hf_speed(folder: str, prompts: list[list[int]], new: int) -> float:
    """Tokens/s of transformers' generate, one request after the other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    speeds = []
    for ids in [prompts[0], *prompts]:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(torch.tensor([ids]), **options)
        speeds.append(new / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


def llama_speed(python: str, path: str, texts: list[str], new: int, context: int) -> float:
    """Tokens/s of llama.cpp's server with the same clients; it takes no token ids."""
    port = 18233
    command = [python, "-m", "llama_cpp.server", "--model", path, "--port", str(port)]
    command += ["--n_ctx", str(min(context, 1024)), "--n_threads", str(os.cpu_count())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        server = Server(process, "127.0.0.1", port)
        try:
            wait_until_open(server)
            asyncio.run(at_once(server, texts[:1], 8, False))
            started = time.perf_counter()
            replies = asyncio.run(at_once(server, texts[:8], new, False))
            seconds = time.perf_counter() - started
        finally:
            process.terminate()
    return sum(json.loads(r.body)["usage"]["completion_tokens"] for r in replies) / seconds


def wait_until_open(server: Server) -> None:
    import socket

    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection((server.host, server.port)):
            return
        time.sleep(0.1)
    raise SystemExit("llama.cpp's server did not start")


def first_token(model: MiniMindLM, server: Server, rounds: int) -> None:
    """Seconds to the first token of a prompt of 200 tokens, idle, and while 32 others stream."""
    vocab, idle, busy = model.config.vocab_size, [], []

    async def one(seed: int) -> float:
        reply = await post(server, body(random_prompts(1, 200, 200, vocab, seed)[0], 8))
        return reply.times[0] - reply.started

    async def among(seed: int) -> list[float]:
        streams = random_prompts(32, 8, 60, vocab, seed)
        tasks = [asyncio.create_task(post(server, body(ids, 600))) for ids in streams]
        await asyncio.sleep(3)
        seconds = [await one(seed + n) for n in range(1, 6)]
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)
        return seconds

    asyncio.run(one(999))
    for turn in range(rounds):
        idle += [asyncio.run(one(1000 * turn + 500 + n)) for n in range(5)]
        busy += asyncio.run(among(1000 * turn))
    low, high = statistics.median(idle), statistics.median(busy)
    print(f"first token, idle: {1e3 * low:.0f} ms; while 32 stream: {1e3 * high:.0f} ms, ", end="")
    print(f"{high / low:.2f} times (<= 3)")


def gaps(model: MiniMindLM, server: Server, rounds: int) -> None:
    """The longest gap of 16 streams while a prompt of 4,000 tokens arrives."""
    vocab, ratios = model.config.vocab_size, []

    async def among(seed: int) -> tuple[float, float, float]:
        streams = random_prompts(16, 8, 60, vocab, seed)
        tasks = [asyncio.create_task(post(server, body(ids, 500))) for ids in streams]
        await asyncio.sleep(2)
        long = await post(server, body(random_prompts(1, 4000, 4000, vocab, 100 + seed)[0], 8))
        replies = await asyncio.gather(*tasks)
        assert all(reply.times[-1] > long.times[0] for reply in replies)
        # Random weights write bytes that are no character, which wait for the rest of one.
        whole = [reply for reply in replies if "\ufffd" not in reply.text]
        between = [b - a for r in whole for a, b in zip(r.times[1:], r.times[2:], strict=False)]
        return max(between), statistics.median(between), long.times[0] - long.started

    for turn in range(rounds):
        longest, median, seconds = asyncio.run(among(turn))
        ratios.append(longest / median)
        print(f"4,000 tokens among 16 streams: longest gap {1e3 * longest:.0f} ms, median ", end="")
        print(
            f"{1e3 * median:.0f} ms, {longest / median:.2f} times (<= 3); read in {seconds:.1f} s"
        )
    print(f"median of these: {statistics.median(ratios):.2f} times (<= 3)")


def main() -> None:
    args = parse_args()
    gc.freeze()  # a collection over all modules would stop the clients for a third of a second
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(args.weight) if args.weight else random_weights(Path(scratch))
        model = load_model(path)
        model.path = path
        apply_kernels(model, torch.device("cpu"), "float32")
        context = str(min(model.config.max_seq_len, 4608))
        with serve(
            f"--model=bench={path}", "--max_concurrent=64", f"--context={context}"
        ) as server:
            if "throughput" in args.only:
                throughput(model, server, args.rounds)
            if "peers" in args.only:
                peers(model, server, args.rounds, args.llama_python)
            if "first_token" in args.only:
                first_token(model, server, args.rounds)
            if "gaps" in args.only and model.config.max_seq_len >= 4096:
                gaps(model, server, args.rounds)


if __name__ == "__main__":
    main()
