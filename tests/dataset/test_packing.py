"""The plan of an epoch: each row once, in the same windows however ranks share them."""

import itertools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from dataset.held_out import hold_out
from dataset.lm_dataset import SFTDataset
from dataset.packing import batches, plan_epoch, split_rows
from dataset.rank_rows import rank_batches

MAX_SEQ_LEN = 100
PINNED_ORDER = [0, 4, 6, 1, 2, 7, 3, 5]  # of 8 documents in epoch 1 with seed 42


def fake_dataset(documents: int, seed: int = 0) -> SimpleNamespace:
    """Only what a plan looks at: token counts."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, MAX_SEQ_LEN + 1, documents)
    return SimpleNamespace(lengths=lengths, supervised=rng.integers(1, lengths + 1))


def make_plan(
    documents=200, seed=7, packing=1, global_batch=8, epoch=0, dataset=None, ids=None, drop_last=0
):
    dataset = dataset or fake_dataset(documents)
    ids = np.arange(documents) if ids is None else ids
    return plan_epoch(dataset, ids, seed, MAX_SEQ_LEN, packing, global_batch, drop_last, epoch)


def rows_of(plan) -> list[list[int]]:
    return [plan.documents(row) for row in range(plan.rows)]


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("documents", [1, 2, 3, 50, 777])
def test_every_document_once_per_epoch(documents, packing):
    for epoch in range(3):
        plan = make_plan(documents, packing=packing, epoch=epoch)
        assert sorted(itertools.chain(*rows_of(plan))) == list(range(documents))


@given(
    lengths=st.lists(st.integers(1, MAX_SEQ_LEN), min_size=1, max_size=60),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_packs_are_full_but_never_too_long(lengths, seed, epoch):
    dataset = SimpleNamespace(lengths=np.array(lengths), supervised=np.array(lengths))
    rows = rows_of(make_plan(len(lengths), seed, epoch=epoch, dataset=dataset))
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    sizes = [sum(lengths[doc] for doc in row) for row in rows]
    assert all(rows) and max(sizes) <= MAX_SEQ_LEN
    # Closed only when the next one did not fit.
    for size, following in zip(sizes, rows[1:], strict=False):
        assert size + lengths[following[0]] > MAX_SEQ_LEN


def test_without_packing_a_row_is_a_document():
    plan = make_plan(50, packing=0)
    assert plan.rows == 50 and all(len(row) == 1 for row in rows_of(plan))


def test_documents_in_the_order_of_the_plan_packed_or_not():
    """Packing decides where rows begin, not in which order documents come."""
    packed, single = make_plan(packing=1), make_plan(packing=0)
    assert packed.order.tolist() == single.order.tolist()


def test_order_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed, epoch in itertools.product((0, 1, 2, 42), range(4)):
        plan = make_plan(seed=seed, epoch=epoch)
        again = make_plan(seed=seed, epoch=epoch, global_batch=3)
        assert (
            plan.order.tolist() == again.order.tolist()
            and plan.starts.tolist() == again.starts.tolist()
        )
        orders[tuple(plan.order)] = (seed, epoch)
    assert len(orders) == 16, "two epochs or seeds share an order"


def test_order_is_pinned():
    """A checkpoint of one version finds the same epoch in the next: numpy's generator matters."""
    dataset = SimpleNamespace(lengths=np.full(8, 40), supervised=np.full(8, 10))
    plan = make_plan(8, seed=42, epoch=1, dataset=dataset)
    assert (
        plan.order.tolist()
        == np.random.default_rng([42, 1]).permutation(8).tolist()
        == PINNED_ORDER
    )
    assert plan.starts.tolist() == [0, 2, 4, 6, 8]


def test_plan_takes_only_the_documents_it_is_given():
    dataset, ids = fake_dataset(100), np.arange(3, 100, 7)
    plan = make_plan(seed=1, dataset=dataset, ids=ids)
    assert sorted(plan.order.tolist()) == ids.tolist()
    assert (
        plan.tokens[-1] == dataset.lengths[ids].sum()
        and plan.supervised[-1] == dataset.supervised[ids].sum()
    )


