"""Ids of a reply to text, as they come: whole characters, up to a stop string."""

from collections.abc import Callable

CHARACTER = 4  # bytes, and so tokens, of the longest one
BROKEN = "\ufffd"  # stands for bytes that are no character
MOST_WAITING = 256  # tokens that are decoded again and again


class TextDecoder:
    """Decodes a reply piece by piece; the pieces make what decoding it as a whole gives.

    Only the ids since the last whole character are decoded, with those of the piece before, as some
    tokenizers write a token in another way where it is the first one.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.ids = decode, []
        self.begin = self.read = 0  # of the ids of the last piece, and behind it
        self.shown = 0  # characters of the last piece

    def add(self, ids: list[int]) -> str:
        """The text that is new; what may be a part of a character waits."""
        self.ids += ids
        return self._piece(is_last=False)

    def end(self) -> str:
        """What has waited."""
        return self._piece(is_last=True)

    def _piece(self, is_last: bool) -> str:
        text = self.decode(self.ids[self.begin :])
        waiting = len(self.ids) - self.read
        if not text.endswith(BROKEN) or is_last or waiting >= MOST_WAITING:
            return self._show(text, len(self.ids))
        for end in range(len(self.ids) - 1, max(self.read, len(self.ids) - CHARACTER), -1):
            whole = self.decode(self.ids[self.begin : end])
            if not whole.endswith(BROKEN):
                return self._show(whole, end)
        if waiting < CHARACTER:
            return ""
        # What now ends it is no character, whatever comes, but for the last bytes of it.
        broken = len(text) - len(text.rstrip(BROKEN))
        settled = len(text) - min(broken, CHARACTER - 1)
        piece, self.shown = text[self.shown : settled], max(self.shown, settled)
        return piece

    def _show(self, text: str, end: int) -> str:
        """What is new in the text of the ids up to `end`."""
        piece = text[self.shown :]
        self.shown = len(self.decode(self.ids[self.read : end]))
        self.begin, self.read = self.read, end
        return piece


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of a text may begin one of the marks."""
    longest = max(map(len, marks), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


class StopStrings:
    """Lets text through up to the first stop string, of which no part is shown.

    Attributes:
        found: a stop string has come.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.waiting, self.found = stops, "", False

    def add(self, text: str) -> str:
        """The part of text, and of what has waited, that can be shown now."""
        if self.found:
            return ""
        self.waiting += text
        places = [place for stop in self.stops if (place := self.waiting.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self.waiting = self.waiting[: min(places)], ""
            return shown
        size = len(self.waiting) - held_back(self.waiting, self.stops)
        shown, self.waiting = self.waiting[:size], self.waiting[size:]
        return shown

    def end(self) -> str:
        """What has waited, and was no stop string."""
        shown, self.waiting = self.waiting, ""
        return shown
