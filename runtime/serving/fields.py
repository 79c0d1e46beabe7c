"""The fields of a request's body, read one by one and checked."""

import difflib
import json
import math
import re
from collections.abc import Iterable

from dataset.checks import json_type, lone_surrogate
from runtime.serving.api_error import APIError


def read_body(data: bytes) -> "Fields":
    """The fields of a body.

    Raises:
        APIError: it is no JSON object.
    """
    try:
        text = data.decode("utf-8")
        body = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise APIError(f"the body is not JSON in UTF-8: {reason}") from None
    if not isinstance(body, dict):
        raise APIError(f"the body must be a JSON object, found {json_type(body)}")
    try:
        fault = lone_surrogate(body, text)
    except RecursionError:
        fault = "nested too deeply"
    if fault:
        raise APIError(f"the body: {fault}")
    return Fields(body)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON value")


class Fields:
    """The fields of an object; one with null is not there.

    Args:
        at: where the object is, "stream_options", "" for the body.
    """

    def __init__(self, body: dict, at: str = ""):
        self.body = {name: value for name, value in body.items() if value is not None}
        self.at = at

    def path(self, name: str) -> str:
        return f"{self.at}.{name}" if self.at else name

    def fail(self, name: str, must: str) -> APIError:
        """The error of a field that is not what it must be."""
        value = json.dumps(self.body[name], ensure_ascii=False)
        shown = value if len(value) <= 60 else value[:60] + "..."
        path = self.path(name)
        return APIError(f"{path} must be {must}, found {shown}", path)

    def check_known(self, known: Iterable[str]) -> None:
        """Refuse a field that is not among the known ones."""
        known = set(known)
        for name in self.body:
            if name not in known:
                near = difflib.get_close_matches(name[:64], known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                path = self.path(name[:64])
                raise APIError(f"unknown field {path!r}{hint}", path, "unknown_parameter")

    def check_given(self, name: str) -> None:
        if name not in self.body:
            path = self.path(name)
            raise APIError(f"{path} is missing", path, "missing_required_parameter")

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.body.get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or not math.isfinite(value):
            raise self.fail(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def integer(self, name: str, least: int, most: int, default: int | None) -> int | None:
        value = self.body.get(name, default)
        if value is default and name not in self.body:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.fail(name, f"an integer from {least} to {most}")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.body.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def text(self, name: str, pattern: str = "(?s).*", must: str = "a string") -> str:
        """A field that must be there."""
        self.check_given(name)
        value = self.body[name]
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.fail(name, must)
        return value

    def one_of(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self.body.get(name, default)
        if value not in choices:
            raise self.fail(name, " or ".join(f'"{choice}"' for choice in choices))
        return value

    def object(self, name: str) -> "Fields":
        """An object inside; empty where it is not there."""
        value = self.body.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(value, self.path(name))

    def list(self, name: str, most: int) -> list:
        """A list; empty where it is not there."""
        value = self.body.get(name, [])
        if not isinstance(value, list):
            raise self.fail(name, "a list")
        if len(value) > most:
            path = self.path(name)
            raise APIError(f"{path} has {len(value)} entries, at most {most} are accepted", path)
        return value
