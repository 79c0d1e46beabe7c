"""The HTTP side of the server: an ASGI app with OpenAI's API, /health, /metrics and the page."""

import asyncio
import contextlib
import math
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runtime.serving.access import Access, guarded, send_bytes, send_error
from runtime.serving.answers import Chunks, whole_answer
from runtime.serving.api_error import APIError, shutting_down, timed_out
from runtime.serving.engine import QueueFull
from runtime.serving.fields import read_body
from runtime.serving.mailbox import Inbox, Mailbox
from runtime.serving.metrics import Metrics
from runtime.serving.parameters import chat_parameters, completion_parameters
from runtime.serving.replies import Replies, dump
from runtime.serving.reply_parts import Part
from runtime.serving.served_model import ServedModel

BODY_SECONDS = 30.0  # within which a body must arrive
DRAINED = 4  # times the largest body: what is read of a larger one, so that its answer arrives
MOST_PREPARING = 64  # requests that wait to be prepared
# What takes longer to prepare than streams should wait: bytes; what else a body can have in it. A
# name may be spelled with an escape.
LARGE_BODY, LONG_WORK = 1 << 14, (b"json_schema", b"tools", b"\\u")
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # for a proxy
]


@dataclass(frozen=True)
class Limits:
    """What the flags of scripts/serve.py allow.

    Attributes:
        request_timeout: seconds, from the body to the end of the answer.
        max_body: bytes.
    """

    request_timeout: float = 600.0
    max_body: int = 4 << 20


class Service:
    """What all requests share.

    Attributes:
        under_way: requests that were submitted and are not answered.
        closing: new requests are refused.
    """

    def __init__(self, models: list[ServedModel], limits: Limits):
        self.models = {model.name: model for model in models}
        self.limits, self.metrics = limits, Metrics()
        self.under_way: set[Replies] = set()
        self.closing = False
        self.mailbox: Mailbox | None = None
        self.in_preparation = 0
        # One: preparing a large request must leave the other core to the model.
        self.preparing = ThreadPoolExecutor(1, "preparing")

    def model(self, name: str) -> ServedModel:
        if name not in self.models:
            known = ", ".join(self.models)
            fault = f"there is no model {name[:100]!r}; the models here are {known}"
            raise APIError(fault, "model", "model_not_found", 404)
        return self.models[name]

    def end_all(self) -> None:
        """End what still runs, for the shutdown."""
        for replies in list(self.under_way):
            replies.end("shutdown")

    def retry_after(self, model: ServedModel) -> str:
        """Seconds after which a slot may be free, a guess from the requests so far."""
        mean = self.metrics.duration.sum / max(self.metrics.duration.count, 1)
        share = len(model.engine.waiting) / len(model.engine.slots)
        return str(min(60, max(1, math.ceil(mean * share))))


