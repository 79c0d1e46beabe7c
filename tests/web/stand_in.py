"""A stand-in for the server: serves the page, and replies what a test wants, such as no real model
writes on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WEB = Path(__file__).resolve().parents[2] / "scripts" / "web"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src"
    " 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
TYPES |= {".svg": "image/svg+xml"}
MODEL = {"id": "tiny", "object": "model", "context_length": 2048, "parameters": 26_000_000}
DONE = b"data: [DONE]\n\n"


class Refusal(Exception):
    """What is answered in place of a stream: a status, OpenAI's error, headers."""

    def __init__(self, status: int, message: str = "", code: str | None = None, **headers: str):
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "code": code, "param": None, "type": "x"}}


class StandIn(ThreadingHTTPServer):
    """`reply(body)` yields the bytes of a stream for the body of a request, or raises a Refusal."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.restart()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self) -> None:
        """As it is when it starts."""
        self.models = [MODEL]
        self.bodies: list[dict] = []
        self.key = ""
        self.reply: Callable[[dict], Iterator[bytes]] = lambda body: said("hello")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address) -> None:
        """A browser that stopped reading is no fault."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words) -> None:
        """Nothing: what is wrong shows in the page."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self.is_locked():
                return
            self.answer(200, "application/json", json.dumps({"data": self.server.models}).encode())
            return
        path = WEB / (self.path[1:] or "index.html")
        if path.is_file():
            self.answer(200, TYPES[path.suffix], path.read_bytes())
        else:
            self.answer(404, "text/plain", b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_locked():
            return
        self.server.bodies.append(body)
        try:
            pieces = self.server.reply(body)
        except Refusal as refusal:
            content = json.dumps(refusal.body).encode()
            self.answer(refusal.status, "application/json", content, refusal.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()

    def is_locked(self) -> bool:
        wanted = f"Bearer {self.server.key}"
        if not self.server.key or self.headers["Authorization"] == wanted:
            return False
        self.answer(401, "application/json", json.dumps(Refusal(401, "no").body).encode())
        return True

    def answer(self, status: int, kind: str, content: bytes, headers=None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", CSP)
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


def event(delta: dict | None = None, finish: str | None = None, **fields) -> bytes:
    """One chunk of a stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {"id": "x", "object": "chat.completion.chunk", "choices": choices, **fields}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def said(text: str, size: int = 7, finish: str = "stop", reasoning: str = "") -> Iterator[bytes]:
    """A stream of a text, so many characters in a chunk."""
    for start in range(0, len(reasoning), size):
        yield event({"reasoning_content": reasoning[start : start + size]})
    for start in range(0, len(text), size):
        yield event({"content": text[start : start + size]})
    yield event({}, finish)
    count = (len(text) + len(reasoning)) // size + 1
    usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
    yield event(usage=usage)
    yield DONE
