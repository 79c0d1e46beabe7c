"""The HTTP server itself: its socket, its signals, and its end."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Iterator

from runtime.serving.app import Service
from runtime.serving.engine import EngineThread
from runtime.serving.mailbox import Mailbox

BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; whoever connects before the server runs waits.

    Raises:
        ValueError: the port is in use, or the host is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ValueError(f"--port {port}: in use on {host}; name another") from None
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: {reason}") from None
    return listener


def serve(
    app, service: Service, engines: EngineThread, listener: socket.socket, grace: float, ready: str
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then finish what runs, at most `grace` seconds.

    Args:
        engines: the thread that has opened the models; is closed.
        ready: is printed when requests are answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            service.mailbox = Mailbox(asyncio.get_running_loop())
            await super().startup(sockets)
            print(ready, flush=True)

        async def shutdown(self, sockets=None) -> None:
            service.closing = True
            # What runs is ended a little before uvicorn would cut it off.
            end = asyncio.get_running_loop().call_later(0.9 * grace, service.end_all)
            await super().shutdown(sockets)
            end.cancel()
            engines.close()  # while there is a loop that its last outputs can go to

        def handle_exit(self, sig, frame) -> None:
            super().handle_exit(sig, frame)
            if self.force_exit and service.mailbox:  # the second Ctrl-C
                service.mailbox.loop.call_soon_threadsafe(service.end_all)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn does, but without dying of the signal afterwards: the exit code is 0."""
            kinds = (signal.SIGINT, signal.SIGTERM)
            before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
            yield
            for kind, handler in before.items():
                signal.signal(kind, handler)

    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
        backlog=BACKLOG,
    )
    engines.start([model.engine for model in service.models.values()])
    try:
        Server(config).run(sockets=[listener])
    finally:
        engines.close()
