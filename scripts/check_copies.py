"""Check that what the stage scripts repeat is the same in all of them.

Reads    trainer/train_*.py (parsed, never imported)
Command  python scripts/check_copies.py            one line per finding and exit 1, or one line and
         exit 0
         python scripts/check_copies.py --fix      first rewrites the marked copies that differ from their original

A function or class that several scripts define is the same word for word, or says why it is not. A
line directly above the def (or its decorators) tells which:

    # Copied from trainer.train_pretrain.get_lr
    # Differs from trainer.train_pretrain.evaluate: scores pairs, not tokens

The landmarks that make each script what it is (train_epoch, parse_args, main) need no such line. A
flag that several stages have is the same in type, choices, action, nargs and help; only the default
may differ. A group's flags may be added by a short name, `add = group.add_argument`. The exemption
there is a line directly above the call: `# Differs from trainer.train_pretrain.--lr: reason`.
"""

import argparse
import ast
import os
import re
import shutil
import sys
import tokenize
from collections import defaultdict
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.flags import check_flags as check_values
from runtime.flags import usage_error
from runtime.process import exits

# The script the others are copied from: of equal definitions, its own is the first
ORIGINAL = "train_pretrain"
# Repeats no helper and shares no flag, but must not define a helper anew either
NOT_A_STAGE = {"train_tokenizer"}
LANDMARKS = {"train_epoch", "parse_args", "main"}  # what a stage is: every script has its own
FLAG_KEYWORDS = ("type", "choices", "action", "nargs", "help")

MARKER_LIKE = re.compile(r"#\s*(copied|differs)\s+from\s+trainer\b", re.IGNORECASE)
MARKER = re.compile(
    r"# (?:Copied from trainer\.(\w+)\.(\w+)|Differs from trainer\.(\w+)\.((?:--)?\w+): *(\S.*))"
)
MARKER_FORMS = (
    "write '# Copied from trainer.MODULE.NAME' or '# Differs from trainer.MODULE.NAME: reason'"
)


@dataclass
class Marker:
    line: int
    kind: str  # "Copied" or "Differs"
    module: str  # the script it names, without folder and suffix
    name: str  # the function, class or --flag it names

    def __str__(self) -> str:
        return f"trainer.{self.module}.{self.name}"


