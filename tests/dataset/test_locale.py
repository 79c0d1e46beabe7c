"""No printed text ends a run, in any locale: what an encoding lacks is escaped."""

import ast
import io
import sys

import pytest
from conftest import RUN_FLAGS, write_jsonl
from running import ROOT, run_script

from runtime.process.terminal import prepare_streams
from runtime.tracking import Tracker

# GBK has the Chinese and neither the emoji nor the n with a tilde, ASCII has none of them.
TEXT = "你好 \U0001f600 ñ"
SHOWN = {"gbk": "你好 \\U0001f600 \\xf1", "ascii": "\\u4f60\\u597d \\U0001f600 \\xf1"}
SCRIPTS = sorted(
    p for pattern in ("*.py", "trainer/*.py", "scripts/*.py") for p in ROOT.glob(pattern)
)


def entry_point(path) -> ast.If | None:
    """The `if __name__ == "__main__":` of a script."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(
        (
            node
            for node in tree.body
            if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        ),
        None,
    )


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if entry_point(path)], ids=lambda path: path.name
)
def test_every_script_starts_where_no_text_can_end_it(path):
    first = ast.unparse(entry_point(path).body[0])
    assert first in ("launch.run(main)", "exits.run(main)"), f"{path.name} starts with {first}"


@pytest.mark.parametrize("encoding", SHOWN)
def test_what_an_encoding_does_not_have_is_escaped(encoding, monkeypatch):
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "stdin", None)  # closed: `<&-`
    prepare_streams()
    for stream in streams.values():
        print(TEXT, "\udce9", file=stream, flush=True)
        assert stream.buffer.getvalue().decode(encoding) == f"{SHOWN[encoding]} \\udce9\n"


def test_what_cannot_be_decoded_is_read_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    prepare_streams()
    assert sys.stdin.readline() == "caf\ufffd\n"


def test_streams_that_are_something_else_stay(monkeypatch):
    """A notebook's, or a test's."""
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    prepare_streams()
    assert sys.stdout is mine


def test_the_log_of_a_run_takes_every_text(tmp_path):
    # A file name that is not UTF-8.
    args = {
        "report_to": [],
        "use_wandb": False,
        "data_path": "caf\udce9",
    }  # a file name that is not UTF-8
    tracker = Tracker(tmp_path / "run", args, enabled=True, resumed_from=None)
    tracker.log_file.write("")
    tracker.print(f"{TEXT} caf\udce9")
    tracker.log_file.close()
    assert f"{TEXT} caf\\udce9\n" in (tmp_path / "run" / "training.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", SHOWN)
def test_a_run_whose_samples_cannot_be_encoded_goes_on(encoding, tmp_path):
    """GRPO prints prompts and completions behind its first step."""
    rows = [
        {"messages": [{"role": "user", "content": f"{TEXT} {n}"}], "answer": "x"} for n in range(4)
    ]
    flags = [
        *RUN_FLAGS,
        f"--data_path={write_jsonl(tmp_path / f'{TEXT}.jsonl', rows)}",
        f"--out_dir={tmp_path}",
    ]
    flags += (
        "--from_weight=none --max_steps=2 --max_new_tokens=8 --batch_size=2 --group_size=2".split()
    )
    done = run_script("trainer/train_grpo.py", *flags, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert f"{TEXT} " in (tmp_path / "grpo_32" / "training.log").read_text(encoding="utf-8")


def test_ranks_go_on_and_the_pairs_of_a_preview_are_shown(tmp_path):
    """DPO under torchrun."""
    rows = [{"prompt": f"{TEXT} {n}", "chosen": TEXT, "rejected": "no"} for n in range(4)]
    flags = [
        *RUN_FLAGS,
        f"--data_path={write_jsonl(tmp_path / 'pairs.jsonl', rows)}",
        f"--out_dir={tmp_path}",
    ]
    flags += ["--preview=1", f"--cache_dir={tmp_path / 'cache'}", "--ddp"]
    done = run_script("trainer/train_dpo.py", *flags, env={"PYTHONIOENCODING": "ascii"}, nproc=2)
    assert done.returncode == 0, done.stderr
    assert SHOWN["ascii"] in done.stdout


def test_a_script_without_torch(tmp_path):
    (tmp_path / f"{TEXT}.txt").write_text(f"{TEXT} moon\n" * 9, encoding="utf-8")
    words = ["trainer/train_tokenizer.py", f"--report={tmp_path / TEXT}.txt", "--hold_out=0"]
    done = run_script(*words, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and f"{SHOWN['ascii']}.txt" in done.stdout, done.stderr


def test_file_names_that_are_no_utf8(tmp_path):
    """They are printed, written to the log, hashed, and the name of a reward names a curve."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}], "answer": "x"} for n in range(4)
    ]
    data, reward = write_jsonl(tmp_path / "caf\udce9.jsonl", rows), tmp_path / "caf\udce9.py"
    reward.write_text("def one(prompts, completions, rows):\n    return [1.0] * len(rows)\n")
    flags = [
        *RUN_FLAGS,
        f"--data_path={data}",
        f"--out_dir={tmp_path / 'out'}",
        "--reward",
        f"{reward}:one",
        "exact",
    ]
    flags += (
        "--from_weight=none --max_steps=1 --max_new_tokens=4 --batch_size=1 --group_size=2".split()
    )
    done = run_script("trainer/train_grpo.py", *flags, "--report_to", "tensorboard")
    assert done.returncode == 0 and "caf\\udce9.jsonl" in done.stdout, done.stderr
