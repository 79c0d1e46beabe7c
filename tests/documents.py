"""The documents, their blocks and commands, and how the tests run those."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, run_ranks, run_script
from serving import Server

ENGLISH = [
    "README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/en/**/*.md")),
]
BOTH = [*ENGLISH, *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/zh/**/*.md"))]
BOTH.insert(1, "README_zh.md")
PAGES = [*BOTH, "CONTRIBUTING.md", "SECURITY.md", "out/README.md", "dataset/demo/README.md"]

# Put behind the training commands: later flags win, so the command is the document's but the model
# is tiny.
TINY = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 256 --max_steps 2 --device cpu".split()
TRAINING = r"trainer/(engines/)?train_(?!tokenizer)|run_distributed|main|prepare_data"
# Likewise for the benchmark that is shown: two of its runs, of two steps.
SHORT = ["--steps", "2", "--only", "one process, 1 x 8", "--image", ""]
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "accelerate", "deepspeed", "bash", "sbatch")
PROGRAMS += ("scripts/test.sh",)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def translation(page: str) -> str:
    """The Chinese page of an English one."""
    return "README_zh.md" if page == "README.md" else page.replace("docs/en/", "docs/zh/")


def blocks(page: str, kind: str) -> list[str]:
    """The contents of all code blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of all bash blocks."""
    lines = "".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def first_shown() -> dict[str, list[str]]:
    """The commands of each English page that no page before it has."""
    seen, pages = set(), {}
    for page in ENGLISH:
        new = [line for line in dict.fromkeys(commands(page)) if line not in seen]
        seen.update(new)
        if new:
            pages[page] = new
    return pages


TO_RUN = first_shown()


def make_clone(place: Path) -> Path:
    """The project as a clone has it, with the tests' environment as its .venv and small weights."""
    if sys.prefix == sys.base_prefix:
        pytest.skip(
            "the tests do not run in a virtual environment, which scripts/quickstart.sh needs"
        )
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    # The demo's data once instead of thirteen times: writing and encoding it is half of the time.
    quickstart = place / "scripts/quickstart.sh"
    text = quickstart.read_text(encoding="utf-8")
    assert "--scale 13" in text
    quickstart.write_text(text.replace("--scale 13", "--scale 1"), encoding="utf-8")
    for stage in ("pretrain", "full_sft"):
        run_ranks(place / f"trainer/train_{stage}.py", *TINY, cwd=place)
    # Stands in for the public model of docs/en/finetune.md.
    run_ranks(place / "scripts/convert.py", "to-hf", "full_sft", "out/smollm2", cwd=place)
    return place


def run_shell(line: str, clone: Path, cwd: Path) -> None:
    """Run a command as it is written, with `python` and its neighbours being those of .venv."""
    environment = {
        **os.environ,
        "PATH": f"{clone / '.venv/bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        line,
        shell=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout, (
        f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )


def run_command(line: str, clone: Path) -> None:
    """Run a command of the documents; where only its result counts, in forks of a loaded Python."""
    program, *arguments = shlex.split(line)
    at = next(n for n, word in enumerate(arguments) if word.endswith((".py", ".sh")))
    script, flags = arguments[at], arguments[at + 1 :]
    if script.endswith(".sh") or re.match(TRAINING, script.removeprefix("scripts/")):
        flags += TINY
    if script == "benchmarks/one_curve.py":
        flags += SHORT
    # The file says `resume: auto`, but these are other runs.
    if ".yaml" in line and "prepare_data" not in script and program != "accelerate":
        flags += ["--resume", "none"]
    assert program in PROGRAMS, line
    if program == "bash":  # from another folder than the project's, which must not matter
        run_shell(shlex.join([program, str(clone / script), *flags]), clone, Path("/"))
    elif program == "accelerate":
        run_shell(shlex.join([program, *arguments[:at], script, *flags]), clone, clone)
    elif script == "scripts/serve.py":  # until it is told to end
        server = Server(clone / "out", *flags, script=clone / script)
        code = server.terminate()
        server.close()
        assert code == 0, line
    elif line.endswith("eval_model.py"):
        done = run_script(clone / script, cwd=clone, stdin="hello\n/exit\n")
        assert done.returncode == 0 and done.stdout, f"{line}\n{done.stdout}\n{done.stderr}"
    else:
        ranks = None
        if program == "torchrun":
            ranks = int(arguments[arguments.index("--nproc_per_node") + 1])
        assert run_ranks(clone / script, *flags, nproc=ranks, cwd=clone), line


def run_page(page: str, clone: Path) -> set[str]:
    """Run the commands that a page shows first; returns what there is in out/ then."""
    for line in TO_RUN[page]:
        run_command(line, clone)
    return {path.name for path in (clone / "out").iterdir()}