SHARES = [  # global batch, world size, batch size
    (8, 1, 8), (8, 1, 1), (8, 2, 2), (8, 2, 4), (8, 4, 2), (8, 4, 1), (8, 8, 1), (8, 3, 2), (8, 5, 3), (8, 1, 100),
    (1, 1, 1), (1, 4, 1), (2, 8, 4), (7, 2, 2), (7, 3, 1), (16, 4, 8), (1000, 4, 8), (1000, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("global_batch, world_size, batch_size", SHARES)
def test_ranks_and_micro_batches_partition_every_window(
    global_batch, world_size, batch_size, packing
):
    plan = make_plan(61, packing=packing, global_batch=global_batch)
    rows = rows_of(plan)
    assert plan.steps == -(-len(rows) // global_batch)
    for step in range(plan.steps):
        window = rows[step * global_batch : (step + 1) * global_batch]
        seen = []
        for rank in range(world_size):
            micro = plan.micro_batches(step, rank, world_size, batch_size)
            own = len(window[rank::world_size])
            # As many as rank 0 needs: a rank without a row still takes part in the exchange of
            # weights and gradients.
            assert len(micro) == len(plan.micro_batches(step, 0, world_size, batch_size)) > 0
            assert all(plan.micro_batches(step, 0, world_size, batch_size))
            assert [bool(docs) for docs in micro] == [
                at * batch_size < own for at in range(len(micro))
            ]
            hand = list(itertools.chain(*micro))
            mine = [row for row in window if row[0] in hand]
            assert hand == list(itertools.chain(*mine)) and len(mine) == own
            seen += hand
        assert sorted(seen) == sorted(itertools.chain(*window))


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("global_batch", [1, 3, 8, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_one_process_takes_what_many_would_share(batch_size, global_batch, packing):
    """It shares nothing out; were it asked to, it would get the same."""
    plan = make_plan(61, packing=packing, global_batch=global_batch)
    for step in range(plan.steps):
        rows = plan.window(step)
        sizes = np.diff(plan.tokens[plan.starts[rows.start : rows.stop + 1]]).tolist()
        shared = rank_batches(rows, sizes, 0, 1, batch_size)
        expected = [[doc for row in micro for doc in plan.documents(row)] for micro in shared]
        assert plan.micro_batches(step, 0, 1, batch_size) == expected


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("global_batch, world_size", [(16, 2), (32, 4), (64, 8)])
def test_ranks_get_about_the_same_number_of_tokens(global_batch, world_size, packing):
    plan = make_plan(400, packing=packing, global_batch=global_batch)
    full = [step for step in range(plan.steps) if len(plan.window(step)) == global_batch]
    assert full
    sizes = dict(zip(plan.order.tolist(), np.diff(plan.tokens).tolist(), strict=True))
    for step in full:
        shares = [sum(sizes[doc] for doc in itertools.chain(*plan.micro_batches(step, rank, world_size, 4)))
                  for rank in range(world_size)]  # fmt: skip
        assert max(shares) < 1.05 * np.mean(shares)


def test_micro_batches_have_batch_size_rows():
    plan = make_plan(packing=0, global_batch=16)
    assert [len(micro) for micro in plan.micro_batches(0, 1, 2, 3)] == [3, 3, 2]


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("global_batch", [1, 3, 8, 64, 1000])
def test_counts_are_the_sums_of_the_window(global_batch, packing):
    dataset = fake_dataset(61)
    plan = make_plan(61, packing=packing, global_batch=global_batch, dataset=dataset)
    total = np.zeros(2, np.int64)
    for step in range(plan.steps):
        docs = list(itertools.chain(*(plan.documents(row) for row in plan.window(step))))
        assert plan.counts(step) == (dataset.lengths[docs].sum(), dataset.supervised[docs].sum())
        total += plan.counts(step)
    assert total.tolist() == [dataset.lengths.sum(), dataset.supervised.sum()]
    assert all(isinstance(count, int) for count in plan.counts(0))


def test_last_window_is_short():
    plan = make_plan(10, packing=0, global_batch=4)
    assert [len(plan.window(step)) for step in range(plan.steps)] == [4, 4, 2]
    # Three ranks for two rows: the third has none, and there is one micro-batch nevertheless.
    assert [len(plan.micro_batches(2, rank, 3, 8)[0]) for rank in range(3)] == [1, 1, 0]


def test_dropping_the_last_window():
    assert make_plan(10, packing=0, global_batch=4, drop_last=1).steps == 2
    assert make_plan(8, packing=0, global_batch=4, drop_last=1).steps == 2
    with pytest.raises(
        ValueError, match="--drop_last 1: 3 rows an epoch are fewer than the global batch of 4"
    ):
        make_plan(3, packing=0, global_batch=4, drop_last=1)


def test_counts_do_not_overflow():
    dataset = SimpleNamespace(lengths=np.full(5000, 2**20), supervised=np.full(5000, 2**20))
    plan = plan_epoch(dataset, np.arange(5000), 0, 2**20, 1, 5000, 0, 0)
    assert plan.counts(0) == (5000 * 2**20, 5000 * 2**20)


@pytest.mark.parametrize("packing", [0, 1])
def test_a_million_documents(packing):
    documents = 1_000_000
    plan = make_plan(documents, packing=packing, global_batch=512)
    assert np.bincount(plan.order, minlength=documents).tolist() == [1] * documents
    assert plan.counts(plan.steps - 1)[0] > 0 and plan.starts[-1] == documents


# --------------------------------------------------------------------------------------------------
# Held-out rows
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, ratio, expected", [(100, 0.1, 10), (101, 0.5, 50), (10, 0.05, 0), (3, 0.4, 1)]
)
def test_split_is_disjoint_and_deterministic(rows, ratio, expected):
    if not expected:
        with pytest.raises(
            ValueError, match=r"--eval_ratio 0.05 of 10 rows holds out 0, trains on 10"
        ):
            split_rows(rows, ratio, 42)
        return
    train, held_out = split_rows(rows, ratio, 42)
    assert len(held_out) == expected and sorted([*train, *held_out]) == list(range(rows))
    assert train.tolist() == sorted(train) and held_out.tolist() == sorted(held_out)
    again = split_rows(rows, ratio, 42)
    assert train.tolist() == again[0].tolist() and held_out.tolist() == again[1].tolist()


def test_split_depends_on_the_seed():
    assert len({tuple(split_rows(1000, 0.01, seed)[1]) for seed in range(20)}) == 20


def test_split_of_nothing():
    train, held_out = split_rows(10, 0.0, 42)
    for rows in (train, held_out), hold_out(10, 0.0, 42):
        assert [part.dtype for part in rows] == [np.int64, np.int64]
    assert [part.tolist() for part in hold_out(10, 0.0, 42)] == [train.tolist(), []]
    assert train.tolist() == list(range(10)) and len(held_out) == 0


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.999, 0.0001])
def test_split_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match=f"--eval_ratio {ratio} of 100 rows"):
        split_rows(100, ratio, 42)


# --------------------------------------------------------------------------------------------------
# What reaches the model
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    texts = [(f"question {n}", f"answer {n} " * (n % 9 + 1)) for n in range(40)]
    rows = [{"instruction": question, "output": answer} for question, answer in texts]
    return SFTDataset(
        write_jsonl(folder / "data.jsonl", rows), tokenizer, MAX_SEQ_LEN, cache_dir=folder / "cache"
    )


def loaded(dataset, plan, steps, rank, world_size, batch_size, num_workers=0):
    found = batches(dataset, plan, steps, rank, world_size, batch_size, num_workers)
    return [
        (X.tolist(), Y.tolist(), loss_mask.tolist(), doc_lens)
        for X, Y, loss_mask, doc_lens in found
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_plan_in_order(dataset, num_workers):
    plan = make_plan(40, dataset=dataset, global_batch=7)
    found = loaded(dataset, plan, range(plan.steps), 1, 2, 2, num_workers)
    expected = []
    for step in range(plan.steps):
        for docs in plan.micro_batches(step, 1, 2, 2):
            X, Y, loss_mask, doc_lens = dataset.collate([dataset[doc] for doc in docs])
            expected.append((X.tolist(), Y.tolist(), loss_mask.tolist(), doc_lens))
    assert found == expected


def test_batches_go_on_in_the_middle_of_an_epoch(dataset):
    plan = make_plan(40, dataset=dataset, global_batch=5)
    share = (0, 1, 2)
    whole = loaded(dataset, plan, range(plan.steps), *share)
    first = sum(len(plan.micro_batches(step, *share)) for step in range(2))
    assert loaded(dataset, plan, range(2, plan.steps), *share) == whole[first:]


def test_supervised_tokens_of_the_batches_are_the_counts(dataset):
    plan = make_plan(40, dataset=dataset, global_batch=6)
    for step in range(plan.steps):
        parts = [loaded(dataset, plan, range(step, step + 1), rank, 4, 1) for rank in range(4)]
        supervised = sum(sum(loss_mask[0]) for part in parts for _, _, loss_mask, _ in part)
        assert supervised == plan.counts(step)[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_data_leaves_the_random_state_alone(dataset, num_workers):
    """Dropout draws from the same generator: to open an epoch's data must not disturb it."""
    plan = make_plan(40, dataset=dataset)
    before = torch.get_rng_state()
    loaded(dataset, plan, range(plan.steps), 0, 1, 2, num_workers)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_process_that_reads_data_loses_no_row(dataset, number, monkeypatch):
    """A launcher's goes to it, too, and may come before it has read anything."""
    plan, main = make_plan(40, dataset=dataset), os.getpid()
    expected = loaded(dataset, plan, range(plan.steps), 0, 1, 2)

    def signalled(name: str) -> None:  # what a worker of torch's DataLoader calls first
        if os.getpid() != main:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.multiprocessing, "_set_thread_name", signalled)
    assert loaded(dataset, plan, range(plan.steps), 0, 1, 2, num_workers=1) == expected
