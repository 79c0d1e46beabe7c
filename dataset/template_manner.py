"""A chat template as a program, and the manner in which it writes turns.

The manner is learned from a few exchanges of two turns, in which stand-ins take the place of texts.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from dataset.template_layout import as_call, parse_layout, stand_in

OTHER = "name another with --chat_template FILE"


@functools.cache
def our_template() -> str:
    """That of our own tokenizer, which ends; those of strangers are rendered with a budget."""
    folder = Path(__file__).parents[1] / "model/minimind_tokenizer"
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Template:
    """A chat template.

    source: Jinja. place: where it is from, for messages. variables: the tokens that templates name
    (bos_token, ...).
    """

    source: str
    place: str
    variables: dict

    def render(self, messages: list[dict], tools: list | None = None, **flags) -> str:
        """What the template gives, as `apply_chat_template` does.

        Raises:
            ValueError: it refuses the conversation, or fails.
        """
        flags = {"tools": tools, **self.variables, **flags}
        try:
            if self.source == our_template():
                from transformers.utils.chat_template_utils import render_jinja_template

                return render_jinja_template([messages], chat_template=self.source, **flags)[0][0]
            from dataset.template_sandbox import render

            return render(self.source, messages, **flags)
        except Exception as error:  # a template is a program: it fails as programs do
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = "refuses" if type(error) is jinja2.TemplateError else "fails on"
            raise ValueError(f"the chat template {kind} the conversation: {reason}") from None

    def opening(self, thinking: bool | None) -> str:
        """What a prompt says already of the reply: "<think>\\n", or nothing."""
        user = [{"role": "user", "content": stand_in(0)}]
        flags = {} if thinking is None else {"enable_thinking": thinking}
        prompt = self.render(user, add_generation_prompt=True, **flags).partition(stand_in(0))[2]
        at = prompt.rfind("<think>")
        return prompt[at:] if at >= 0 and "</think>" not in prompt[at:] else ""


@dataclass
class Manner:
    """How a template writes assistant turns.

    heads: what stands before one, the likeliest first. ends: the tokens that end one. thinks: it
    knows reasoning_content. text_arguments: it wants the arguments of a call as JSON text.
    """

    heads: list[str]
    ends: list[str]
    thinks: bool
    text_arguments: bool


def learn_manner(template: Template, tokens: re.Pattern) -> Manner:
    """How a template writes assistant turns.

    Args:
        tokens: finds control tokens.

    Raises:
        ValueError: it fails on an exchange of two turns, or ends no assistant turn with a token.
    """
    user = [{"role": "user", "content": stand_in(n)} for n in (0, 2)]
    answer = [{"role": "assistant", "content": stand_in(n)} for n in (1, 3)]
    try:
        asked = template.render(user[:1])
        prompt = template.render(user[:1], add_generation_prompt=True)
        said = template.render([user[0], answer[0]])
        later = template.render([user[0], answer[0], user[1], answer[1]])
    except ValueError as error:
        raise ValueError(f"{template.place}: {error}; {OTHER}") from None
    if any(mark not in text for mark, text in ((stand_in(0), asked), (stand_in(1), said))):
        fault = "the chat template leaves turns out, or does not write texts as they are"
        raise ValueError(f"{template.place}: {fault}; {OTHER}")
    head = said[: common_tokens(prompt, said, tokens)]
    generation = common_tokens(prompt, asked, tokens)
    heads = beginnings(prompt[generation:], asked, tokens) or [head.rpartition(stand_in(0))[2]]
    thinks = writes(template, [user[0], {**answer[0], "reasoning_content": stand_in(2)}], 2)
    call = {"name": "f", "arguments": {"x": stand_in(2)}}
    calls = [{**answer[0], "content": "", "tool_calls": [as_call(call, t)]} for t in (0, 1)]
    as_dict, as_text = (writes(template, [user[0], call], 2) for call in calls)
    ends = end_tokens(said, later, tokens)
    if not ends:
        tail = said.partition(stand_in(1))[2]
        fault = f"no token ends an assistant turn: behind it stands {tail!r}"
        raise ValueError(f"{template.place}: {fault}; {OTHER}")
    return Manner(heads, ends, thinks, text_arguments=as_text and not as_dict)


def end_tokens(said: str, later: str, tokens: re.Pattern) -> list[str]:
    """The tokens that end an answer, the last one of a conversation and an earlier one.

    Args:
        said: a question and its answer. later: two of each.
    """
    last = tokens.search(said.partition(stand_in(1))[2])
    earlier, user_end = (tokens.search(later.partition(stand_in(n))[2]) for n in (1, 0))
    if not last:
        return []
    # Behind an earlier answer may stand the next turn's header; an end is also that of other turns.
    is_end = earlier and user_end and earlier[0] == user_end[0] and earlier[0] != last[0]
    return [last[0], earlier[0]] if is_end else [last[0]]


def writes(template: Template, messages: list[dict], n: int) -> bool:
    """Whether the template writes a stand-in of a conversation."""
    try:
        return any(slot == n for slot, _ in parse_layout(template.render(messages)).slots)
    except ValueError:
        return False


def beginnings(prompt: str, asked: str, tokens: re.Pattern) -> list[str]:
    """A generation prompt, and its beginnings: a turn that does not think may lack its end."""
    tags = re.compile(f"{tokens.pattern}|<think>")
    edges = {edge for match in tags.finditer(prompt) for edge in match.span()}
    first = tags.match(prompt)
    least = first.end() if first and first[0] in asked else 0  # it begins any turn
    edges = {edge for edge in edges if edge > least} | ({len(prompt)} if prompt else set())
    return [prompt[:edge] for edge in sorted(edges, reverse=True)]


def common_tokens(text: str, other: str, tokens: re.Pattern) -> int:
    """How many characters of a text, in whole control tokens, stand before another, too."""
    size = common(text, other)
    spans = (match.span() for match in tokens.finditer(text))
    return next((begin for begin, end in spans if begin < size < end), size)


def common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
