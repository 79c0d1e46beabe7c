"""scripts/serve.py as a process: what it refuses to start with, its limits, its end."""

import asyncio
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import torch
from documents import blocks
from running import ROOT, run_script
from serving import NAME, Server, save, user, with_context

from dataset.tokenizer import load_tokenizer
from model.lm import LMConfig, MiniMindLM
from model.lora import adapter_json, adapter_tensors, add_lora
from model.weights import config_from_json

for package in ("starlette", "uvicorn", "httptools"):
    pytest.importorskip(package, reason="pip install -r requirements-serve.txt")

CHAT = "/v1/chat/completions"
ENDLESS = {"logit_bias": {"2": -100}, "stream": True}  # without an end of turn, up to the context
LONG = 30_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256}
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **sizes))
    return save(model, tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def long_weights(weights, tmp_path_factory):
    return with_context(weights, tmp_path_factory.mktemp("long"), LONG)


@pytest.fixture
def serve():
    """serve(out_dir, *flags, env=) -> the running Server."""
    running = []

    def start(*args, **options) -> Server:
        running.append(Server(*args, **options))
        return running[-1]

    yield start
    for server in running:
        text = server.log
        server.close()
        assert "Traceback" not in text, text


class Client:
    """One connection to a server."""

    def __init__(self, server: Server):
        address = urlsplit(server.url)
        self.connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def ask(self, path: str, body=None, headers=None, method: str = ""):
        """Send a request; returns the answer, not yet read."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} if data else {}
        method = method or ("GET" if data is None else "POST")
        self.connection.request(method, path, data, {**fields, **(headers or {})})
        return self.connection.getresponse()

    def error(self, *args, **options) -> tuple[int, dict]:
        answer = self.ask(*args, **options)
        return answer.status, json.loads(answer.read())["error"]

    def close(self) -> None:
        """Go away, whatever is still to come."""
        self.connection.close()


def chat(**fields) -> dict:
    return {"model": NAME, "messages": [user("hi")], **fields}


def metric(server: Server, name: str) -> int:
    text = Client(server).ask("/metrics").read().decode()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


# --------------------------------------------------------------------------------------------------
# What it does not start with
# --------------------------------------------------------------------------------------------------


def refused(*flags, env=None) -> str:
    done = run_script("scripts/serve.py", "--port", 0, "--device", "cpu", *flags, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and not done.stdout
    return line


def test_no_weights(tmp_path):
    assert "no full_sft weights in" in refused("--out_dir", tmp_path)


def test_a_port_in_use(weights):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("--out_dir", weights.parent, "--port", port)
    assert f"--port {port}: in use on 127.0.0.1" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--host", "256.1.1.1"], "--host 256.1.1.1"),
        (["--port", "70000"], "--port 70000: must be at most 65,535"),
        (["--context", "257"], f"--context 257: {NAME} has a context of 256 tokens"),
        (["--model", "a=full_sft", "--model", "a=full_sft"], "the name a is there twice"),
        (["--lora", "x=nothing+y"], "where MODEL is one of full_sft_64"),
        (["--lora", f"x={NAME}+nothing"], "no nothing weights"),
        (["--lora", "nothing"], "must be NAME=MODEL+ADAPTER"),
        (["--max_concurrent", "0"], "--max_concurrent 0: must be positive"),
        (["--api_key_file", "/nonexistent"], "/nonexistent"),
        (["--device", "tpu"], "--device tpu"),
        (["--max_memory", "cpu=1GiB"], "must come with --device_map"),
    ],
    ids=str,
)
def test_bad_flags(flags, words, weights):
    assert words in refused("--out_dir", weights.parent, *flags)


def test_a_cache_that_does_not_fit_memory(weights, tmp_path):
    path = with_context(weights, tmp_path / "big", 1 << 24)
    line = refused("--model", f"m={path}", "--max_concurrent", 4096)
    assert "the KV cache takes more memory than there is: 4096 requests x 16777216 tokens x" in line
    assert "--context " in line


def test_a_model_that_does_not_fit_memory(weights, tmp_path):
    config = json.loads(weights.with_suffix(".json").read_text())
    shutil.copy(weights, tmp_path / "full_sft_64.pth")
    huge = {"dim": 65536, "n_layers": 500, "n_heads": 64, "n_kv_heads": 64, "head_dim": None}
    huge["hidden_dim"] = None
    (tmp_path / "full_sft_64.json").write_text(json.dumps(config | huge))
    line = refused("--out_dir", tmp_path)
    assert f"--model {NAME}: its weights take" in line and "GiB of memory are free" in line


def test_weights_of_a_reward_model(weights, tmp_path):
    config = json.loads(weights.with_suffix(".json").read_text())
    shutil.copy(weights, tmp_path / "full_sft_64.pth")
    (tmp_path / "full_sft_64.json").write_text(json.dumps(config | {"head": "score"}))
    assert "a reward model, which scores texts" in refused("--out_dir", tmp_path)


def test_an_adapter_without_its_base(weights, tmp_path):
    path = write_adapter(weights, tmp_path)
    assert "an adapter: name its base model" in refused("--model", path)
    other = MiniMindLM(config_from_json(weights.with_suffix(".json")))
    save(other, tmp_path / "other")
    line = refused("--out_dir", tmp_path / "other", "--lora", f"x={NAME}+{path}")
    assert "an adapter for another base" in line


def test_a_key_that_is_none(weights):
    line = refused("--out_dir", weights.parent, env={"MINIMIND_API_KEY": "two words"})
    assert line.startswith("error: MINIMIND_API_KEY: a key is one line")


def write_adapter(weights, folder):
    """An adapter on these weights that changes what the model says."""
    model = MiniMindLM(config_from_json(weights.with_suffix(".json")))
    model.load_state_dict(torch.load(weights, weights_only=True))
    settings = add_lora(model, ["q_proj", "down_proj"], 4, 64.0, 0.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    torch.save(adapter_tensors(model.state_dict()), folder / "lora_64.pth")
    (folder / "lora_64.json").write_text(adapter_json(model.config, settings))
    return folder / "lora_64.pth"


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


def test_several_models_and_an_adapter(weights, tmp_path, serve):
    adapter = write_adapter(weights, tmp_path)
    flags = ["--model", f"a={weights}", "--model", "b=full_sft", "--lora", f"c=a+{adapter}"]
    client = Client(serve(weights.parent, *flags))
    cards = json.loads(client.ask("/v1/models").read())["data"]
    assert [card["id"] for card in cards] == ["a", "b", "c"]
    texts = {}
    for name in "abc":
        body = chat(model=name, temperature=0, max_tokens=12)
        texts[name] = json.loads(client.ask(CHAT, body).read())["choices"][0]["message"]["content"]
    assert texts["a"] == texts["b"] != texts["c"]
    flags = ["--out_dir", weights.parent, "--lora", adapter, "--device", "cpu", "--prompt", "hi"]
    printed = run_script("eval_model.py", *flags, "--max_new_tokens", 12).stdout
    assert texts["c"] + "\n" == printed


# --------------------------------------------------------------------------------------------------
# Limits and access
# --------------------------------------------------------------------------------------------------


def test_a_full_queue_and_clients_that_leave(long_weights, serve):
    server = serve(long_weights.parent, "--max_concurrent", 2, "--max_waiting", 0)
    streams = [Client(server), Client(server)]
    for client in streams:
        answer = client.ask(CHAT, chat(**ENDLESS))
        assert answer.status == 200 and answer.readline().startswith(b"data: ")
    other = Client(server)
    answer = other.ask(CHAT, chat(max_tokens=1))
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    error = json.loads(answer.read())["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    status, error = other.error(CHAT, chat(n=3))
    assert (status, error["param"]) == (400, "n")
    streams[0].close()
    while (answer := other.ask(CHAT, chat(max_tokens=1))).status == 429:
        answer.read()
    assert answer.status == 200 and answer.read()
    streams[1].close()
    while metric(server, "minimind_requests_running"):
        pass
    assert metric(server, "minimind_disconnects_total") == 2


def test_a_client_that_leaves_before_its_answer(long_weights, serve):
    server = serve(long_weights.parent, "--max_concurrent", 1, "--max_waiting", 1)
    client, waiting, other = Client(server), Client(server), Client(server)
    stream = client.ask(CHAT, chat(**ENDLESS))
    stream.readline()
    data = json.dumps(chat(**ENDLESS | {"stream": False})).encode()
    waiting.connection.request("POST", CHAT, data, {"Content-Type": "application/json"})
    while metric(server, "minimind_requests_waiting") < 1:
        pass
    assert other.error(CHAT, chat())[0] == 429
    waiting.close()
    while metric(server, "minimind_requests_waiting"):
        pass
    client.close()
    while metric(server, "minimind_requests_running"):
        pass


def test_a_client_that_does_not_read(long_weights, serve):
    server = serve(long_weights.parent, "--max_concurrent", 2)
    address = urlsplit(server.url)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((address.hostname, address.port))
        fields = ENDLESS | {"max_tokens": 1500, "logprobs": True, "top_logprobs": 20}
        data = json.dumps(chat(**fields)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        slow.sendall(head.encode() + data)
        while metric(server, "minimind_generated_tokens_total") < 1500:  # held up by nobody
            answer = Client(server).ask(CHAT, chat(max_tokens=1))
            assert answer.status == 200 and answer.read()
        received = b"".join(iter(lambda: slow.recv(1 << 16), b""))
    assert received.count(b'"top_logprobs":[{') == 1500 and b"data: [DONE]" in received[-100:]


def test_limits_of_time_and_size(long_weights, serve):
    limits = ["--max_body", 5000, "--request_timeout", 0.3, "--max_concurrent", 2]
    server = serve(long_weights.parent, *limits)
    client = Client(server)
    status, error = client.error(CHAT, chat(user="x" * 6000))
    assert status == 413 and error["message"] == "the body is larger than 5000 bytes"
    answer = Client(server).ask(CHAT, iter_body(7000), {"Transfer-Encoding": "chunked"})
    assert answer.status == 413 and answer.read()
    client = Client(server)
    status, error = client.error(CHAT, chat(**ENDLESS | {"stream": False}))
    assert status == 408 and "--request_timeout" in error["message"]
    events = Client(server).ask(CHAT, chat(**ENDLESS)).read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"


def iter_body(size: int) -> bytes:
    """A chunked body without a Content-Length."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size)


def test_keys_hosts_and_origins(weights, serve, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    flags = ["--api_key_file", tmp_path / "key", "--cors_origin", "https://example.org"]
    client = Client(serve(weights.parent, *flags))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        status, error = client.error("/v1/models", headers=headers)
        assert (status, error["code"]) == (401, "invalid_api_key")
        assert client.error("/metrics", headers=headers)[0] == 401
    right = {"Authorization": "Bearer secret", "Origin": "https://example.org"}
    answer = client.ask("/v1/models", headers=right)
    assert answer.status == 200 and answer.read()
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, x-stainless-lang, user-agent"
    answer = client.ask(CHAT, headers=asked, method="OPTIONS")  # which brings no key
    assert answer.status == 200 and answer.read()
    assert client.ask("/health", headers={"Host": "else.where"}).read() == b'{"status":"ok"}'
    other = client.ask("/v1/models", headers=right | {"Origin": "https://else.where"})
    assert other.read() and "access-control-allow-origin" not in other.headers


def test_without_a_key_only_this_machine_is_answered(weights, serve):
    client = Client(serve(weights.parent))
    for host in ("else.where", "else.where:80", "127.0.0.1.else.where"):
        assert client.error("/v1/models", headers={"Host": host})[0] == 403
    for host in ("localhost", "localhost:80", "127.0.0.1", "[::1]:80", "127.0.0.2:8"):
        answer = client.ask("/v1/models", headers={"Host": host})
        assert answer.status == 200 and answer.read()
        assert "access-control-allow-origin" not in answer.headers
    status, error = client.error(CHAT, chat(), {"Content-Type": "text/plain"})
    assert status == 415 and "Content-Type" in error["message"]
    assert client.error("/v1/nothing")[0] == 404
    assert client.error(CHAT)[0] == 405
    answer = client.ask("/nothing")
    assert answer.read() and "default-src 'none'" in answer.headers["content-security-policy"]
    text = client.ask("/metrics").read().decode()
    assert 'minimind_requests_total{path="/v1/chat/completions",status="415"} 1' in text


# --------------------------------------------------------------------------------------------------
# The end
# --------------------------------------------------------------------------------------------------


def test_sigterm_with_32_streams(long_weights, serve):
    server = serve(long_weights.parent, "--max_concurrent", 32, "--grace", 2)
    address, streams = urlsplit(server.url), 32

    async def one(begun: asyncio.Queue) -> list[str]:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        data = json.dumps(chat(**ENDLESS)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        text = await reader.readuntil(b"data: ")
        begun.put_nowait(None)
        text += await reader.read()
        writer.close()
        assert text.startswith(b"HTTP/1.1 200") and text.endswith(b"0\r\n\r\n")
        lines = text.decode().splitlines()
        return [line[6:] for line in lines if line.startswith("data: ")]

    async def run() -> list[list[str]]:
        begun = asyncio.Queue()
        tasks = [asyncio.create_task(one(begun)) for _ in range(streams)]
        for _ in tasks:
            await begun.get()
        os.kill(server.process.pid, 15)
        return await asyncio.gather(*tasks)

    for events in asyncio.run(run()):
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0


def test_sigterm_lets_what_runs_finish(weights, serve):
    server = serve(weights.parent, "--max_concurrent", 2)
    client = Client(server)
    stream = client.ask(CHAT, chat(**ENDLESS))
    first = stream.readline()
    os.kill(server.process.pid, 15)
    events = (first + stream.read()).decode().split("\n\n")
    assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0


def test_fuzzed_bodies(weights, serve):
    from benchmarks import fuzz_requests

    folder = weights.parent / "fuzzed"
    shutil.copytree(weights.parent, folder, ignore=shutil.ignore_patterns("fuzzed"))
    for path in (*folder.glob("*.pth"), *folder.glob("*.json")):
        path.rename(path.with_name(path.name.replace(NAME, fuzz_requests.MODEL)))
    server = serve(folder, "--max_concurrent", 8)
    statuses, faults = fuzz_requests.fuzz(server.url, 150, seed=7)
    assert not faults and statuses[200] > 10 and statuses[400] > 50


# --------------------------------------------------------------------------------------------------
# The document
# --------------------------------------------------------------------------------------------------


def test_the_examples_of_the_document(weights, serve):
    pytest.importorskip("openai", reason="pip install openai")
    if not shutil.which("curl"):
        pytest.skip("no curl")
    server = serve(weights.parent, "--model", "full_sft_512=full_sft")
    (curl,), (program,) = (blocks("docs/en/serve.md", kind) for kind in ("sh", "py"))
    printed = []
    for command in (["bash", "-c", curl], [sys.executable, "-c", program]):
        command[-1] = command[-1].replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        printed.append(done.stdout)
    assert json.loads(printed[0])["choices"][0]["message"]["content"] == printed[1]
