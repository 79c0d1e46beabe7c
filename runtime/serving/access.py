"""Who may ask, and the headers that all answers have."""

import hmac
import ipaddress
from dataclasses import dataclass

from runtime.serving.api_error import APIError

# The page loads nothing from elsewhere, and nothing may frame it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
OPEN_PATHS = ("/v1/", "/metrics")


@dataclass(frozen=True)
class Access:
    """Checks what a request must bring.

    Attributes:
        api_key: "": none is asked for.
        local_only: requests must name this machine as their host. Without a key, a page elsewhere
            could else have its own name resolve to this machine, and read answers (DNS rebinding).
    """

    api_key: str
    local_only: bool

    def check(self, scope) -> None:
        """Refuse a request by its headers. APIError."""
        headers = dict(scope["headers"])
        if self.local_only and not is_local(host_name(headers.get(b"host", b""))):
            fault = "this server answers requests to localhost; others need --host and a key"
            raise APIError(fault, code="unknown_host", status=403)
        if self.api_key and scope["path"].startswith(OPEN_PATHS):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(key.strip(), self.api_key.encode())
            if kind.lower() != b"bearer" or not is_right:
                fault = "no API key was given" if not key else "the API key is wrong"
                advice = "send the header Authorization: Bearer KEY"
                raise APIError(f"{fault}: {advice}", code="invalid_api_key", status=401)


def is_loopback(address: str) -> bool:
    """Whether an address reaches this machine alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_local(name: str) -> bool:
    """Whether a host's name is this machine's own: no other name is believed."""
    try:
        return name == "localhost" or is_loopback(name)
    except ValueError:  # another name
        return False


def host_name(host: bytes) -> str:
    """The name in a Host header, without its port."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def guarded(app, access: Access):
    """The ASGI app behind the checks, its pages with the security headers."""

    async def guard(scope, receive, send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        try:
            access.check(scope)
        except APIError as error:
            return await send_error(send, error)
        is_page = not scope["path"].startswith(OPEN_PATHS)

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-content-type-options", b"nosniff")]
                if is_page:
                    extra += [
                        (b"content-security-policy", PAGE_POLICY.encode()),
                        (b"referrer-policy", b"no-referrer"),
                        (b"cache-control", b"no-cache"),
                    ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await app(scope, receive, send_with_headers)

    return guard


async def send_bytes(
    send, status: int, data: bytes, kind: str = "application/json", headers: dict | None = None
) -> None:
    """Send a whole answer."""
    fields = {"content-type": kind, "content-length": str(len(data)), **(headers or {})}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})


async def send_error(send, error: APIError) -> None:
    await send_bytes(send, error.status, error.body(), headers=error.headers)
