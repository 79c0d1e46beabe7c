"""Chat templates run in here: they can do no harm, and they end.

A chat template is a program, by whoever made the tokenizer. Jinja's sandbox keeps it from the
machine. This one counts what it does, too: turns of loops, calls, and the sizes of texts and lists.
"""

import functools
import json
import re
import time
from collections.abc import Iterable, Iterator, MappingView
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 5_000_000  # turns of loops, and calls: seconds
SIZE = 1 << 24  # characters of a text, items of a list
SECONDS = 20.0  # of this thread, where each step takes long
BITS = 4096  # of a whole number
# Calls whose result may be as long as all that is inside of what they are given
WRITERS = ("join", "tojson", "string", "pprint", "format", "sum", "urlencode")
SLOW = ("wordwrap", "urlize", "striptags", "xmlattr")  # filters that no chat template needs
SEQUENCES = (str, list, tuple)
CONTAINERS = (list, tuple, dict, MappingView)
WIDE = re.compile(r"\d{8}")  # in a format: columns


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with a budget."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self):
        extensions = [GenerationTag, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.written
        )
        self.filters["tojson"] = to_json
        kept = [name for name in self.filters if name not in SLOW]
        self.filters = {name: self.guard(name, self.filters[name]) for name in kept}
        self.filters |= {"count_turns": self.count_turns, "concatenate": self.concatenate}
        self.filters["checked"] = self.checked
        self.globals = {"range": range, "dict": dict, "namespace": Space}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.steps, self.deadline = 0, 0.0

    def run(self, template: jinja2.Template, **variables) -> str:
        """What a template writes. jinja2.SecurityError: it is over the budget, and how."""
        self.steps, self.deadline = 0, time.thread_time() + SECONDS
        parts, size = [], 0
        for part in template.generate(**variables):
            size += len(part)
            self.check_size(size)
            parts.append(part)
        return "".join(parts)

    def _parse(self, source, name, filename) -> nodes.Template:
        return Counting().visit(super()._parse(source, name, filename))

    # ----------------------------------------------------------------------------------------------
    # What costs
    # ----------------------------------------------------------------------------------------------

    def step(self, size: int = 0) -> None:
        """Count a step; more, where it reads or writes much."""
        before, self.steps = self.steps, self.steps + 1 + size // 256
        if self.steps > STEPS:
            raise jinja2.exceptions.SecurityError(f"it takes more than {STEPS:,} steps")
        if before >> 6 != self.steps >> 6 and time.thread_time() > self.deadline:
            raise jinja2.exceptions.SecurityError(f"it takes more than {SECONDS:g} seconds")

    def check_size(self, size: int) -> None:
        if size > SIZE:
            fault = f"it writes more than {SIZE:,} characters or items"
            raise jinja2.exceptions.SecurityError(fault)

    def checked(self, value):
        """A value; of a list in a list in ... the parts count each time that they are shared."""
        if isinstance(value, CONTAINERS):
            size = size_of(value)
            self.check_size(size)
            self.step(size)
        elif isinstance(value, str):
            self.check_size(len(value))
        return value

    def count_turns(self, items: Iterable) -> Iterator:
        for item in items:
            self.step()
            yield self.checked(item)

    def concatenate(self, parts: tuple) -> str:
        texts = [str(self.written(part)) for part in parts]
        self.check_size(sum(map(len, texts)))
        return "".join(texts)

    def written(self, value):
        """A value that becomes text."""
        if type(value) is str:
            self.steps += len(value) // 64
        else:
            self.check_size(size_of(value))
        return value

    def call_binop(self, context, operator: str, left, right):
        if operator == "+" and type(left) is str and type(right) is str:  # nearly always
            self.check_size(len(left) + len(right))
            self.steps += 1 + (len(left) + len(right)) // 256  # the next step looks at it
            return left + right
        if operator == "%" and isinstance(left, str):
            self.check_call("format", (left, *(right if isinstance(right, tuple) else [right])))
        elif operator != "%" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            self.check_size(SIZE + 1 if bits > BITS else 0)
        elif operator == "*":
            pair = (left, right)
            lengths = [len(value) for value in pair if isinstance(value, SEQUENCES)]
            times = [value for value in pair if isinstance(value, int)]
            self.check_size(lengths[0] * times[0] if lengths and times else 0)
        elif operator == "+" and isinstance(left, SEQUENCES) and isinstance(right, SEQUENCES):
            self.check_size(len(left) + len(right))
        self.step()
        return self.checked(super().call_binop(context, operator, left, right))

    def call(self, context, function, *args, **named):
        if isinstance(function, Macro):
            self.step(1024)
            self.checked((*args, *named.values()))
        else:
            name = getattr(function, "__name__", "")
            text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            self.check_call(name, (text, *args, *named.values()))
        return self.checked(super().call(context, function, *args, **named))

    def guard(self, name: str, function):
        """A filter that is checked as calls are."""

        @functools.wraps(function)
        def guarded(*args, **named):
            args = [list(self.count_turns(a)) if isinstance(a, Iterator) else a for a in args]
            self.check_call(name, (*args, *named.values()))
            value = function(*args, **named)
            return map(self.checked, value) if isinstance(value, Iterator) else self.checked(value)

        return guarded

    def check_call(self, name: str, values: tuple) -> None:
        """Count a call, and refuse one whose result may be too large."""
        if len(values) == 1 and type(values[0]) is str and name not in WRITERS:
            return self.step(1024 + len(values[0]))
        texts = sorted(len(value) for value in values if isinstance(value, str))
        numbers = [abs(value) for value in values[1:] if isinstance(value, int)]
        lists = [value for value in values if isinstance(value, list | tuple | dict | range)]
        self.step(1024 + sum(texts) + 16 * sum(map(len, lists)))
        most = max(numbers, default=0)
        self.check_size(most**2 if name == "round" else most)  # it computes 10**most
        if name in ("indent", "expandtabs"):
            texts = sorted([*texts, *numbers])
        if len(texts) > 1:  # "replace" may write the one for each character of the other
            self.check_size(texts[-1] * texts[-2] // 16)
        if name in WRITERS:
            separators = sum(texts) * max(map(len, lists), default=0)
            self.check_size(separators + sum(size_of(value) for value in lists))
            wide = name == "format" and any(WIDE.search(v) for v in values if isinstance(v, str))
            self.check_size(SIZE + 1 if wide else 0)


class Counting(NodeTransformer):
    """Has loops count their turns, `~` the characters that it writes, and lists all in them."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "count_turns", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.Tuple(node.nodes, "load"), "concatenate", [], [], None, None)

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # {% set a, b = ... %}
            return node
        return nodes.Filter(node, "checked", [], [], None, None)

    visit_Tuple = visit_Dict = visit_List


class Space(Namespace):
    """Jinja's namespace, whose text does not hold that of all in it."""

    __repr__ = object.__repr__


class GenerationTag(Extension):
    """transformers' own tag: what is inside of it is what the model says."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def size_of(value) -> int:
    """Characters and items in a value, however deep; counts no further than beyond SIZE."""
    size, left = 0, [value]
    while left and size <= SIZE:
        value = left.pop()
        size += 16
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, CONTAINERS):
            left += value
    return size


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    return json.dumps(value, sort_keys=sort_keys, **options)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def render(source: str, messages: list[dict], **variables) -> str:
    """What transformers' render_jinja_template gives.

    Raises:
        jinja2.exceptions.SecurityError: it takes more than the budget; others of jinja2.
    """
    messages = [
        {"thinking": m["reasoning_content"], **m} if m.get("reasoning_content") else m
        for m in messages
    ]
    sandbox, template = compiled(source)
    variables = {"add_generation_prompt": False, "documents": None, **variables}
    return sandbox.run(template, messages=messages, **variables)


@functools.lru_cache
def compiled(source: str) -> tuple[Sandbox, jinja2.Template]:
    """A template, and the sandbox that runs it. jinja2.TemplateSyntaxError: it is none."""
    sandbox = Sandbox()
    return sandbox, sandbox.from_string(source)
