"""What a reply's text is made of: thinking, content, calls of functions."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dataset.replies import END_THINK, THINK
from runtime.serving.call_form import CallForm
from runtime.serving.reply_text import held_back

HEADER = r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'


class Part(NamedTuple):
    """A piece of a reply.

    kind: "content", "reasoning_content" or "tool_call"; of a call number `index` the first part has
    its id and name, and all of them a piece of the arguments as text.
    """

    kind: str
    text: str
    index: int = 0
    id: str = ""
    name: str = ""


class ReplyParts:
    """Takes a reply's text apart as it comes.

    Args:
        thinks: the prompt has opened the thinking already.
        form: how calls are spelled; None: they are content.
        names: of the functions that may be called.
        is_single: what stands behind the first call is left out.

    Attributes:
        calls: so many have begun.
        ended_calls: so many are complete.
    """

    def __init__(
        self,
        thinks: bool,
        form: CallForm | None,
        names: frozenset[str] = frozenset(),
        is_single: bool = False,
    ):
        self.form, self.names, self.is_single = form, names, is_single
        self.text, self.calls, self.ended_calls = "", 0, 0
        self.state: Callable[[bool], Iterator[Part] | None] = self._start
        self.trim = "\n"  # what is left out at the beginning of what comes
        if thinks:
            self.state = self._think

    def add(self, text: str, is_last: bool = False) -> list[Part]:
        """The parts that are complete, or can be shown before they are."""
        self.text += text
        parts: list[Part] = []
        state = None
        while state is not self.state:  # each goes on until another one takes over
            state = self.state
            parts += [part for part in state(is_last) or () if part.text or part.name]
        return parts

    # Each state takes what it can from the front of `self.text`.

    def _start(self, is_last: bool) -> Iterator[Part] | None:
        begun = self.text.lstrip()
        if begun.startswith(THINK):
            self.text, self.state = begun[len(THINK) :], self._think
        elif is_last or not THINK.startswith(begun):
            self.trim = ""
            is_json = self.form and not self.form.begin and begun.startswith("{")
            self.state = self._call if is_json else self._content

    def _think(self, is_last: bool) -> Iterator[Part]:
        if self.trim and self.text:
            self.text, self.trim = self.text.removeprefix("\n"), ""
        thought, mark, behind = self.text.partition(END_THINK)
        if mark:
            yield Part("reasoning_content", thought.removesuffix("\n"))
            self.text, self.trim, self.state = behind, "\n", self._content
            return
        wait = 0 if is_last else held_back(self.text, ("\n" + END_THINK, END_THINK))
        yield self._take("reasoning_content", len(self.text) - wait)

    def _content(self, is_last: bool) -> Iterator[Part]:
        self.text = self.text.lstrip(self.trim) if self.trim else self.text
        if self.is_single and self.ended_calls:
            self.text = ""
        if not self.text:
            return
        if self.form and not self.form.begin and self.trim and self.text.startswith("{"):
            self.state = self._call
            return
        self.trim = ""
        mark = self.form.begin if self.form else ""
        place = self.text.find(mark) if mark else -1
        if place >= 0:
            yield Part("content", self.text[:place].removesuffix("\n"))
            self.text, self.state = self.text[place + len(mark) :], self._call
            return
        wait = 0 if is_last or not mark else held_back(self.text, ("\n" + mark, mark))
        yield self._take("content", len(self.text) - wait)

    def _call(self, is_last: bool) -> Iterator[Part]:
        """A call that begins as they all do is shown as it comes, another one when it is whole."""
        header = re.match(HEADER, self.text)
        if header and (name := read_json(header[1])) and (self.form.begin or name in self.names):
            self.text, self.state = self.text[header.end() :], self._arguments
            self.scanner = ObjectScanner()
            yield self._new_call(name, "")
            return
        whole, mark, behind = self.text.partition(self.form.end) if self.form.end else ("", "", "")
        if not mark and not is_last:
            return
        whole = whole if mark else self.text
        self.text, self.state = behind, self._content
        calls = parse_calls(whole)
        if calls and (self.form.begin or all(name in self.names for name, _ in calls)):
            for name, arguments in calls:
                yield self._new_call(name, arguments)
                self.ended_calls += 1
            self.trim = "\n"
        else:  # whatever it is
            yield Part("content", self.form.begin + whole + mark)

    def _new_call(self, name: str, arguments: str) -> Part:
        self.calls += 1
        number = f"call_{secrets.token_hex(12)}"
        return Part("tool_call", arguments, self.calls - 1, number, name)

    def _arguments(self, is_last: bool) -> Iterator[Part]:
        size = self.scanner.scan(self.text, self.form.end)
        yield self._take("tool_call", size)
        if self.scanner.ended or is_last:
            self.ended_calls += 1
            self.state = self._behind_call

    def _behind_call(self, is_last: bool) -> Iterator[Part] | None:
        """Leave out what closes a call."""
        if not self.form.end:
            self.text = ""
            return
        place = self.text.find(self.form.end)
        if place < 0:
            self.text = "" if is_last else self.text
            return
        self.text = self.text[place + len(self.form.end) :]
        self.trim, self.state = "\n", self._content

    def _take(self, kind: str, size: int) -> Part:
        text, self.text = self.text[:size], self.text[size:]
        return Part(kind, text, max(self.calls - 1, 0) if kind == "tool_call" else 0)


class ObjectScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self):
        self.depth, self.in_string, self.escaped, self.ended = 0, False, False, False

    def scan(self, text: str, end_mark: str) -> int:
        """How many characters of a new piece belong to the object, or may be shown as such.

        Args:
            end_mark: ends an object that is not closed.
        """
        for n, char in enumerate(text):
            if self.in_string:
                if self.escaped:
                    self.escaped = False
                elif char == "\\":
                    self.escaped = True
                elif char == '"':
                    self.in_string = False
                continue
            if end_mark and char == end_mark[0]:
                rest = text[n : n + len(end_mark)]
                if rest == end_mark:
                    self.ended = True
                    return n
                if end_mark.startswith(rest):
                    return n
            if char == '"':
                self.in_string = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    self.ended = True
                    return n + 1
        return len(text)


def parse_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of a call, or of a list of them; [] where it is neither."""
    calls = read_json(text)
    calls = calls if isinstance(calls, list) else [calls]
    found = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        found.append((call["name"], arguments))
    return found


def read_json(text: str):
    """What a text says as JSON; None: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
