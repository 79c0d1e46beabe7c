"""A server in a process of its own, and clients that cost little of the machine it runs on."""

import asyncio
import contextlib
import functools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    process: subprocess.Popen
    host: str
    port: int


@contextlib.contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """scripts/serve.py on a free port, until the block ends."""
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--port=0", *flags]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, **streams)
    try:
        text = ""
        for line in process.stdout:
            text += line
            if found := re.search(r"http://([\d.]+):(\d+)", line):
                break
        else:
            raise SystemExit(f"the server did not start: {text}")
        # Its further output must not fill the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield Server(process, found[1], int(found[2]))
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Reply:
    """An answer as it arrived.

    Attributes:
        started: seconds (perf_counter) at which the request was sent.
        lines: when the data of each event came, and what it was.
        body: of an answer that does not stream.
    """

    status: int = 0
    started: float = 0.0
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytes = b""

    @functools.cached_property
    def events(self) -> list[tuple[float, dict]]:
        """Read when it is asked for: that must not slow the machine meanwhile."""
        lines = (line for line in self.lines if not line[1].startswith(b"[DONE]"))
        return [(moment, json.loads(data)) for moment, data in lines]

    @functools.cached_property
    def pieces(self) -> list[tuple[float, str]]:
        """The pieces of text, and when they came."""
        pieces = []
        for moment, event in self.events:
            for choice in event.get("choices", ()):
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                pieces += [(moment, text)] if text else []
        return pieces

    @property
    def times(self) -> list[float]:
        return [moment for moment, _ in self.pieces]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def usage(self) -> dict:
        return next((event["usage"] for _, event in self.events if event.get("usage")), {})


async def post(
    server: Server,
    body: dict | bytes,
    path: str = "/v1/completions",
    leave_after: int | None = None,
    slow: float = 0.0,
) -> Reply:
    """Send a request and read its answer, streamed or not.

    Args:
        leave_after: hang up after so many events.
        slow: wait so many seconds before each read.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = Reply(started=time.perf_counter())
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        header = (await reader.readuntil(b"\r\n\r\n")).decode()
        reply.status = int(header.split(" ", 2)[1])
        if "text/event-stream" in header:
            await read_events(reader, reply, leave_after, slow)
        else:
            reply.body = await reader.read()
    finally:
        writer.close()
    return reply


async def read_events(reader, reply: Reply, leave_after: int | None, slow: float) -> None:
    """Take events as they come; lines between chunks of HTTP are not of interest."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            reply.lines.append((time.perf_counter(), line[6:]))
            if line.startswith(b"data: [DONE]") or len(reply.lines) == leave_after:
                break
            if slow:
                await asyncio.sleep(slow)
