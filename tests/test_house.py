"""The rules of the house: which way imports go, what a stage script holds, what files may
contain."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import write_jsonl
from running import ROOT, STAGE_SCRIPTS, run_ranks

# What a folder must not know: data flows dataset -> trainer -> out, with model and runtime below
# the trainer.
ABOVE = {"trainer", "scripts", "benchmarks", "tests", "eval_model", "main"}
MUST_NOT_IMPORT = {
    "model": ABOVE | {"runtime", "kernels"},
    "dataset": ABOVE | {"runtime", "kernels"},
    "kernels": ABOVE | {"runtime", "dataset"},
    "runtime": ABOVE,
    # Each script stands alone: what two of them need is a marked copy, or belongs to runtime
    "trainer": ABOVE,
}
# What training may import at start: the four packages of requirements.txt, and what comes with
# them.
PACKAGES = {"torch", "transformers", "numpy", "wandb", "tokenizers", "safetensors", "tqdm", "yaml"}
PACKAGES |= {"jinja2"}  # comes with torch; chat templates are written in it

CARD = {"model", "dataset", "trainer", "out", "requirements.txt", "README.md", "eval_model.py"}

HELPERS = [
    "init_distributed_mode",
    "get_lr",
    "setup_seed",
    "is_main_process",
    "Logger",
    "save_weights",
]
LANDMARKS = [*HELPERS, "train_epoch", "parse_args", "main"]

# Built from parts, so that this file passes its own test.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/})>*~-])/(?:" + "|".join(["work", "root", "home"]) + r")(?![\w-])"
)


def project_files() -> list[str]:
    """Tracked files and those that would be tracked, relative to ROOT."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        names = subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # a download without git
        parts = [
            path.relative_to(ROOT).parts
            for path in ROOT.rglob("*")
            if "__pycache__" not in path.parts
        ]
        names = ["/".join(p) for p in parts if p[0] not in (".git", ".venv", "out", "wandb")] + [
            "out/README.md"
        ]
    return sorted(name for name in set(names) if (ROOT / name).is_file())


FILES = project_files()
PYTHON = [name for name in FILES if name.endswith(".py")]
STAGES = [path.relative_to(ROOT).as_posix() for path in STAGE_SCRIPTS.values()]


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imported_modules(tree: ast.AST, name: str) -> list[tuple[int, str]]:
    """Return (line, dotted module) of every import under `tree`, of the file `name`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            # "from model import lm" may name a module as well as "from model.lm import X".
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def test_imports_go_one_way():
    wrong = [
        f"{name}:{line}: {name.split('/')[0]} must not import {module}"
        for name in PYTHON
        for line, module in imported_modules(parse(name), name)
        if module.split(".")[0] in MUST_NOT_IMPORT.get(name.split("/")[0], ())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("of", ["modules", "folders"])
def test_imports_make_no_circle(of):
    """Neither do two files import each other, on whatever way, nor two folders."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in PYTHON}
    graph = {}
    for module, name in modules.items():
        for _, target in imported_modules(parse(name), name):
            parts = target.split(".")
            known = next(
                (m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in modules), None
            )
            if known is None:
                continue
            ends = (
                (module, known) if of == "modules" else (module.split(".")[0], known.split(".")[0])
            )
            if ends[0] != ends[1]:
                graph.setdefault(ends[0], set()).add(ends[1])
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports in a circle: " + " -> ".join(reversed(error.args[1])))


def test_training_needs_the_four_packages_only():
    """Anything else is imported inside the function that uses it."""
    ours = {"model", "kernels", "dataset", "runtime", "trainer"}
    wrong = []
    for name in PYTHON:
        if name.split("/")[0] not in ours:
            continue
        tree = parse(name)
        for node in ast.walk(
            tree
        ):  # what runs when the module is imported: everything but bodies of functions
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []
        for line, module in imported_modules(tree, name):
            top = module.split(".")[0]
            if top not in ours | PACKAGES and top not in sys.stdlib_module_names:
                wrong.append(f"{name}:{line}: {module}")
    assert not wrong, "import these where they are used: " + ", ".join(wrong)


