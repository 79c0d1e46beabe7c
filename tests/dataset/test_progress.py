"""Progress of what takes long: a bar on a terminal, lines elsewhere, nothing of what is quick."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import pytest
from tqdm import tqdm

from dataset import progress
from scripts import convert


@pytest.fixture
def at_once(monkeypatch):
    """Progress shows from the first moment on, as after a minute."""
    now = {"mininterval": 0, "delay": 0, "miniters": 1}
    monkeypatch.setattr(progress, "tqdm", lambda **options: tqdm(**options | now))


def shown(monkeypatch, is_terminal: bool, action) -> str:
    """What an action writes to standard error."""
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    if is_terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        action()
    text = b""
    with contextlib.suppress(OSError):  # raised when the other end is closed
        while block := os.read(reader, 4096):
            text += block
    os.close(reader)
    return text.decode()


def count() -> None:
    with progress.byte_bar(4_000_000, "tokenising x.jsonl") as bar:
        bar.update(1_000_000)
        bar.update(3_000_000)


def test_a_bar_on_a_terminal(monkeypatch, at_once):
    text = shown(monkeypatch, True, count)
    assert "\rtokenising x.jsonl:  25%|" in text and "tokenising x.jsonl: 100%|" in text


def test_lines_in_a_log(monkeypatch, at_once):
    lines = shown(monkeypatch, False, count).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    assert [line[:27] for line in lines[1:3]] == [
        "tokenising x.jsonl: 25% of ",
        "tokenising x.jsonl: 100% of",
    ]
    assert "4.00M B, 00:00 so far" in lines[1]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_of_what_is_quick(monkeypatch, is_terminal):
    assert shown(monkeypatch, is_terminal, count) == ""


@pytest.mark.parametrize(
    "words, said",
    [
        ("to-hf {w} {t}/hf", ["writing weights: 100%"]),
        ("from-hf {t}/hf {t}/back.pth", ["reading hf: 100%", "writing weights: 100%"]),
        ("to-gguf {w} {t}/x.gguf", ["writing weights: 100%"]),
        ("check {t}/hf {w}", ["reading full_sft_32.pth: 100%", "comparing: 100%"]),
    ],
)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_conversions(words, said, is_terminal, monkeypatch, at_once, start_weights, tmp_path):
    if "gguf" in words:
        pytest.importorskip("gguf", reason="writes the file")
    names = {"w": start_weights / "full_sft_32.pth", "t": tmp_path}
    if "{t}/hf" in words.split(" ", 1)[1] and not words.startswith("to-hf"):
        run_convert("to-hf {w} {t}/hf".format(**names))
    text = shown(monkeypatch, is_terminal, lambda: run_convert(words.format(**names)))
    for line in said:
        assert line in text, text


def run_convert(words: str) -> None:
    args = convert.make_parser().parse_args(words.split())
    assert args.run(args) == 0
