"""The documents are true: links lead somewhere, names exist, both languages agree; README's commands run."""

import re
import shlex
from collections import Counter

import pytest
from documents import (
    BOTH,
    ENGLISH,
    PAGES,
    PROGRAMS,
    TO_RUN,
    blocks,
    commands,
    make_clone,
    prose,
    read,
    run_page,
    translation,
)
from running import ROOT

# Flags of torchrun, Slurm, g++ and others that the documents name.
FOREIGN = {"--shutdown-timeout", "--signal", "--no_ssh", "--hostfile", "--num_gpus", "--nodes"}
FOREIGN |= {"--check", "--config_file", "--num_processes", "--nproc_per_node", "--master_port"}


def test_every_command_of_the_readme_runs(tmp_path):
    written = run_page("README.md", make_clone(tmp_path / "project"))
    assert {"pretrain_32.pth", "full_sft_32.pth", "full_sft_32.previous", "cache"} <= written


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


@pytest.mark.parametrize("page", [page for page in BOTH if "/stages/" in page])
def test_metrics_that_are_explained_exist(page):
    folders = ("trainer", "runtime", "model")
    sources = "".join(p.read_text("utf-8") for f in folders for p in (ROOT / f).rglob("*.py"))
    for table in re.findall(
        r"^\| [^|]*`metrics.jsonl`.*\n((?:\|.*\n)+)", prose(page), re.MULTILINE
    ):
        for row in table.splitlines()[1:]:
            for name in re.findall(r"`(\w+)`", row.split("|")[1]):
                found = f'"{name}"' in sources or f'"{name.removeprefix("eval_")}"' in sources
                assert found, f"{page}: no metric {name}"


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


@pytest.mark.parametrize("page", BOTH)
def test_excerpts_and_functions_are_in_the_code(page):
    """An excerpt begins with the file that it is from; `...` stands for lines left out."""
    excerpts = blocks(page, "python")
    assert len(excerpts) >= 10 or not page.endswith("walk.md")
    for excerpt in excerpts:
        head, *lines = excerpt.splitlines()
        name = head.removeprefix("# ")
        code = {line.strip() for line in [*read(name).splitlines(), "...", ""]}
        for line in lines:
            assert line.strip() in code, f"{page}: {name} has no line: {line.strip()}"
    english = re.findall(r"In the code: (`[^.]*`)\sin\s`([\w/]+\.py)`", prose(page))
    chinese = re.findall(r"\u4ee3\u7801\u89c1 `([\w/]+\.py)` \u7684 (`[^\u3002]*`)", prose(page))
    for names, file in english + [(names, file) for file, names in chinese]:
        defined = set(re.findall(r"^(?:def|class) (\w+)", read(file), re.MULTILINE))
        assert set(re.findall(r"`(\w+)`", names)) <= defined, f"{page}: {names} in {file}"
    assert (english or chinese) or "/stages/" not in page or page.endswith("tokenizer.md")


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
