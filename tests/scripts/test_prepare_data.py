"""scripts/prepare_data.py: the cache that it builds is the one that training finds."""

import re

import pytest
from conftest import chat, write_jsonl
from running import launched_as

from scripts import prepare_data

SCRIPT, SFT, PRETRAIN = (
    "scripts/prepare_data.py",
    "trainer/train_full_sft.py",
    "trainer/train_pretrain.py",
)


def contents(cache) -> dict:
    """Every file of the cache folder with the time of its last change."""
    return {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.rglob("*")}


@pytest.mark.parametrize("stage, script", [("sft", SFT), ("pretrain", PRETRAIN)])
def test_training_finds_the_cache(stage, script, run_script, tmp_path, tiny_flags):
    rows = (
        [chat("a b", "c d"), chat("e", "f g h")]
        if stage == "sft"
        else [{"text": "a b c"}, {"text": "d e f"}]
    )
    data, cache = write_jsonl(tmp_path / "data.jsonl", [*rows, "spoiled"]), tmp_path / "cache"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"training:\n  data_path: {data}\n  max_length: 64\n  skip_bad: true\ncache_dir: {cache}\n"
    )

    built = run_script(SCRIPT, "--stage", stage, "--config", config, *tiny_flags)
    assert built.returncode == 0, built.stderr
    counts, place = built.stdout.splitlines()
    assert "2 rows" in counts and "1 bad rows skipped" in counts
    folder = next(path for path in cache.iterdir() if path.is_dir())
    assert place.startswith("built in ") and f"{folder}, " in place and place.endswith(" MB")
    again = run_script(SCRIPT, "--stage", stage, "--config", config)
    assert again.stdout.splitlines()[1].startswith("found in ")

    before = contents(cache)
    flags = (
        "--data_path",
        data,
        "--max_seq_len",
        64,
        "--skip_bad",
        "--cache_dir",
        cache,
        "--max_steps",
        1,
    )
    run = run_script(script, *flags, *tiny_flags, "--out_dir", tmp_path, "--from_weight", "none")
    assert run.returncode == 0, run.stderr
    assert contents(cache) == before, "training wrote a cache of its own"


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize("per_node", [0, 1])
def test_one_process_builds(launcher, per_node, run_script, tmp_path):
    flags = (
        "--data_path",
        write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")]),
        "--cache_dir",
        tmp_path / "cache",
    )
    environment, names = launched_as(3, 4), ("RANK", "LOCAL_RANK")
    if launcher == "srun":
        environment, names = (
            {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"},
            ("SLURM_PROCID", "SLURM_LOCALID"),
        )
    first = names[per_node]
    idle = run_script(SCRIPT, *flags, "--per_node", per_node, env=environment)
    assert (idle.returncode, idle.stdout) == (0, "") and not (tmp_path / "cache").exists()
    builder = run_script(SCRIPT, *flags, "--per_node", per_node, env=environment | {first: "0"})
    assert builder.returncode == 0 and "built in" in builder.stdout


def test_a_rank_that_a_scheduler_left_behind_builds(run_script, tmp_path):
    flags = (
        "--data_path",
        write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")]),
        "--cache_dir",
        tmp_path / "cache",
    )
    done = run_script(SCRIPT, *flags, "--per_node", 1, env={"RANK": "1", "LOCAL_RANK": "1"})
    assert done.returncode == 0 and "built in" in done.stdout


MISTAKES = [
    (("--stage", "pretrain"), "data.jsonl:1: a pretraining row needs a string under"),
    (("--stage", "tokenizer"), "invalid choice: 'tokenizer'"),
    (("--max_seqlen", "4"), "unrecognized arguments: --max_seqlen 4"),
    (("--max_seq_len", "0"), "--max_seq_len 0: must be positive"),
    (("--config", "nowhere.yaml"), "--config nowhere.yaml: No such file"),
]


@pytest.mark.parametrize("extra, message", MISTAKES)
def test_mistakes_are_named(extra, message, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")])
    flags = ["--data_path", str(data), "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", ["prepare_data.py", *flags, *extra])
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_data.main()


def test_a_bad_row_ends_in_one_line(run_script, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), {"question": "c"}])
    result = run_script(SCRIPT, "--data_path", data, "--cache_dir", tmp_path / "cache")
    assert result.returncode == 2 and result.stderr.startswith(f"error: {data}:2: ")
    assert result.stderr.count("\n") == 1
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())