class CompletionEndpoint:
    """/v1/chat/completions and /v1/completions."""

    def __init__(self, service: Service, is_chat: bool):
        self.service, self.is_chat = service, is_chat
        self.path = "/v1/chat/completions" if is_chat else "/v1/completions"

    async def __call__(self, scope, receive, send) -> None:
        started = time.monotonic()
        try:
            status = await self.answer(scope, receive, send)
        except APIError as error:
            status = error.status
            await send_error(send, error)
        except asyncio.CancelledError:  # of one that was not submitted yet
            if not self.service.closing:
                raise
            status = 503
            with contextlib.suppress(RuntimeError):  # it has begun
                await send_error(send, shutting_down())
        except Exception:  # a fault of ours: the others go on
            traceback.print_exc()
            status = 500
            await send_error(send, APIError("the server failed at this request", status=500))
        self.service.metrics.answers[self.path, status] += 1
        if status == 200:
            self.service.metrics.duration.add(time.monotonic() - started)

    async def answer(self, scope, receive, send) -> int:
        """Answer a request; returns the status that was sent. Raises APIError before any was."""
        service = self.service
        if service.closing:
            raise shutting_down()
        data = await read_data(scope, receive, service.limits.max_body)
        if len(data) > LARGE_BODY or any(mark in data for mark in LONG_WORK):
            prepared = await self.prepare_aside(data, receive)
        else:
            prepared = self.prepare(data)
        model, wanted, prompts, constraints = prepared
        inbox = Inbox(service.mailbox, is_live=wanted.stream or wanted.is_watched)
        replies = Replies(model, wanted, inbox)
        try:
            replies.submit(prompts, constraints)
        except QueueFull as full:
            headers = {"retry-after": service.retry_after(model)}
            raise APIError(str(full), code="queue_full", status=429, headers=headers) from None
        return await self.deliver(replies, receive, send)

    async def prepare_aside(self, data: bytes, receive) -> tuple:
        """`prepare` on the thread for it, if that is not too busy, while the client is there."""
        service, loop = self.service, asyncio.get_running_loop()
        if service.in_preparation >= MOST_PREPARING:
            headers = {"retry-after": "5"}
            fault = f"{MOST_PREPARING} requests with tools, schemas or long prompts wait already"
            raise APIError(fault, code="queue_full", status=429, headers=headers)
        service.in_preparation += 1
        preparing = loop.run_in_executor(service.preparing, self.prepare, data)
        gone = asyncio.create_task(until_gone(receive))
        try:
            seconds = service.limits.request_timeout
            await asyncio.wait((preparing, gone), timeout=seconds, return_when="FIRST_COMPLETED")
            if preparing.done():
                return preparing.result()
            preparing.cancel()
            raise APIError("the client went away", status=499) if gone.done() else timed_out()
        finally:
            gone.cancel()
            service.in_preparation -= 1

    def prepare(self, data: bytes) -> tuple:
        """What a body asks for: (model, parameters, prompts, a constraint or None for each choice)."""
        fields = read_body(data)
        known = next(iter(self.service.models))  # the one that is meant where none is named
        model = self.service.model(fields.text("model") if "model" in fields.body else known)
        if self.is_chat:
            wanted = chat_parameters(fields)
        else:
            wanted = completion_parameters(fields, model.vocab_size)
        model.check_bias(wanted)
        engine = model.engine
        most = len(engine.slots) + engine.max_waiting
        count = wanted.n * max(1, len(wanted.prompts))
        if count > most:
            field = "n" if wanted.n > 1 else "prompt"
            raise APIError(f"{field}: {count} choices, this server takes {most} at once", field)
        prompts = model.prompts(wanted)
        constraints = [one for prompt in prompts for one in model.constraints(wanted, prompt)]
        return model, wanted, prompts, constraints

    async def deliver(self, replies: Replies, receive, send) -> int:
        """Wait for the replies and send them, as the client asked for; ends them if it goes away."""
        service, wanted = self.service, replies.wanted
        service.under_way.add(replies)
        mailbox, is_live = service.mailbox, replies.inbox.is_live
        mailbox.streams += is_live
        loop, seconds = asyncio.get_running_loop(), service.limits.request_timeout
        timers = [loop.call_later(seconds, replies.end, "timeout")]
        # One that does not read keeps its task waiting in `send`.
        timers.append(loop.call_later(seconds + 5, asyncio.current_task().cancel))
        watcher = asyncio.create_task(watch(receive, replies))
        try:
            return await (self.stream if wanted.stream else self.whole)(replies, send)
        finally:
            for timer in timers:
                timer.cancel()
            watcher.cancel()
            replies.cancel()
            mailbox.streams -= is_live
            service.under_way.discard(replies)
            service.metrics.gone += replies.cause == "gone"

    async def whole(self, replies: Replies, send) -> int:
        """Send an answer that does not stream."""
        parts: list[list[Part]] = [[] for _ in replies.choices]
        while not replies.finished and not replies.cause:
            for number, new in await replies.next_parts():
                parts[number] += new
        if replies.cause == "gone":
            return 499
        if error := replies.error():
            raise error
        await send_bytes(send, 200, whole_answer(replies, parts))
        return 200

    async def stream(self, replies: Replies, send) -> int:
        """Send chunks as they come, then the end that every stream has."""
        chunks, is_started = Chunks(replies), False
        while not replies.finished and not replies.cause:
            news = await replies.next_parts()
            text = "".join(chunks.news(number, parts) for number, parts in news)
            if replies.cause == "gone" or not text:
                continue
            if not is_started:
                if error := replies.error():
                    raise error
                is_started = True
                await start_stream(send)
                self.service.metrics.first_token.add(replies.first_token)
            await send_part(send, text.encode())
        if replies.cause == "gone":
            return 499
        error = replies.error()
        if not is_started:
            if error:
                raise error
            await start_stream(send)
        text = "".join(
            chunks.news(number, choice.take_end())
            for number, choice in enumerate(replies.choices)
            if choice.finish_reason is None
        )
        data = text.encode() + chunks.last()
        if error and not replies.cause:
            data = b"data: " + error.body() + b"\n\n" + data
        await send_part(send, data, more=False)
        return 200


