"""Without what only Unix has, every script starts, a run trains and resumes, and its model chats."""

import ast
import json

import pytest
from conftest import RUN_FLAGS, chat, write_jsonl
from running import ROOT, STAGE_SCRIPTS, run_script

SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "scripts/*.py", "trainer/**/train_*.py")
    for path in sorted(ROOT.glob(pattern))
    if "__main__" in path.read_text(encoding="utf-8")
]
OURS = ("model", "dataset", "runtime", "kernels", "trainer", "scripts", "eval_model.py", "main.py")


def elsewhere(*args, **options):
    return run_script("tests/without_unix.py", *args, **options)


def test_the_names_are_hidden(tmp_path):
    script = tmp_path / "probe.py"
    script.write_text("import os, signal; print(hasattr(os, 'fork'), hasattr(signal, 'SIGHUP'))")
    assert elsewhere(script).stdout == "True True\n"  # no code of ours
    script = "tests/probe_platform.py"
    assert elsewhere(script).stdout.split() == ["ImportError"] + ["False"] * 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    done = elsewhere(ROOT / script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_a_run_and_a_chat(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [chat(f"question {n}", f"yes {n}") for n in range(12)])
    words = [*RUN_FLAGS, f"--data_path={data}", f"--out_dir={tmp_path}", "--from_weight=none"]
    words += [f"--cache_dir={tmp_path / 'cache'}", "--batch_size=2", "--packing=0"]
    words += ["--num_workers=1", "--eval_ratio=0.2", "--save_interval=2"]
    script = STAGE_SCRIPTS["train_full_sft"]
    first = elsewhere(script, *words, "--max_steps=2")
    assert first.returncode == 0, first.stderr
    again = elsewhere(script, *words, "--max_steps=4", "--resume=auto", "--resume_with_changes")
    assert again.returncode == 0, again.stderr
    lines = map(json.loads, (tmp_path / "full_sft_32/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]

    weights = tmp_path / "full_sft_32.pth"
    flags = [f"--weight={weights}", "--device=cpu", "--max_new_tokens=4"]
    said = elsewhere("eval_model.py", *flags, stdin="hello\nagain\n")
    assert said.returncode == 0 and said.stdout.count("bot> ") == 2, said.stderr


def test_every_import_of_a_unix_module_is_guarded():
    """Also where no test comes by: in a `try`, a `with suppress`, or not at all."""
    names = set("fcntl grp posix pty pwd readline resource syslog termios tty".split())
    found = []
    for folder in OURS:
        path = ROOT / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            guarded = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.Try | ast.With)
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) else []
                if names & {str(m).split(".")[0] for m in modules} and id(node) not in guarded:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found
