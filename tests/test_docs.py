"""The pages in docs/ are true: every command in them runs, word for word, in a fresh copy of the project."""

import re

import pytest
from documents import TINY, TO_RUN, blocks, make_clone, read, run_page
from running import run_ranks


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone") / "project")


@pytest.mark.parametrize("page", [page for page in TO_RUN if page != "README.md"])
def test_every_command_runs(page, clone):
    written = run_page(page, clone)
    assert {"pretrain_32.pth", "full_sft_32.pth", "cache"} <= written
    assert "my_tokenizer" in written or not page.endswith("tokenizer.md")


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
