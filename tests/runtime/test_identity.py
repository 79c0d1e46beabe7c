"""What makes a run this run: every flag but the harmless ones, and the content of the files that
flags name."""

import argparse
import importlib
import re
import sys

import pytest
import torch
from running import ROOT, STAGE_SCRIPTS, module_of

from runtime.saving.identity import identity_of
from runtime.saving.identity_changes import FIXED, HARMLESS, changes_between, check_identity

STAGES = sorted(STAGE_SCRIPTS)
READ_BY = (
    "data_path",
    "tokenizer_dir",
    "skip_bad",
    "loss_on",
    "max_seq_len",
    "max_new_tokens",
    "curriculum",
)


@pytest.fixture
def flags_of(monkeypatch, tmp_path):
    """flags_of(stage) -> (its flags, their parser)."""
    (tmp_path / "tokenizer.json").write_text("{}")

    def parse(stage: str) -> tuple[dict, argparse.ArgumentParser]:
        parsers, original = [], argparse.ArgumentParser.parse_args
        with monkeypatch.context() as patch:
            remember = lambda self, *words: parsers.append(self) or original(self, *words)  # noqa: E731
            patch.setattr(argparse.ArgumentParser, "parse_args", remember)
            patch.setattr(sys, "argv", [f"{stage}.py", "--device=cpu"])
            flags = vars(importlib.import_module(module_of(stage)).parse_args())
        flags["tokenizer_dir"] = str(ROOT / "model/minimind_tokenizer")  # as open_start sets it
        return flags, parsers[-1]

    return parse


def identity(flags: dict) -> dict:
    """As main() of a stage has it, with what it computes from the flags."""
    derived = {"peak_lr": flags["learning_rate"], "device": torch.device(flags["device"])}
    derived["total_steps"] = 10 * flags["epochs"] + flags["max_steps"]
    rows = str([flags.get(name) for name in READ_BY])
    return identity_of({**flags, **derived}, flags["global_batch_size"] or 8, rows)


