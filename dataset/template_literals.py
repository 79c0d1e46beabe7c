"""What a chat template looks for in the texts that it is given.

Most templates only put texts in their places. Some look into them, too: Qwen3's asks whether
"</think>" is in an answer, and cuts it there. A text is then not only a text, and whoever renders
the template with a stand-in in its place misses that. `looks_of` finds what a template looks for.
"""

import re
from dataclasses import dataclass, field

import jinja2
from jinja2 import nodes

STRIPS = ("strip", "lstrip", "rstrip", "trim")  # the ends of a text, which a stand-in keeps
METHODS = STRIPS + tuple(
    "split rsplit partition rpartition startswith endswith replace removeprefix removesuffix find"
    " count index get items keys values append pop update join format copy".split()
)
FILTERS = tuple(
    "trim tojson length count default d list first last join map select selectattr reject"
    " rejectattr string safe items dictsort replace reverse sort unique attr int batch".split()
)
TESTS = tuple(
    "defined undefined none string mapping iterable sequence number boolean true false odd even"
    " equalto eq == ne in sameas divisibleby integer callable".split()
)
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # transformers' own tag


@dataclass
class Looks:
    """parts: texts that the template looks for in others. wholes: that it compares with.

    always: it does something with texts that may depend on all they say (their length, say).
    """

    parts: set[str] = field(default_factory=set)
    wholes: set[str] = field(default_factory=set)
    always: bool = False

    def __post_init__(self):
        self.pattern = re.compile("(?!)")
        self.compared = ""

    def finish(self) -> "Looks":
        parts = {part.strip() or part for part in self.parts if part}
        self.pattern = re.compile("|".join(map(re.escape, sorted(parts))) or "(?!)")
        self.compared = "\0".join(sorted(self.wholes))
        return self

    def sees(self, text: str) -> bool:
        """Whether the template may do with a text something else than to put it in its place."""
        return self.always or text in self.compared or bool(self.pattern.search(text))


def looks_of(template: str) -> Looks:
    """What a template, which has no syntax errors, looks for."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    looks = Looks()
    _visit(environment.parse(GENERATION.sub("", template)), looks, shown=False)
    return looks.finish()


def _visit(node: nodes.Node, looks: Looks, shown: bool) -> None:
    """Collect the constants below a node.

    Args:
        shown: what the node gives is written, or joined to other texts, and not looked for.
    """
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str) and not shown:
            looks.parts.add(node.value)
        return
    if isinstance(node, nodes.Compare):
        return _visit_comparison(node, looks)
    if isinstance(node, nodes.Call | nodes.Filter | nodes.Test):
        return _visit_call(node, looks, shown)
    if isinstance(node, nodes.Getitem):
        _visit_item(node, looks, shown)
        return
    joins = isinstance(node, nodes.Output | nodes.Add | nodes.Concat)
    for child in node.iter_child_nodes():
        tested = isinstance(node, nodes.CondExpr | nodes.If) and child is node.test
        kept = isinstance(node, nodes.CondExpr | nodes.Or | nodes.And) and shown
        _visit(child, looks, (joins or kept) and not tested)


def _visit_comparison(node: nodes.Compare, looks: Looks) -> None:
    for operand in (node.expr, *(operand.expr for operand in node.ops)):
        for constant in operand.find_all(nodes.Const):
            _add_whole(constant, looks)
        if isinstance(operand, nodes.Const):
            _add_whole(operand, looks)
        else:
            _visit(operand, looks, shown=True)
    first = node.expr
    if node.ops[0].op in ("in", "notin") and isinstance(first, nodes.Const):
        _visit(first, looks, shown=False)
    if any(op.op in ("lt", "lteq", "gt", "gteq") for op in node.ops) and _reads_text(node.expr):
        looks.always = True


def _add_whole(constant: nodes.Const, looks: Looks) -> None:
    if isinstance(constant.value, str):
        looks.wholes.add(constant.value)


def _visit_call(node: nodes.Call | nodes.Filter | nodes.Test, looks: Looks, shown: bool) -> None:
    of = node.node
    if isinstance(node, nodes.Filter):
        name, known = node.name, FILTERS
        looks.always |= name in ("length", "count", "first", "last", "list") and _reads_text(of)
    elif isinstance(node, nodes.Test):
        name, known = node.name, TESTS
    elif isinstance(of, nodes.Getattr):
        name, known, of = of.attr, METHODS, of.node
    else:  # a macro, or a function of the environment
        name, known = "", ("",)
    looks.always |= name not in known or (name in ("split", "rsplit") and not node.args)
    if of is not None:
        _visit(of, looks, shown)
    for child in (*node.args, *(keyword.value for keyword in node.kwargs)):
        if name in STRIPS and isinstance(child, nodes.Const) and isinstance(child.value, str):
            looks.parts |= set("".join(child.value.split()))
        elif isinstance(node, nodes.Test) or name in ("selectattr", "rejectattr", "map", "default"):
            looks.wholes |= {c.value for c in _constants(child) if isinstance(c.value, str)}
        else:
            _visit(child, looks, shown=name in ("tojson", "get", "join", "append"))


def _constants(node: nodes.Node) -> list[nodes.Const]:
    return [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))


def _visit_item(node: nodes.Getitem, looks: Looks, shown: bool) -> None:
    key = node.arg
    number = isinstance(key, nodes.Const) and isinstance(key.value, int)
    looks.always |= (isinstance(key, nodes.Slice) or number) and _reads_text(node.node)
    _visit(node.node, looks, shown)
    if not isinstance(key, nodes.Const):
        _visit(key, looks, shown=True)


def _reads_text(node: nodes.Node) -> bool:
    """Whether a name says that what it stands for is a text, not a list of turns or tools."""
    name = getattr(node, "name", None) or getattr(node, "attr", None) or ""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        name = str(node.arg.value)
    return any(word in name for word in ("content", "text", "reasoning"))
