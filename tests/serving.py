"""A real server for tests, and a model that knows a few replies by heart."""

import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import torch
from running import kill_all, start, wait_until

from dataset.chat_format import ChatCoder
from dataset.tokenizer import load_tokenizer
from model.lm import LMConfig, MiniMindLM

ROOT = Path(__file__).resolve().parents[1]
NAME = "full_sft_64"
SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 512}

FACTS = {
    "hi": "Hello, you!",
    "who are you?": "I am MiniMind \u4f60\u597d \U0001f469\u200d\U0001f680.",
    "\u4f60\u662f\u8c01": "\u6211\u662f MiniMind\u3002",
    "2+3": "5",
}
THOUGHT = ("6*7", "six times seven is forty two.", "42")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
CALL = {"name": "get_time", "arguments": {"city": "Paris"}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def chats() -> list[tuple[list[dict], list[dict] | None]]:
    """What the model knows by heart: (messages, tools)."""
    known = [
        ([user(question), {"role": "assistant", "content": answer}], None)
        for question, answer in FACTS.items()
    ]
    question, thought, answer = THOUGHT
    said = {"role": "assistant", "content": answer, "reasoning_content": thought}
    known.append(([user(question), said], None))
    asked = [user("time in Paris?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    result = [{"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "It is noon."}]
    known.append((asked, TOOLS))
    known.append(([*asked, *result], TOOLS))
    return known


def train_by_heart(folder: Path, steps: int = 300) -> Path:
    """Train a tiny model on `chats` until it knows them; returns the weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **SHAPE))
    encoded = ChatCoder(tokenizer).encode_chats(chats())
    ids = torch.tensor([sum((ids for ids, _ in encoded), [])])
    mask = torch.tensor(sum((mask for _, mask in encoded), []))
    at = mask[1:].nonzero().squeeze(1)  # the positions before the supervised ones
    lens = [len(ids) for ids, _ in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model(ids, doc_lens=lens, logits_at=at).logits
        loss = torch.nn.functional.cross_entropy(logits, ids[0, at + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.003:
            break
    assert loss < 0.02
    return save(model, folder)


def save(model: MiniMindLM, folder: Path, name: str = NAME) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    (folder / f"{name}.json").write_text(model.config.to_json())
    return folder / f"{name}.pth"


def with_context(weights: Path, folder: Path, tokens: int) -> Path:
    """The same weights with a longer context."""
    folder.mkdir(parents=True, exist_ok=True)
    os.link(weights, folder / weights.name)
    config = json.loads(weights.with_suffix(".json").read_text())
    (folder / f"{NAME}.json").write_text(json.dumps(config | {"max_seq_len": tokens}))
    return folder / weights.name


class Server:
    """scripts/serve.py as a process of its own.

    Attributes:
        url: where it answers.
    """

    def __init__(
        self,
        out_dir: Path,
        *flags,
        env: dict | None = None,
        script: str | Path = "scripts/serve.py",
        port: int = 0,
    ):
        words = [script, "--out_dir", out_dir, "--device", "cpu", *flags, "--port", port]
        self.folder = tempfile.TemporaryDirectory()
        log = Path(self.folder.name) / "log"
        with open(log, "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = start(words, env, **streams)
        self.process.log = log
        wait_until(self.process, lambda: "at once" in log.read_text())
        self.url = re.search(r"http://\S+:\d+", log.read_text())[0]

    @property
    def log(self) -> str:
        return self.process.log.read_text()

    def terminate(self, seconds: float = 60) -> int:
        """Ask it to end; returns its exit code."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.wait(seconds)

    def close(self) -> None:
        kill_all(self.process)
        self.folder.cleanup()
