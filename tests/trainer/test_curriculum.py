"""--curriculum: every epoch goes from easy to hard, by length or by a number in the rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import RUN_FLAGS, chat, check_same_run, conversations, curve, write_jsonl
from running import run_script

from dataset.packing import plan_epoch
from dataset.preference_dataset import PreferenceDataset
from dataset.sft_encoder import SFTEncoder
from runtime.launch import check_flags
from runtime.saving.identity import identity_of
from runtime.saving.identity_changes import check_identity


def plan_of(difficulty, lengths=None, packing=0, seed=3, epoch=0, documents=None):
    lengths = np.full(len(difficulty), 10) if lengths is None else np.array(lengths)
    data = SimpleNamespace(lengths=lengths, supervised=lengths, difficulty=np.array(difficulty))
    documents = np.arange(len(lengths)) if documents is None else documents
    return plan_epoch(data, documents, seed, 100, packing, 4, 0, epoch)


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


def test_easy_before_hard_whatever_seed_and_epoch():
    difficulty = np.random.default_rng(0).permutation(50) / 7
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        plan = plan_of(difficulty, seed=seed, epoch=epoch)
        assert plan.order.tolist() == np.argsort(difficulty).tolist()


def test_equally_hard_rows_stay_shuffled():
    """By seed and epoch, in the order that they have without a curriculum."""
    difficulty, orders = np.arange(60) % 3, set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = plan_of(difficulty, seed=seed, epoch=epoch).order
        shuffled = np.random.default_rng([seed, epoch]).permutation(60)
        wanted = [doc for level in range(3) for doc in shuffled if difficulty[doc] == level]
        assert order.tolist() == wanted
        orders.add(tuple(order))
    assert len(orders) == 3


def test_packs_are_filled_in_that_order():
    lengths = np.random.default_rng(0).integers(1, 60, 80)
    packed, single = plan_of(lengths, lengths, packing=1), plan_of(lengths, lengths)
    assert packed.order.tolist() == single.order.tolist()
    rows = [lengths[packed.documents(row)] for row in range(packed.rows)]
    assert all(before.max() <= after.min() for before, after in zip(rows, rows[1:], strict=False))
    assert max(row.sum() for row in rows) <= 100


def test_only_the_documents_that_are_asked_for():
    documents = np.arange(1, 40, 3)
    assert plan_of(-np.arange(40), documents=documents).order.tolist() == documents[::-1].tolist()


# --------------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------------


def rated(*values) -> list[dict]:
    return [{**chat(f"q {n}", "a " * (n + 1)), "level": value} for n, value in enumerate(values)]


def test_length_needs_no_other_cache(sft):
    rows = rated(1, 2, 3)
    plain, ordered = sft(rows), sft(rows, curriculum="length")
    assert plain.difficulty is None and ordered.difficulty.tolist() == ordered.lengths.tolist()
    assert plain.key == ordered.key


def test_a_field_is_kept_in_the_cache(sft, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", rated(3, 0.5, -2, 1e12))
    plain, first = sft(path), sft(path, curriculum="field:level")
    assert first.difficulty.tolist() == [3, 0.5, -2, 1e12] and plain.difficulty is None
    with pytest.raises(
        ValueError,
        match="data.jsonl:1: --curriculum field:other needs a number there, found no such",
    ):
        sft(path, curriculum="field:other")
    with monkeypatch.context() as patch:
        patch.setattr(SFTEncoder, "encode", None)  # nothing is tokenised again
        again = sft(path, curriculum="field:level")
    assert (
        again.difficulty.tolist() == first.difficulty.tolist()
        and again.key == first.key != plain.key
    )
    (again.folder / "difficulty.npy").write_bytes(b"")
    assert sft(path, curriculum="field:level").difficulty.tolist() == first.difficulty.tolist()


def test_rows_that_are_dropped_or_skipped_leave_no_gap(sft):
    long = {**chat("q " * 600, "a"), "level": 9}
    dataset = sft(
        [rated(1)[0], long, "spoiled", *rated(5, "six", 7)], skip_bad=True, curriculum="field:level"
    )
    assert (
        dataset.difficulty.tolist() == [1, 5, 7]
        and dataset.stats["bad"] == 2
        and dataset.stats["dropped"] == 1
    )


def test_pieces_of_a_document_are_as_hard_as_it_is(pretrain):
    rows = [{"text": "a b c d e f g h i j", "level": 2}, {"text": "a", "level": 1}]
    dataset = pretrain(rows, max_length=4, curriculum="field:level")
    assert dataset.difficulty.tolist() == [2] * (len(dataset) - 1) + [1] and len(dataset) > 3


@pytest.mark.parametrize("curriculum", ["length", "field:level"])
def test_pairs(tokenizer, tmp_path, curriculum):
    rows = [{"prompt": "q", "chosen": "a " * n, "rejected": "b", "level": n} for n in (7, 3, 5)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    dataset = PreferenceDataset(data, tokenizer, 64, tmp_path / "cache", curriculum=curriculum)
    assert np.argsort(dataset.difficulty).tolist() == [1, 2, 0]
    assert curriculum == "length" or dataset.difficulty.tolist() == [7, 3, 5]


BAD = [
    ('"hard"', '"hard"'), ("true", "true"), ("null", "no such field"), ("NaN", "NaN"), ("-Infinity", "-Infinity"),
    ("[1]", "[1]"), ("1" + "0" * 400, "10000"),
]  # fmt: skip


@pytest.mark.parametrize("value, found", BAD)
def test_what_is_no_number_is_named(sft, tmp_path, value, found):
    good = '{"instruction": "q", "output": "a", "level": 1}'
    data = write_jsonl(tmp_path / "data.jsonl", [good, good.replace("1", value), good])
    with pytest.raises(ValueError) as error:
        sft(data, curriculum="field:level")
    wanted = f"{data}:2: --curriculum field:level needs a number there, found {found}"
    assert str(error.value).startswith(wanted) and len(str(error.value)) < len(wanted) + 60


def test_text_files_have_no_fields(pretrain, tmp_path):
    (tmp_path / "data.txt").write_text("a b\n")
    with pytest.raises(
        ValueError, match="data.txt:1: --curriculum field:level needs a number there, found no such"
    ):
        pretrain(tmp_path / "data.txt", curriculum="field:level")


@pytest.mark.parametrize("value", ["", "lengths", "field", "field:", "difficulty"])
def test_other_values_are_refused(value):
    with pytest.raises(
        ValueError, match=f"--curriculum {value}: must be none, length or field:NAME"
    ):
        check_flags({"device": "cpu", "curriculum": value})


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    rows = [{**row, "level": n * 7 % 10} for n, row in enumerate(conversations(60))]
    data = write_jsonl(folder / "rated.jsonl", rows)
    fixed = (
        "--curriculum=field:level --global_batch_size=4 --epochs=2 --eval_ratio=0.1"
        " --learning_rate=3e-3".split()
    )
    return [
        *fixed,
        f"--data_path={data}",
        "--batch_size=2",
        "--save_interval=3",
        "--save_total_limit=9",
    ]


@pytest.fixture(scope="module")
def one(job, flags):
    return job("one", 90, *flags)


def test_two_processes_make_one_curve(job, flags, one):
    check_same_run(job("two", 90, *flags, "--batch_size=1", nproc=2), one)


def test_a_run_goes_on_in_the_middle_of_an_epoch(job, flags, one):
    source = one / "checkpoints/step_00000003"
    check_same_run(job("resumed", 90, *flags, f"--resume={source}", nproc=2), one, first=4)


def test_another_order_is_another_run(one, flags, tmp_path):
    places = [f"--out_dir={tmp_path}", f"--cache_dir={tmp_path}", "--curriculum=none"]
    source = f"--resume={one / 'checkpoints/step_00000003'}"
    done = run_script("trainer/train_full_sft.py", *RUN_FLAGS, *flags, *places, source)
    assert done.returncode == 2 and "--curriculum was field:level and is none" in done.stderr


def test_runs_of_before_go_on(tmp_path):
    """Their checkpoints know nothing of the flag."""
    current = identity_of({"dim": 32, "curriculum": "none"}, 4, "key")
    before = {name: value for name, value in current.items() if name != "--curriculum"}
    check_identity(before, current, tmp_path)
    with pytest.raises(ValueError, match="--curriculum was none and is length"):
        check_identity(before, current | {"--curriculum": "length"}, tmp_path)


@pytest.mark.parametrize("packing", [0, 1])
def test_short_rows_come_first_in_every_epoch(job, packing):
    flags = [
        f"--packing={packing}",
        "--batch_size=1",
        "--epochs=2",
        "--curriculum=length",
        "--max_steps=180",
    ]
    tokens = [line["tokens"] for line in curve(job(f"length_{packing}", 90, *flags))]
    assert len(tokens) % 2 == 0
    half = len(tokens) // 2
    assert tokens[:half] == tokens[half:]
    assert packing or tokens[:half] == sorted(tokens[:half])