def another(value: object, action: argparse.Action, folder) -> object:
    """Another value of a flag."""
    if action.dest == "data_path":
        return str(folder / "tokenizer.json")
    if action.dest == "tokenizer_dir":
        return str(folder)
    if action.nargs == 0:
        return not value
    if action.choices and action.nargs is None:
        return next(
            choice for choice in action.choices if choice not in (value, "float32")
        )  # a CPU's by default
    word = 3 if value is None and action.type else value
    return (
        word + 1 if isinstance(word, int | float) else ["other"] if action.nargs == "+" else "other"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_harmless_or_refused(flags_of, tmp_path, stage):
    """A new flag stands among the harmless ones, or belongs to what makes a run this run: it cannot
    be forgotten."""
    flags, parser = flags_of(stage)
    before = identity(flags)
    actions = [action for action in parser._actions if action.dest != "help"]
    assert flags.keys() - {action.dest for action in actions} <= {"deepspeed"}
    for action in actions:
        name = action.dest
        if name == "device":  # says with --dtype in which precision
            continue
        now = identity({**flags, name: another(flags[name], action, tmp_path)})
        if name in HARMLESS:
            assert changes_between(before, now) == {}, name
        else:
            with pytest.raises(
                ValueError, match=rf"^--resume x: this is another run: [^;]*--{name} was "
            ) as error:
                check_identity(before, now, "x")
            assert str(error.value).count(" was ") == 2, (
                error.value
            )  # of the flag, and "the flags it was started with"


def test_several_changes_are_named_in_one_line():
    before = {"--learning_rate": 5e-4, "--beta": 0.1, "--seed": 1}
    text = (
        "^--resume x: this is another run: --beta was 0.1 and is 0.2; --learning_rate was 0.0005"
        " and is 0.001. "
    )
    with pytest.raises(ValueError, match=text):
        check_identity(before, {**before, "--learning_rate": 1e-3, "--beta": 0.2}, "x")


def test_what_is_accepted_and_what_cannot_be():
    before = {"--learning_rate": 5e-4, "--dim": 32}
    after = {"--learning_rate": 1e-3, "--dim": 32}
    assert check_identity(before, after, "x", accept=True) == {"--learning_rate": [5e-4, 1e-3]}
    with pytest.raises(ValueError, match="--resume_with_changes cannot change --dim"):
        check_identity(before, {**after, "--dim": 64}, "x", accept=True)
    with pytest.raises(ValueError, match="--resume_with_changes cannot change --weight_decay"):
        own = {"the engine": "Lightning, ddp"}
        check_identity(
            {"--weight_decay": 0.1} | own, {"--weight_decay": 0.2} | own, "x", accept=True
        )


def test_no_flag_is_both():
    assert not {name.removeprefix("--") for name in FIXED} & HARMLESS


def test_what_is_not_recorded_is_not_refused():
    """A checkpoint of before has SAME_RUN's flags alone, and LoRA's under other names."""
    old = {
        "--dim": 32,
        "--global_batch_size": 8,
        "the data of --data_path": "key",
        "LoRA's rank": 4,
    }
    now = old | {
        "--learning_rate": 1e-3,
        "--beta": 0.2,
        "the content of --data_path": "1",
        "--lora_rank": 4,
    }
    del now["LoRA's rank"]
    assert changes_between(old, now) == {}
    assert changes_between(old, {**now, "--lora_rank": 8, "--dim": 64}) == {
        "--dim": [32, 64],
        "--lora_rank": [4, 8],
    }
    assert changes_between(old, {**now, "the data of --data_path": "2"}) == {
        "the data of --data_path": ["key", "2"]
    }
    assert changes_between(old, {**now, "the engine": "DeepSpeed"}) == {
        "the engine": [None, "DeepSpeed"]
    }


def test_the_length_of_a_run_is_its_last_step():
    before = {"--epochs": 2, "--max_steps": 8, "the last step": 8}
    assert changes_between(before, {**before, "--epochs": 9}) == {}
    longer = {**before, "--max_steps": 9, "the last step": 9}
    assert changes_between(before, longer) == {"--max_steps": [8, 9]}
    assert changes_between({"the last step": 8}, longer) == {"the last step": [8, 9]}
    bigger = {**before, "--global_batch_size": 4, "the last step": 4}
    assert changes_between({**before, "--global_batch_size": 2}, bigger) == {
        "--global_batch_size": [2, 4]
    }


def test_files_count_by_their_content(tmp_path):
    """Wherever they lie; what differs is named as the flag says it."""

    def of(path: str, text: str, rows: str, **more) -> dict:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        return identity_of({"data_path": str(tmp_path / path), **more}, 8, rows)

    before = of("a.jsonl", "1", "rows 1")
    assert changes_between(before, of("moved/b.jsonl", "1", "rows 1")) == {}
    assert changes_between(before, of("c.jsonl", "2", "rows 2")) == {
        "the content of --data_path": [str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")]
    }
    (name, hashes), *rest = changes_between(before, of("a.jsonl", "3", "rows 3")).items()
    assert name == "the content of --data_path" and all(
        re.fullmatch("[0-9a-f]{16}", value) for value in hashes
    )
    assert not rest
    before, after = (
        of("d.jsonl", "1", "all", loss_on="all"),
        of("d.jsonl", "1", "last", loss_on="last"),
    )
    assert changes_between(before, after) == {"--loss_on": ["all", "last"]}


def test_weights_count_by_name_where_nothing_else_is_known():
    def of(name, **more) -> dict:
        return identity_of({"from_weight": name}, 8, "rows") | more

    assert changes_between(of("pretrain"), of("/somewhere/pretrain_512_moe.pth")) == {}
    assert changes_between(of("pretrain"), of("other")) == {"--from_weight": ["pretrain", "other"]}
    weights = "the weights of --from_weight"
    assert changes_between(of("pretrain", **{weights: "a"}), of("other", **{weights: "a"})) == {}
    assert changes_between(of("pretrain", **{weights: "a"}), of("other", **{weights: "b"})) == {
        weights: ["pretrain", "other"]
    }
    assert changes_between(of("x", **{weights: "a"}), of("x", **{weights: "b"})) == {
        weights: ["a", "b"]
    }


def test_a_reward_counts_by_its_words_and_its_file(tmp_path):
    def of(*words: str) -> dict:
        return identity_of({"reward": [*words]}, 8, "rows")

    file = tmp_path / "reward.py"
    file.write_text("1")
    before = of(f"{file}:letters:0.5", "format")
    assert before["--reward"] == ["reward.py:letters:0.5", "format"]
    file.write_text("2")
    assert [*changes_between(before, of(f"{file}:letters:0.5", "format"))] == [
        "the content of --reward reward.py"
    ]
