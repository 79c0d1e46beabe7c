"""eval_model.py on a terminal: typing, Ctrl-D, Ctrl-C."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import test_eval_model
from running import ROOT
from test_eval_model import FACTS, SCRIPT, SHAPE, save

from model.lm import LMConfig, MiniMindLM

knowing = test_eval_model.knowing


class Terminal:
    """The chat on a pseudo-terminal."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / SCRIPT), *map(str, args)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, "TERM": "dumb"},
            # A shell's `&` has it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def wait_for(self, text: str, seconds: float = 240.0) -> str:
        """Read until the text shows up; returns what came before it."""
        end = time.monotonic() + seconds
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.master], [], [], end - time.monotonic())
            assert ready, f"no {text!r} in {self.seen.decode(errors='replace')!r}"
            try:
                block = os.read(self.master, 4096)
            except OSError:  # the other side is closed
                block = b""
            assert block, f"ended without {text!r}: {self.seen.decode(errors='replace')!r}"
            self.seen += block
        before, self.seen = self.seen.split(text.encode(), 1)
        return before.decode()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> int:
        if self.process.poll() is None:
            try:
                self.process.wait(240)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        os.close(self.master)
        return self.process.returncode


def test_chat_on_a_terminal(knowing):
    terminal = Terminal("--out_dir", knowing, "--device", "cpu")
    terminal.wait_for("you> ")
    terminal.type("hi\n")
    terminal.wait_for(f"bot> {FACTS['hi']}")
    terminal.wait_for("you> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.close() == 0


def test_ctrl_c_stops_the_reply_and_twice_leaves(tmp_path, tokenizer):
    """A model with a long context that never ends its reply."""
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **{**SHAPE, "max_seq_len": 100_000}))
    path = save(model, tmp_path)
    terminal = Terminal(
        "--weight", path, "--device", "cpu", "--max_new_tokens", 50_000, "--temperature", 1
    )
    terminal.wait_for("you> ")
    terminal.type("hi\n")
    terminal.wait_for("bot> ")
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("you> ")
    terminal.type("once more\n")  # the chat goes on
    terminal.wait_for("bot> ")
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("you> ")
    # Between the prompt and the reading behind it, Python misses a signal.
    while terminal.process.poll() is None:
        terminal.interrupt()
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(5)
    assert terminal.close() == 130
