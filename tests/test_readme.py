"""The README is true: every command in it runs, word for word, in a fresh copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, run_ranks

# Put behind the training commands: later flags win, so the command is the README's but the model is
# tiny.
TINY = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 256 --max_steps 2 --device cpu".split()
TRAINING = r"trainer/train_(?!tokenizer)|run_distributed|main|prepare_data"


def commands(readme: str) -> list[str]:
    """The lines of all bash blocks."""
    blocks = re.findall(
        r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL
    )
    return [
        line for block in blocks for line in block.splitlines() if line and not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project as a clone has it, with the environment that runs the tests as its .venv."""
    if sys.prefix == sys.base_prefix:
        pytest.skip(
            "the tests do not run in a virtual environment, which scripts/quickstart.sh needs"
        )
    place = tmp_path_factory.mktemp("clone") / "project"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    return place


def test_both_languages_have_the_same_commands():
    assert commands("README.md") == commands("README_zh.md")
    assert len(commands("README.md")) >= 10


def test_every_command_runs(clone, run_script):
    for line in commands("README.md"):
        program, *arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        script = next(word for word in arguments if word.endswith((".py", ".sh")))
        flags = arguments[arguments.index(script) + 1 :]
        if script.endswith(".sh") or re.search(TRAINING, script):
            flags += TINY
        if (
            ".yaml" in line and "prepare_data" not in script
        ):  # the file says `resume: auto`, but these are other runs
            flags += ["--resume", "none"]
        if script.endswith(".sh"):
            command = [program, str(clone / script), *flags]
            done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            continue
        assert program in ("python", "torchrun", ".venv/bin/python")
        if script == "eval_model.py":
            done = run_script(
                clone / script, *flags, cwd=clone, stdin="hello\n/exit\n", timeout=180
            )
            assert done.returncode == 0 and done.stdout, (
                f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
            continue
        nproc = (
            int(arguments[arguments.index("--nproc_per_node") + 1])
            if program == "torchrun"
            else None
        )
        assert run_ranks(clone / script, *flags, nproc=nproc, cwd=clone), line
    written = {path.name for path in (clone / "out").iterdir()}
    assert {
        "pretrain_32.pth",
        "full_sft_32.pth",
        "full_sft_32.previous",
        "my_tokenizer",
        "cache",
    } <= written