async def start_stream(send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})


async def send_part(send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def until_gone(receive) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def watch(receive, replies: Replies) -> None:
    """End the replies when their client goes away."""
    await until_gone(receive)
    replies.end("gone")


async def read_data(scope, receive, most: int) -> bytes:
    """The body of a request. APIError: it is too large, too slow, or not said to be JSON."""
    headers = dict(scope["headers"])
    close = {"connection": "close"}
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    length = headers.get(b"content-length", b"0")
    fault = None
    if kind != b"application/json":  # what a form of another page could send is none
        message = "the header Content-Type must be application/json"
        fault = APIError(message, status=415, headers=close)
    elif not length.isdigit() or int(length[:12]) > most:
        fault = too_large(most)
    try:
        data = await asyncio.wait_for(read_all(receive, most), BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        fault = fault or APIError("the body took too long", status=408, headers=close)
        raise fault from None
    if fault is not None:
        raise fault
    return data


async def read_all(receive, most: int) -> bytes:
    """A body of so many bytes at most. A larger one is read on, for a while, and then refused.

    Raises:
        APIError: it is larger, or the client went away.
    """
    pieces, size, more = [], 0, True
    while more and size <= DRAINED * most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise APIError("the client went away", status=499)
        size += len(message.get("body", b""))
        if size <= most:
            pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    if size > most:
        raise too_large(most)
    return b"".join(pieces)


def too_large(most: int) -> APIError:
    close = {"connection": "close"}
    return APIError(f"the body is larger than {most} bytes", status=413, headers=close)


def make_app(service: Service, access: Access, cors_origins: list[str], page: Path | None = None):
    """The ASGI app.

    Args:
        cors_origins: whose pages may ask; none: only the server's own.
        page: the folder with the page for "/".
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    handlers = {HTTPException: answer_error, APIError: answer_error}
    app = guarded(Starlette(routes=make_routes(service, page), exception_handlers=handlers), access)
    if cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # client libraries send some of their own
            expose_headers=["retry-after"],
        )
    return app


async def answer_error(request, error):
    """An error of ours or of the routing, in OpenAI's form."""
    from starlette.responses import Response

    if not isinstance(error, APIError):
        fault = f"{request.method} {request.url.path}: {error.detail}"
        error = APIError(fault, status=error.status_code, headers=error.headers)
    return Response(error.body(), error.status, error.headers, media_type="application/json")


def make_routes(service: Service, page: Path | None) -> list:
    """All that is answered; see `make_app`."""
    from starlette.responses import Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    def json_response(value, status: int = 200) -> Response:
        return Response(dump(value), status, media_type="application/json")

    async def list_models(request) -> Response:
        cards = [model.card() for model in service.models.values()]
        return json_response({"object": "list", "data": cards})

    async def show_model(request) -> Response:
        return json_response(service.model(request.path_params["name"]).card())

    async def health(request) -> Response:
        state = "closing" if service.closing else "ok"
        return json_response({"status": state}, 503 if service.closing else 200)

    async def metrics(request) -> Response:
        text = service.metrics.text(list(service.models.values()))
        return Response(text, media_type="text/plain; version=0.0.4")

    api = [
        Route("/chat/completions", CompletionEndpoint(service, True), methods=["POST"]),
        Route("/completions", CompletionEndpoint(service, False), methods=["POST"]),
        Route("/models", list_models),
        Route("/models/{name:path}", show_model),
    ]
    routes = [Mount("/v1", routes=api), Route("/health", health), Route("/metrics", metrics)]
    if page is not None:
        routes.append(Mount("/", StaticFiles(directory=page, html=True)))
    return routes