def test_python_3_10_has_what_is_used():
    """The oldest Python of README.md: typing.Self, say, or hashlib.file_digest are of 3.11."""
    pytest.importorskip("ty")
    folders = ["model", "dataset", "runtime", "kernels", "trainer", "scripts", "benchmarks"]
    words = ["check", "--python-version", "3.10", *folders, "eval_model.py", "main.py"]
    command = [sys.executable, "-m", "ty", *words, "--output-format", "concise"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


def test_no_flags_in_runtime():
    wrong = [
        f"{name}:{line}"
        for name in PYTHON
        if name.startswith("runtime/")
        for line, module in imported_modules(parse(name), name)
        if module.split(".")[0] == "argparse"
    ]
    assert not wrong, f"argparse belongs to the scripts: {wrong}"


def test_no_star_imports():
    wrong = [
        f"{n}:{line}"
        for n in PYTHON
        for line, module in imported_modules(parse(n), n)
        if module.endswith("*")
    ]
    assert not wrong, f"name what you import: {wrong}"


@pytest.mark.parametrize("name", STAGES)
def test_stage_scripts_have_the_same_landmarks(name):
    tree = parse(name)
    usage = ast.get_docstring(tree) or ""
    for command in (f"python {name}", f"torchrun --nproc_per_node 8 {name} --ddp"):
        assert command in usage, f"the docstring of {name} does not show: {command}"
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [function for function in defined if function in LANDMARKS] == LANDMARKS
    assert defined[: len(HELPERS)] == HELPERS, "the repeated helpers come first"
    assert "model.module.state_dict()" in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*STAGES, "main.py", "scripts/plan.py"])
def test_scripts_that_a_launcher_starts_watch_it_before_they_import_much(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    asks = next(n for n, line in enumerate(lines) if line.startswith("die_with_launcher()"))
    early = [line for line in lines[:asks] if line.startswith(("import ", "from "))]
    modules = [
        line.split()[1].split(".")[0] for line in early if line.split()[1] != "runtime.launcher"
    ]
    assert set(modules) <= set(sys.stdlib_module_names)


def test_the_layout_that_users_know():
    """Of a fresh clone, where out/ has nothing but a page that says what comes to lie there."""
    names = {name.split("/")[0] for name in FILES}
    assert CARD <= names, f"missing: {CARD - names}"
    assert [name for name in FILES if name.startswith("out/")] == ["out/README.md"]
    assert ".pth" in (ROOT / "out/README.md").read_text(encoding="utf-8")


def test_the_folder_of_runs_is_there_and_git_keeps_its_readme_alone():
    assert "out/README.md" in FILES
    ignored = [
        "out/full_sft_512.pth",
        "out/full_sft_512.json",
        "out/full_sft_512/metrics.jsonl",
        "out/cache/x",
    ]
    done = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", "out/README.md", *ignored],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 128 or done.stdout.splitlines() == ignored
    )  # 128: a download without git


def test_no_machine_paths():
    wrong = []
    for name in FILES:
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8", errors="replace")
            wrong += [
                f"{name}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}"
                for m in MACHINE_PATH.finditer(text)
            ]
    assert not wrong, "these exist on one machine only: " + ", ".join(wrong[:20])


