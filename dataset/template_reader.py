"""A chat template, understood: the text of a conversation and what in it an assistant says."""

from datetime import date
from itertools import accumulate

import jinja2

from dataset.chatml import Chat, Mark
from dataset.template_checks import check_battery
from dataset.template_layout import Cut, Layout, Span, cuttings, parse_layout, plain_message
from dataset.template_literals import Looks
from dataset.template_manner import OTHER, Template, learn_manner
from dataset.text_encoder import TextEncoder

LAYOUTS = 1 << 12  # kept in memory


class TemplateReader:
    """Reads conversations as a chat template writes them.

    Args:
        encoder: knows which tokens are control.

    Raises:
        ValueError: a syntax error in the template; see `learn_manner`.
    """

    def __init__(self, template: Template, encoder: TextEncoder):
        self.template, self.encoder = template, encoder
        self.layouts: dict[str, Layout | str] = {}
        self.dated = "strftime_now" in template.source
        self.trims = "trim" in template.source or "strip" in template.source
        try:
            self.looks = Looks(template.source)
        except jinja2.TemplateSyntaxError as error:
            fault = f"{template.place}:{error.lineno}: {error.message}"
            raise ValueError(f"{fault}; {OTHER}") from None
        except RecursionError:
            raise ValueError(f"{template.place}: nested too deeply; {OTHER}") from None
        self.manner = learn_manner(template, encoder.tokens)

    def read(self, messages: list[dict], tools: list | None = None, **flags) -> Chat:
        """The text of a conversation, and what is whose in it.

        Args:
            flags: add_generation_prompt, enable_thinking.

        Raises:
            ValueError: what the template does to a turn so that it cannot be learned from.
        """
        reasons, real = [], None
        text_arguments = self.manner.text_arguments
        for way in cuttings(messages, tools, text_arguments):
            cut = Cut(messages, tools, way, self.encoder.tokens, self.trims)
            layout = self._layout(cut, messages, flags)
            if isinstance(layout, str):
                reasons.append(layout)
                continue
            if layout.verified and way.thinking == "none" and not self._sees(cut.values):
                return self._fill(layout, cut)
            if real is None:
                real = self.template.render(
                    [plain_message(m, text_arguments) for m in messages], tools, **flags
                )
            filled = "".join(layout.fill(layout.pieces, cut.values))
            if filled == real:
                layout.verified = True
                return self._fill(layout, cut)
            from dataset.template_faults import difference

            reasons.append(difference(cut, layout, filled, real))
        raise ValueError(reasons[0])

    def _sees(self, values: list[str]) -> bool:
        return any(self.looks.sees(value) for value in values if value)

    def _layout(self, cut: Cut, messages: list[dict], flags: dict) -> Layout | str:
        """The layout of a conversation's shape, or why there is none."""
        empty = [n for n, value in enumerate(cut.values) if not value]
        key = repr((cut.messages, cut.tools, flags, empty, date.today() if self.dated else 0))
        layout = self.layouts.get(key)
        if layout is None:
            if len(self.layouts) >= LAYOUTS:
                self.layouts.clear()
            try:
                layout = self._new_layout(cut, messages, flags)
            except ValueError as error:
                layout = str(error)
            self.layouts[key] = layout
        return layout

    def _new_layout(self, cut: Cut, messages: list[dict], flags: dict) -> Layout:
        layout = parse_layout(self.template.render(cut.messages, cut.tools, **flags))
        self._check_complete(cut, layout)
        layout.renamed = [self.encoder.rename(piece) for piece in layout.pieces]
        tokens = self.encoder.tokens.findall("\n".join(layout.pieces))
        layout.controls = [self.encoder.ids[token] for token in tokens]
        for n, message in enumerate(messages):
            if message["role"] == "assistant" and not flags:  # in a prompt nothing is learned
                layout.spans[n] = self._span(cut, layout, n)
        return layout

    def _check_complete(self, cut: Cut, layout: Layout) -> None:
        """Refuse a conversation of which the template leaves out what counts."""
        written = {n for n, _ in layout.slots}
        last = max((n for n, m in enumerate(cut.messages) if m["role"] == "user"), default=-1)
        for n, (turn, name) in enumerate(cut.owners):
            if n in written or not cut.values[n]:
                continue
            where = "" if turn is None else f"turn {turn + 1}: "
            if name == "tool name":
                shape = '{"type": "function", "function": {"name", ...}}'
                raise ValueError(
                    f"the chat template leaves tools out: it knows none, or wants {shape}"
                )
            if name in ("content", "tool_calls name"):
                what = "the content" if name == "content" else "a call"
                role = cut.messages[turn or 0]["role"]
                raise ValueError(f"{where}the chat template leaves out {what} of this {role} turn")
            is_old = turn is not None and turn < last
            if name == "reasoning_content" and not (is_old and self.manner.thinks):
                if not is_old or cut.way.thinking == "none":
                    advice = "take it out of the row, or use a template that has it"
                    raise ValueError(f"{where}the chat template leaves out the thinking: {advice}")

    def _span(self, cut: Cut, layout: Layout, turn: int) -> Span:
        """Where in the layout an assistant turn says what is to be learned."""
        slots = [i for i, (n, _) in enumerate(layout.slots) if cut.owners[n][0] == turn]
        if not slots:
            raise ValueError(f"turn {turn + 1}: the chat template writes no answer without text")
        if any(cut.owners[n][0] != turn for n, _ in layout.slots[slots[0] : slots[-1]]):
            raise ValueError(f"turn {turn + 1}: the chat template writes other turns into this one")
        rename, tokens = self.encoder.rename, self.encoder.tokens
        before, behind = layout.pieces[slots[0]], layout.pieces[slots[-1] + 1]
        head = next((head for head in self.manner.heads if head in before), None)
        if head is not None:
            begin = before.rfind(head) + len(head)
        else:  # an answer behind the result of a tool, say
            begin = max((match.end() for match in tokens.finditer(before)), default=-1)
            if begin < 0:
                fault = f"cannot tell where this turn begins: before it stands {before!r}"
                raise ValueError(f"turn {turn + 1}: {fault}")
        end = self._end(cut, behind, turn)
        mark = self._mark(layout, slots[0], before[:begin], slots[-1], behind[:end])
        begin, end = len(rename(before[:begin])), len(rename(behind[:end]))
        return Span(slots[0], begin, slots[-1], end, mark)

    def _mark(self, layout: Layout, first: int, before: str, last: int, behind: str) -> Mark | None:
        """The place of a span in tokens: what the tokens between are is the same in every text."""
        rename, tokens = self.encoder.rename, self.encoder.tokens
        earlier = list(tokens.finditer(before))
        if not earlier:
            return None
        head = self.encoder(rename(before[earlier[-1].start() :]))[1:]
        counts = [len(tokens.findall(piece)) for piece in layout.pieces[: last + 1]]
        after = sum(counts[:first]) + len(earlier) - 1
        return Mark(after, head, sum(counts) + len(tokens.findall(behind)) - 1)

    def _end(self, cut: Cut, behind: str, turn: int) -> int:
        """Where a turn ends in the control text behind it."""
        tokens, tail = list(self.encoder.tokens.finditer(behind)), ""
        if "tool_calls" in cut.messages[turn]:  # a call may end otherwise, with <|eom_id|>, say
            said = self.template.render(cut.messages[: turn + 1], cut.tools)
            tail = parse_layout(said).pieces[-1]
            own = self.encoder.tokens.findall(tail)
            at = next((n for n, token in enumerate(own) if token in self.manner.ends), len(own) - 1)
            if own[: at + 1] == [match[0] for match in tokens[: at + 1]] and own:
                return tokens[at].end()
        ends = [match.end() for match in tokens if match[0] in self.manner.ends]
        if not ends:
            fault = f"no token ends this turn: behind it stands {behind!r}"
            raise ValueError(f"turn {turn + 1}: {fault}")
        return ends[0]

    def _fill(self, layout: Layout, cut: Cut) -> Chat:
        parts, pieces = layout.fill(layout.renamed, cut.values), layout.renamed
        spans = {}
        if layout.spans:
            ends = list(accumulate(map(len, parts)))
            for turn, span in layout.spans.items():
                begin = ends[2 * span.first] - len(pieces[span.first]) + span.begin
                spans[turn] = begin, ends[2 * span.last + 1] + span.end, span.mark
        return Chat("".join(parts), spans, layout.controls)


def open_readers(tokenizer, encoder: TextEncoder) -> tuple[TemplateReader, TemplateReader]:
    """The readers of a tokenizer's chat templates, checked: for all, and for those with tools.

    Raises:
        ValueError: there is no chat template, or one with a fault.
    """
    place = str(getattr(tokenizer, "template_place", "the tokenizer's chat template"))
    templates = tokenizer.chat_template
    if not templates:
        fault = "there is no chat template (chat_template.jinja, or in tokenizer_config.json)"
        folder = getattr(tokenizer, "folder", "") or tokenizer.name_or_path or "the tokenizer"
        raise ValueError(f"{folder}: {fault}; {OTHER}")
    if isinstance(templates, str):
        templates = {"default": templates}
    if "default" not in templates:
        found = ", ".join(templates)
        raise ValueError(f"{place}: no template is named 'default' (found: {found}); {OTHER}")
    variables = dict(tokenizer.special_tokens_map)
    reader = TemplateReader(Template(templates["default"], place, variables), encoder)
    tool_reader = reader
    if "tool_use" in templates:
        tool_reader = TemplateReader(Template(templates["tool_use"], place, variables), encoder)
    check_battery(reader, tool_reader, tokenizer)
    return reader, tool_reader
