"""What a chat template did to a conversation, for messages."""

from itertools import accumulate

from dataset.template_layout import Cut, Layout
from dataset.template_manner import common


def difference(cut: Cut, layout: Layout, filled: str, real: str) -> str:
    """What a template did to a text that it was to write as it is."""
    at, turn = common(filled, real), None
    ends = list(accumulate(map(len, layout.fill(layout.pieces, cut.values))))
    for (n, _), end in zip(layout.slots, ends[::2], strict=False):
        if end <= at:
            turn = cut.owners[n][0]
    where = "" if turn is None else f"turn {turn + 1}: "
    begin = max(0, at - 10)
    shown = f"it writes {real[begin : at + 30]!r}, not {filled[begin : at + 30]!r}"
    return f"{where}the chat template changes what the row says: {shown}"
