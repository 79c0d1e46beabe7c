"""What a chat template looks for in the texts that it is given.

Most templates only put texts in their places. Some look into them, too: Qwen3's asks whether
"</think>" is in an answer, and cuts it there. Whoever renders a template with a stand-in in place
of a text misses that, and so has to know what to look for.
"""

import re
from collections.abc import Iterator

import jinja2
from jinja2 import nodes

STRIPS = ("strip", "lstrip", "rstrip", "trim")  # the ends of a text, which a stand-in keeps
SEARCHES = "split rsplit partition rpartition startswith endswith replace find count index".split()
METHODS = (*STRIPS, *SEARCHES, *"removeprefix removesuffix".split())
METHODS += tuple("get items keys values append pop update join format".split())
FILTERS = (*STRIPS, *"tojson length count default d list string safe first last join".split())
FILTERS += tuple("map select selectattr reject rejectattr items dictsort reverse replace".split())
TESTS = tuple("defined undefined none string mapping iterable sequence number boolean".split())
TESTS += tuple("true false odd even integer callable equalto eq == ne in".split())
WHOLES = (*TESTS, "selectattr", "rejectattr", "map", "default", "d")  # their arguments are no parts
COUNTS = ("length", "count", "first", "last", "list", "reverse", "join")  # of a text: its letters
LISTS = ("message", "turn", "user", "tool", "call", "conversation", "history", "split")
PLAIN = ("role", "type", "index", "index0", "last", "length")
KNOWN = (nodes.Const, nodes.List, nodes.Tuple, nodes.Compare, nodes.Test, nodes.Mod)
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # transformers' own tag


class Looks:
    """What a template, which has no syntax error, looks for.

    Attributes:
        parts: texts that it looks for in others. wholes: that it compares with.
        always: it does something else with texts that may depend on all they say.
    """

    def __init__(self, source: str):
        self.parts: set[str] = set()
        self.wholes: set[str] = set()
        self.always = False
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        tree = environment.parse(GENERATION.sub("", source))
        self._texts: set[str] = set()  # names that may stand for a text, whatever they are called
        for target, value in _bindings(tree):
            if value is None or not self._is_list(value):
                self._texts.add(_name(target))
        self._visit(tree, shown=False)
        parts = {part.strip() or part for part in self.parts if part}
        self._pattern = re.compile("|".join(map(re.escape, sorted(parts))) or "(?!)")
        self._compared = "\0".join(sorted(self.wholes))

    def sees(self, text: str) -> bool:
        """Whether the template may do with a text something else than to put it in its place."""
        return self.always or text in self._compared or bool(self._pattern.search(text))

    def _visit(self, node: nodes.Node, shown: bool) -> None:
        """Collect the constants below a node.

        Args:
            shown: what the node gives is written, or joined to other texts, and not looked for.
        """
        children = list(node.iter_child_nodes())
        if isinstance(node, nodes.Const):
            if isinstance(node.value, str) and not shown:
                self.parts.add(node.value)
        elif isinstance(node, nodes.Compare):
            self._visit_comparison(node)
        elif isinstance(node, nodes.Call | nodes.Filter | nodes.Test):
            self._visit_call(node, shown)
        elif isinstance(node, nodes.Getitem):
            cuts = _cuts(node.arg)
            cuts |= _is_text(node.node) and not isinstance(node.arg, nodes.Const)
            self.always |= cuts and not self._is_list(node.node)
            self._visit(node.node, shown)
            self._visit(node.arg, shown=True)
        else:
            joins = isinstance(node, nodes.Output | nodes.Add | nodes.Concat)
            joins |= shown and isinstance(node, nodes.CondExpr | nodes.Or | nodes.And)
            for child in children:
                self._visit(child, joins and child is not getattr(node, "test", None))

    def _visit_comparison(self, node: nodes.Compare) -> None:
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        for operand in operands:
            self.wholes |= _texts(operand)
            self._visit(operand, shown=True)
        operator = node.ops[0].op
        if operator in ("in", "notin"):
            self._visit(node.expr, shown=False)
        if operator not in ("eq", "ne", "in", "notin"):
            self.always |= any(map(_is_text, operands))
        elif not any(isinstance(o, KNOWN) or _name(o) in PLAIN for o in operands):
            self.always = True  # one turn is compared with another

    def _visit_call(self, node: nodes.Call | nodes.Filter | nodes.Test, shown: bool) -> None:
        of, name = node.node, getattr(node, "name", "")
        known = {nodes.Filter: FILTERS, nodes.Test: TESTS}.get(type(node), ("",))
        if isinstance(node, nodes.Call) and isinstance(of, nodes.Getattr):
            of, name, known = of.node, of.attr, METHODS
        counts = isinstance(node, nodes.Filter) and name in COUNTS and of is not None
        self.always |= name not in known or (counts and not self._is_list(of))
        self.always |= name in SEARCHES and not node.args
        if of is not None:
            self._visit(of, shown)
        for child in (*node.args, *(keyword.value for keyword in node.kwargs)):
            if name in STRIPS:
                self.parts |= set("".join("".join(_texts(child)).split()))
            elif name in WHOLES:
                self.wholes |= _texts(child)
            else:
                self._visit(child, shown=name in ("tojson", "get", "join", "append"))

    def _is_list(self, node: nodes.Node) -> bool:
        """Whether a name says that it stands for turns or tools, or for the parts of a text."""
        name = "" if getattr(node, "name", "") == "join" else _name(node)
        return name not in self._texts and any(word in name for word in LISTS)


def _bindings(tree: nodes.Node) -> Iterator[tuple[nodes.Node, nodes.Node | None]]:
    """Names that a template gives, and what to; None: anything."""
    for node in tree.find_all(
        (nodes.Assign, nodes.AssignBlock, nodes.With, nodes.Macro, nodes.For)
    ):
        if isinstance(node, nodes.Assign):
            yield node.target, node.node
        elif isinstance(node, nodes.For):
            yield node.target, node.iter
        elif isinstance(node, nodes.With):
            yield from zip(node.targets, node.values, strict=True)
        else:
            targets = [node.target] if isinstance(node, nodes.AssignBlock) else node.args
            yield from ((target, None) for target in targets)


def _texts(node: nodes.Node) -> set[str]:
    """The constant texts of a node."""
    constants = [node] if isinstance(node, nodes.Const) else node.find_all(nodes.Const)
    return {constant.value for constant in constants if isinstance(constant.value, str)}


def _cuts(key: nodes.Node) -> bool:
    return isinstance(key, nodes.Slice | nodes.Neg) or isinstance(getattr(key, "value", None), int)


def _name(node: nodes.Node) -> str:
    """The last name of a.b, a['b'], a[1:] or a | filter."""
    if isinstance(node, nodes.Getitem):
        key = getattr(node.arg, "value", None)
        return key if isinstance(key, str) else _name(node.node)
    if isinstance(node, nodes.Filter | nodes.Call) and node.node is not None:
        return _name(node.node)
    return getattr(node, "attr", None) or getattr(node, "name", None) or ""


def _is_text(node: nodes.Node) -> bool:
    return any(word in _name(node) for word in ("content", "text", "reasoning"))