@dataclass
class Definition:
    script: "Script"
    name: str
    line: int  # of the def or class itself
    first: int  # with decorators
    last: int  # with the comments that end the body
    marker: Marker | None

    @property
    def lines(self) -> list[str]:
        return self.script.lines[self.first - 1 : self.last]

    @property
    def text(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


@dataclass
class Flag:
    script: "Script"
    name: str
    line: int
    keywords: dict[str, str]  # of FLAG_KEYWORDS, as source
    marker: Marker | None


@dataclass
class Script:
    path: Path
    label: str  # trainer/train_x.py, for findings
    lines: list[str] = field(default_factory=list)
    definitions: list[Definition] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.path.stem


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_scripts(root: Path, findings: list[tuple]) -> dict[str, Script]:
    """Parse all scripts, by module name; the original first and what is no stage last."""
    # The old paths of the engines' scripts lead to the new ones: they define nothing.
    moved = {path.name for path in (root / "trainer/engines").glob("train_*.py")}
    paths = [path for path in (root / "trainer").glob("train_*.py") if path.name not in moved]
    paths += (root / "trainer/engines").glob("train_*.py")
    paths.sort(key=lambda path: (path.stem != ORIGINAL, path.stem in NOT_A_STAGE, path))
    scripts = {}
    for path in paths:
        script = Script(path, path.relative_to(root).as_posix())
        scripts[script.module] = script
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            script.lines = source.split("\n")  # as the parser counts them, unlike splitlines()
            markers = read_markers(script, source, findings)
        except UnicodeDecodeError as error:
            findings.append((script.label, 1, f"is not UTF-8 (byte {error.start})"))
            continue
        except (SyntaxError, ValueError) as error:
            findings.append(
                (script.label, getattr(error, "lineno", None) or 1, f"cannot be parsed: {error}")
            )
            continue
        script.definitions = read_definitions(script, tree, markers)
        script.flags = read_flags(script, tree, markers)
        for line in markers:
            message = "marker is not directly above a top-level def or an add_argument"
            findings.append((script.label, line, message))
    return scripts


def read_markers(script: Script, source: str, findings: list[tuple]) -> dict[int, Marker]:
    """Return the markers by line. The next steps take out those that stand where they belong."""
    markers = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type != tokenize.COMMENT or not MARKER_LIKE.match(token.string):
            continue
        line = token.start[0]
        match = MARKER.fullmatch(token.string.rstrip())
        if match is None:
            findings.append((script.label, line, f"malformed marker: {MARKER_FORMS}"))
        elif token.line[: token.start[1]].strip():
            findings.append(
                (script.label, line, "marker stands behind code: give it a line of its own")
            )
        elif match[1]:
            markers[line] = Marker(line, "Copied", match[1], match[2])
        else:
            markers[line] = Marker(line, "Differs", match[3], match[4])
    return markers


def read_definitions(
    script: Script, tree: ast.Module, markers: dict[int, Marker]
) -> list[Definition]:
    definitions = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            last = last_line(script.lines, node.end_lineno)
            marker = markers.pop(first - 1, None)
            definitions.append(Definition(script, node.name, node.lineno, first, last, marker))
    return definitions


def last_line(lines: list[str], end: int) -> int:
    """Return the last line of a body that the parser ends at `end`, with comments below it."""
    for number, line in enumerate(lines[end:], start=end + 1):
        if line.strip() and not (line[0].isspace() and line.lstrip().startswith("#")):
            break
        if line.strip():
            end = number
    return end


def read_flags(script: Script, tree: ast.Module, markers: dict[int, Marker]) -> list[Flag]:
    """Collect the flags: calls add_argument("--x", ...), or add("--x", ...) of a group's `add`.

    Names of constants, of the module or of the function, are replaced by their values.
    """
    constants = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    class PutInConstants(ast.NodeTransformer):
        def visit_Name(self, node):
            return constants.get(node.id, node)

    flags = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and adds_argument(node.func, constants)):
            continue
        names = [
            arg.value
            for arg in node.args
            if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
        keywords = {
            keyword.arg: ast.unparse(PutInConstants().visit(keyword.value))
            for keyword in node.keywords
            if keyword.arg in FLAG_KEYWORDS
        }
        marker = markers.pop(node.lineno - 1, None)
        flags += [
            Flag(script, name, node.lineno, keywords, marker)
            for name in names
            if name.startswith("--")
        ]
    return sorted(flags, key=lambda flag: flag.line)


def adds_argument(function: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """Whether it is `parser.add_argument`, or a name for it: `add = group.add_argument`."""
    if isinstance(function, ast.Name):
        function = constants.get(function.id)
    return isinstance(function, ast.Attribute) and function.attr == "add_argument"


# --------------------------------------------------------------------------------------------------
# Checking
# --------------------------------------------------------------------------------------------------


def check_marked(
    scripts: dict[str, Script], findings: list[tuple]
) -> list[tuple[Definition, Definition]]:
    """Compare marked definitions with those they name; return (copy, original) to rewrite."""
    outdated = []
    for definition in (d for script in scripts.values() for d in script.definitions if d.marker):
        script, marker = definition.script, definition.marker
        original = named(scripts, marker, "definitions")
        if marker.name != definition.name:
            message = f"marker names {marker.name}, the def is {definition.name}"
            findings.append((script.label, marker.line, message))
        elif original is None or original.script is script:
            findings.append(
                (script.label, marker.line, f"marker names {marker}, which no other script has")
            )
        elif original.marker and original.marker.kind == "Copied":
            message = f"{place(original)} is itself a copy: name {original.marker}"
            findings.append((script.label, marker.line, message))
        elif marker.kind == "Differs":
            if original.text == definition.text:
                findings.append(
                    (script.label, marker.line, f"equals {place(original)}: mark it as copied")
                )
        elif original.text != definition.text:
            line = first_difference(definition, original)
            message = (
                f"{marker.name} differs from its original, {place(original)}: change it there and"
                " run with --fix"
            )
            findings.append((script.label, line, message))
            outdated.append((definition, original))
    return outdated


def named(scripts: dict[str, Script], marker: Marker, kind: str) -> Definition | Flag | None:
    """Return what a marker names, or None if it does not exist."""
    script = scripts.get(marker.module)
    return next((item for item in getattr(script, kind, []) if item.name == marker.name), None)


def place(item: Definition | Flag) -> str:
    return f"{item.script.label}:{item.line}"


def first_difference(copy: Definition, original: Definition) -> int:
    """Return the line of the copy's file where it leaves the original."""
    same = 0
    while same < min(len(copy.text), len(original.text)) and copy.text[same] == original.text[same]:
        same += 1
    return min(copy.first + same, copy.last)


def check_unmarked(scripts: dict[str, Script], findings: list[tuple]) -> None:
    """Find names that two scripts define without saying so."""
    owners = {}
    for definition in (
        d for script in scripts.values() for d in script.definitions if not d.marker
    ):
        owner = owners.setdefault(definition.name, definition)
        if owner.script is not definition.script and definition.name not in LANDMARKS:
            form = f"trainer.{owner.script.module}.{owner.name}"
            message = (
                f"{owner.name} is defined in {place(owner)} too: put '# Copied from {form}' above"
                " it, or "
            )
            message += f"'# Differs from {form}: reason', or rename it"
            findings.append((definition.script.label, definition.line, message))


def check_flags(scripts: dict[str, Script], findings: list[tuple]) -> int:
    """Find flags that are not the same in all stages; return how many several stages share."""
    owners, users = {}, defaultdict(set)
    for flag in (
        f for script in scripts.values() if script.module not in NOT_A_STAGE for f in script.flags
    ):
        users[flag.name].add(flag.script.module)
        label, marker = flag.script.label, flag.marker
        if marker is None:
            owner = owners.setdefault(flag.name, flag)
            if owner.keywords != flag.keywords:
                difference = flag_difference(flag, owner)
                findings.append(
                    (label, flag.line, f"{flag.name} differs from {place(owner)}: {difference}")
                )
            continue
        other = named(scripts, marker, "flags")
        if marker.kind != "Differs" or marker.name != flag.name:
            message = f"only '# Differs from trainer.MODULE.{flag.name}: reason' fits here"
            findings.append((label, marker.line, message))
        elif other is None or other.script is flag.script:
            findings.append(
                (label, marker.line, f"marker names {marker}, which no other script has")
            )
        elif other.keywords == flag.keywords:
            findings.append((label, marker.line, f"equals {place(other)}: take the marker away"))
    return sum(len(modules) > 1 for modules in users.values())


def flag_difference(flag: Flag, other: Flag) -> str:
    """Say in what two flags differ; a help text is too long to be quoted."""
    differences = []
    for keyword in FLAG_KEYWORDS:
        here, there = (item.keywords.get(keyword, "none") for item in (flag, other))
        if here != there:
            differences.append(
                "help" if keyword == "help" else f"{keyword} is {here} here, {there} there"
            )
    return "; ".join(differences)


# --------------------------------------------------------------------------------------------------
# Fixing
# --------------------------------------------------------------------------------------------------


def rewrite(outdated: list[tuple[Definition, Definition]]) -> None:
    """Put the originals in place of the copies, each file at once or not at all."""
    by_script = defaultdict(list)
    for copy, original in outdated:
        by_script[copy.script.path].append((copy, original))
        print(f"{place(copy)}: {copy.name} rewritten from {place(original)}")
    for path, copies in by_script.items():
        lines = list(copies[0][0].script.lines)
        # From below, so that line numbers stay true
        for copy, original in sorted(copies, key=lambda pair: -pair[0].first):
            lines[copy.first - 1 : copy.last] = original.lines
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("\n".join(lines), encoding="utf-8")
        shutil.copymode(path, beside)
        os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Check that what the stage scripts repeat is the same in all of them."
    )
    parser.add_argument(
        "--fix", action="store_true", help="rewrite the marked copies from their originals"
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[1],
        help="folder with trainer/",
    )
    parser.error = usage_error
    args = parser.parse_args()
    check_values(vars(args))

    findings = []  # of (file, line, message)
    scripts = read_scripts(args.root, findings)
    if not scripts:
        print(f"error: no trainer/train_*.py in {str(args.root)!r}", file=sys.stderr)
        return 2
    outdated = check_marked(scripts, findings)
    if args.fix and outdated:
        rewrite(outdated)
        findings = []
        scripts = read_scripts(args.root, findings)
        check_marked(scripts, findings)
    check_unmarked(scripts, findings)
    shared_flags = check_flags(scripts, findings)

    for label, line, message in sorted(findings):
        print(f"{label}:{line}: {message}")
    if not findings:
        markers = (
            definition.marker for script in scripts.values() for definition in script.definitions
        )
        copies = sum(marker is not None and marker.kind == "Copied" for marker in markers)
        print(
            f"check_copies: {len(scripts)} scripts with {copies} copies and {shared_flags} shared"
            " flags agree"
        )
    return 1 if findings else 0


if __name__ == "__main__":
    exits.run(main)
