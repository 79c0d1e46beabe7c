"""The documents are true: their commands run, their links lead somewhere, both languages agree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from running import ROOT, run_ranks

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
# Flags of torchrun, Slurm, g++ and others that the documents name.
FOREIGN = {"--shutdown-timeout", "--signal", "--no_ssh", "--hostfile", "--num_gpus", "--nodes"}
FOREIGN |= {"--config_file", "--num_processes", "--nproc_per_node", "--master_port"}


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


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project as a clone has it, with the tests' environment as its .venv and small weights."""
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
    for stage in ("pretrain", "full_sft"):
        run_ranks(place / f"trainer/train_{stage}.py", *TINY, cwd=place)
    return place


def run_shell(line: str, clone: Path, cwd: Path, stdin: str = "") -> None:
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
        input=stdin,
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
    elif program == "accelerate" or line.endswith("eval_model.py"):
        words = [program, *arguments[:at], script, *flags]
        run_shell(shlex.join(words), clone, clone, stdin="hello\n/exit\n")
    else:
        ranks = None
        if program == "torchrun":
            ranks = int(arguments[arguments.index("--nproc_per_node") + 1])
        assert run_ranks(clone / script, *flags, nproc=ranks, cwd=clone), line


@pytest.mark.parametrize("page", TO_RUN)
def test_every_command_runs(page, clone):
    for line in TO_RUN[page]:
        run_command(line, clone)
    written = {path.name for path in (clone / "out").iterdir()}
    assert {"pretrain_32.pth", "full_sft_32.pth", "cache"} <= written
    if page == "README.md":
        assert "full_sft_32.previous" in written
    if page.endswith("tokenizer.md"):
        assert "my_tokenizer" in written


def mentioned_commands(page: str) -> list[str]:
    """Commands that are not in bash blocks: within sentences and tables, and in text blocks."""
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    shown = "".join(blocks(page, "text")).splitlines()
    if page not in BOTH:  # the commands of these are for people alone
        shown += [line.partition(" #")[0].rstrip() for line in commands(page)]
    return [
        line
        for line in [*inline, *shown]
        if line.split(" ")[0] in PROGRAMS and re.search(r"\.(py|sh|sbatch)\b", line)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_mentioned_commands_name_scripts_and_flags_that_exist(page):
    for line in mentioned_commands(page):
        words = shlex.split(line)
        at = next(n for n, word in enumerate(words) if word.endswith((".py", ".sh", ".sbatch")))
        assert (ROOT / words[at]).is_file(), f"{page}: {line}"
        if words[0] == "scripts/test.sh":
            tests = [word for word in words[1:] if not word.startswith("-")]
            assert all((ROOT / test).exists() for test in tests), f"{page}: {line}"
            continue
        text = read(words[at])
        # These hand on what they do not know: to a stage, or to the stage that they measure.
        if re.search("run_distributed|main.py|prepare_data|plan|benchmarks/", words[at]):
            text += read("trainer/train_full_sft.py") + read("benchmarks/demo_model.py")
            text += "".join(p.read_text() for p in (ROOT / "benchmarks/speed").glob("*.py"))
            text += "".join(p.read_text() for p in (ROOT / "runtime").glob("*.py"))
        for flag in (word.split("=")[0] for word in words[at + 1 :] if word.startswith("--")):
            assert f'"{flag}"' in text, f"{page}: {line}: no {flag} in {words[at]}"


def test_flags_that_are_named_exist():
    folders = ("trainer", "scripts", "benchmarks", "runtime", "dataset")
    sources = [ROOT / "eval_model.py", ROOT / "main.py"]
    sources += [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = set(re.findall(r"--[a-z]\w+", "".join(p.read_text("utf-8") for p in sources)))
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            flags = {word for word in re.findall(r"(?<!\S)--[a-z][\w-]+", code)}
            unknown = flags - known - FOREIGN
            assert not unknown or " " in code and code.split()[0] in PROGRAMS, f"{page}: {unknown}"


# --------------------------------------------------------------------------------------------------
# Links, paths and code
# --------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f"{page}: {target}"
        if anchor:
            name = file.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page):
    rooms = "model|kernels|dataset|trainer|runtime|scripts|configs|benchmarks|tests|docs"
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for name in re.findall(rf"(?:^|\s)((?:{rooms})/[\w./*-]*)", code):
            if re.search("NAME|__pycache__", name):
                continue
            assert list(ROOT.glob(name.rstrip("/"))), f"{page}: `{name}`"


@pytest.mark.parametrize("page", [page for page in BOTH if page.endswith("walk.md")])
def test_excerpts_of_the_walk_are_in_the_code(page):
    """A block begins with the file that it is from; `...` stands for lines left out."""
    excerpts = blocks(page, "python")
    assert len(excerpts) >= 5
    for excerpt in excerpts:
        head, *lines = excerpt.splitlines()
        name = head.removeprefix("# ")
        code = {line.strip() for line in read(name).splitlines()}
        for line in lines:
            assert not line.strip() or line.strip() == "..." or line.strip() in code, (
                f"{page}: {name} has no line: {line.strip()}"
            )


def test_the_change_that_the_walk_suggests_trains(clone):
    """A diff: the file, then the lines to take away and those to put there."""
    (change,) = blocks("docs/en/walk.md", "diff")
    name = change.splitlines()[0].removeprefix("  # ")
    old, new = (
        "".join(f"{line[2:]}\n" for line in change.splitlines()[1:] if line[0] in (" ", sign))
        for sign in "-+"
    )
    file, text = clone / name, read(name)
    assert text.count(old) == 1, f"{name} does not have these lines:\n{old}"
    plain, smoothed = (
        run_ranks(file, *TINY, "--from_weight", "none", cwd=clone)
        for content in (text, text.replace(old, new))
        if file.write_text(content, encoding="utf-8")
    )
    file.write_text(text, encoding="utf-8")
    losses = [re.findall(r"loss (\S+) lr", printed) for printed in (plain, smoothed)]
    assert len(losses[0]) == len(losses[1]) == 2 and losses[0] != losses[1]


# --------------------------------------------------------------------------------------------------
# Two languages
# --------------------------------------------------------------------------------------------------


def numbers(text: str) -> Counter:
    """All figures of a text, without those that are part of a word."""
    return Counter(
        re.findall(r"(?<![A-Za-z_\d.])\d[\d,.]*(?:e-?\d+)?", re.sub(r"[,.](?!\d)", " ", text))
    )


def test_both_languages_have_the_same_pages():
    assert {translation(page) for page in ENGLISH} | set(ENGLISH) == set(BOTH)
    assert len(ENGLISH) >= 18 and sum(map(len, TO_RUN.values())) >= 25


@pytest.mark.parametrize("page", ENGLISH)
def test_both_languages_say_the_same(page):
    other = translation(page)
    assert commands(page) == commands(other)
    for kind in ("text", "math", "python", "diff"):
        assert blocks(page, kind) == blocks(other, kind), kind
    levels = [re.findall(r"^#+(?= )", prose(name), re.MULTILINE) for name in (page, other)]
    assert levels[0] == levels[1], "headings"
    rows = [re.findall(r"^\|.*\|$", prose(name), re.MULTILINE) for name in (page, other)]
    assert len(rows[0]) == len(rows[1]), "rows of tables"
    for row, same in zip(*rows, strict=True):
        assert numbers(row) == numbers(same), f"{row}\n{same}"


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_front_page_is_short(page):
    assert len(read(page).splitlines()) <= 200
