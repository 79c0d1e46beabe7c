"""What a client did wrong, in the form that OpenAI's API has for it."""

import json


class APIError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        param: the field at fault, "messages[0].content", if it is one.
        code: a word for programs, "model_not_found", if there is one.
        headers: of the answer, besides those that all have.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> bytes:
        """The error as JSON."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")


def shutting_down() -> APIError:
    return APIError("the server is shutting down", code="shutting_down", status=503)


def timed_out() -> APIError:
    message = "the request took longer than the server allows (--request_timeout)"
    return APIError(message, code="timeout", status=408, headers={"x-should-retry": "false"})