@pytest.mark.parametrize("name", PYTHON)
def test_comments_and_names_are_ascii(name):
    """Other scripts stand in strings and data, where they are what the code is about."""
    with open(ROOT / name, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    tokens = [token for token in tokens if token.type in (tokenize.COMMENT, tokenize.NAME)]
    wrong = [
        f"{name}:{token.start[0]}: {token.string}" for token in tokens if not token.string.isascii()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_model_is_plain():
    """It names no device and no compiler, and whatever is faster is put in from outside, behind one
    door."""
    texts = [(ROOT / "model" / name).read_text(encoding="utf-8") for name in ("lm.py", "moe.py")]
    for text in texts:
        assert not re.search("cpu|cuda|compil|triton|ctypes", text, re.IGNORECASE)
    assert len(texts[0].splitlines()) <= 350
    assert not [
        name for name in FILES if name.startswith("model/") and name.endswith((".cpp", ".h", ".cu"))
    ]
    doors = {
        name
        for name in PYTHON
        if name.startswith(
            ("runtime/", "trainer/", "dataset/", "scripts/", "eval_model.py", "main.py")
        )
        for _, module in imported_modules(parse(name), name)
        if module.split(".")[0] == "kernels"
    }
    assert doors == {"runtime/kernel_loader.py"}


# --------------------------------------------------------------------------------------------------
# How much there is to read
# --------------------------------------------------------------------------------------------------

FOLDERS = ("model/", "dataset/", "runtime/", "kernels/", "trainer/", "eval_model.py")
SCREEN = 60
# A stage's loop and its main, and its flags, which are a table.
LONGER = {"train_epoch": 120, "main": 120, "parse_args": 200}


def test_functions_fit_a_screen():
    found = []
    for name in PYTHON:
        if not name.startswith(FOLDERS):
            continue
        longer = LONGER if name.startswith(("trainer/", "eval_model.py")) else {}
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > longer.get(node.name, SCREEN):
                    found.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
    assert not found, "\n".join(found)


TINY = (
    "--dim=32 --n_layers=1 --n_heads=4 --n_kv_heads=2 --max_seq_len=64 --device=cpu"
    " --max_steps=2 --batch_size=2"
).split()
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
ANSWER = {"role": "assistant", "content": "hello to you"}
ANSWERED = {"conversations": [*CHAT["messages"], ANSWER]}
# Script -> (rows, flags, lines behind it that are allowed, those in kernels/ apart). Every flag that
# is not of size has its default.
BEHIND = {
    "trainer/train_full_sft.py": ([ANSWERED], [*TINY, "--from_weight=none"], 3775),
    "trainer/train_pretrain.py": ([{"text": "hello to you"}], TINY, 3520),
    "trainer/train_dpo.py": (
        [{"prompt": "hello", "chosen": "hello to you", "rejected": "no"}],
        [*TINY, "--from_weight=full_sft"],
        4475,
    ),
    "trainer/train_grpo.py": (
        [CHAT | {"answer": "4"}],
        [*TINY, "--from_weight=full_sft", "--max_new_tokens=4"],
        4600,
    ),
    "eval_model.py": (None, ["--prompt=hello", "--max_new_tokens=4"], 2200),
}


@pytest.mark.parametrize("script", BEHIND)
def test_lines_behind_a_script(script, start_weights, tmp_path):
    """What a reader of a stage has to read: every file of ours that a run on one process loads."""
    rows, flags, allowed = BEHIND[script]
    is_first = "--from_weight=none" in flags or "pretrain" in script  # needs no weights
    words = [*flags, f"--out_dir={tmp_path / 'out' if is_first else start_weights}"]
    if rows:
        data = write_jsonl(tmp_path / "data.jsonl", rows * 8)
        words.append(f"--data_path={data}")
        if "grpo" not in script:
            words.append(f"--cache_dir={tmp_path / 'cache'}")
    table = tmp_path / "files.json"
    run_ranks("tests/count_lines.py", table, script, *words)
    files = json.loads(table.read_text())
    behind = sum(lines for name, lines in files.items() if not name.startswith("kernels/"))
    print(*(f"{lines:6d} {name}" for name, lines in files.items()), sep="\n")
    print(f"{behind:6d} lines behind {script}, {sum(files.values()) - behind} in kernels/")
    assert script in files and "model/lm.py" in files
    assert behind <= allowed, f"{behind} lines behind {script}, not {allowed}"
