"""Rollouts and rewards: what is sampled and how probable it is, prompts of files, reward functions."""

import random
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from conftest import write_jsonl

from dataset.chat_format import ChatCoder
from dataset.chat_rows import detect_format
from dataset.packing import plan_epoch
from dataset.plain_rows import plain_format
from dataset.preview import preview_prompts
from dataset.prompt_dataset import PromptDataset, describe_prompts, read_plain_prompt
from dataset.prompt_rows import split_prompt
from model.kv_cache import Decoder
from model.lm import LMConfig, MiniMindLM
from model.reward import RewardConfig, RewardModel
from runtime.checkpoint import save_file
from runtime.rl import reward_words, rewards, rollout, sampler, whole_copy

SHAPE = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 40,
    "max_seq_len": 48,
}
END = 7


def tiny(**more) -> MiniMindLM:
    model = MiniMindLM(LMConfig(**(SHAPE | more)))
    for p in model.parameters():  # far from uniform, so that every distribution has a shape
        if p.dim() > 1:
            p.data.mul_(6)
    return model


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(3 * n + 5 * t) % 30 + 8 for t in range(length)] for n, length in enumerate(lengths)]


def write(
    model,
    prompts,
    samples=3,
    numbers=None,
    batch_size=64,
    temperature=0.7,
    seed=1,
    step=5,
    longest=20,
):
    numbers = numbers or list(range(len(prompts)))
    options = {
        "batch_size": batch_size,
        "max_new_tokens": longest,
        "temperature": temperature,
        "end": END,
    }
    keys = [(seed, step, number, sample) for number in numbers for sample in range(samples)]
    return sampler.generate(model, prompts, keys, autocast=nullcontext(), **options)


def texts(sampled) -> list[list[int]]:
    return sampled.completions


def recorded_log_probs(monkeypatch, temperature: float) -> dict[tuple[int, int], float]:
    """(row, position) -> log-probability under which the token there is drawn, as it is drawn."""
    log_probs = {}
    generate_batch = sampler.generate_batch

    def generate(model, prompts, limits, draw, *others):
        def sample(logits, row, position):
            token = draw(logits, row, position)
            chosen = (logits / temperature).log_softmax(-1).gather(1, token.unsqueeze(1))
            keys = zip(row.tolist(), position.tolist(), strict=True)
            log_probs.update(zip(keys, chosen.flatten().tolist(), strict=True))
            return token

        return generate_batch(model, prompts, limits, sample, *others)

    monkeypatch.setattr(sampler, "generate_batch", generate)
    return log_probs


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"use_moe": True, "n_shared_experts": 1}], ids=["dense", "moe"]
)
def test_the_sampler_and_the_scorer_agree(more, monkeypatch):
    """One writes with a cache and padding on the left, the other reads packed rows."""
    model, prompts = tiny(**more), prompts_of([3, 9, 1, 6, 14, 2])
    drawn = recorded_log_probs(monkeypatch, 0.7)
    model.train()
    sampled = write(model, prompts)
    assert model.training and len(sampled) == 18
    assert {len(text) for text in texts(sampled)} > {20} and 0 < sum(
        sampled.ended
    ) < 18  # of unequal lengths, some cut
    for row, text in enumerate(texts(sampled)):
        assert sampled.prompts[row] == prompts[row // 3]
        assert (
            END not in text[:-1]
            and sampled.ended[row] == (text[-1] == END)
            and (sampled.ended[row] or len(text) == 20)
        )
    for pack in rollout.packs_of(sampled, list(range(18)), 100):
        with torch.no_grad():
            log_probs, entropy, _ = rollout.score(model, pack, 0.7)
        keys = [
            (row, position)
            for row in pack.rows.tolist()
            for position in range(len(sampled.completions[row]))
        ]
        assert (log_probs - torch.tensor([drawn[key] for key in keys])).abs().max() <= 1e-5
        assert (entropy > 0).all() and (log_probs < 0).all()


def test_what_is_drawn_depends_on_nothing_but_seed_step_prompt_and_sample():
    model, prompts = tiny(), prompts_of([3, 9, 1, 6])
    reference = write(model, prompts)
    for n in range(4):
        alone = write(model, [prompts[n]], numbers=[n])
        assert texts(alone) == texts(reference)[3 * n : 3 * n + 3]
    assert texts(write(model, prompts[::-1], numbers=[3, 2, 1, 0], batch_size=2)) == [
        text for n in (3, 2, 1, 0) for text in texts(reference)[3 * n : 3 * n + 3]
    ]
    assert texts(write(model, prompts, samples=2))[::2] == texts(reference)[::3]
    for other in ({"seed": 2}, {"step": 6}, {"numbers": [9, 10, 11, 12]}):
        assert texts(write(model, prompts, **other)) != texts(reference)
    same = write(model, [prompts[1]] * 2, numbers=[1, 2])
    assert texts(same)[:3] != texts(same)[3:]


@pytest.mark.parametrize("shape", [{}, {"use_moe": True}], ids=["dense", "experts"])
def test_rows_that_have_ended_cost_no_work(shape):
    packs, rows, model = [], [], tiny(**shape)
    fastest = model.make_decoder or Decoder

    def recorded(model, cache):
        decoder = fastest(model, cache)
        step, read = decoder.step, decoder.read
        decoder.step = lambda token: rows.append(len(token)) or step(token)
        decoder.read = lambda ids, lens, last: packs.append(ids.shape) or read(ids, lens, last)
        return decoder

    model.make_decoder = recorded
    sampled = write(model, prompts_of([4] * 8), samples=8, temperature=1.5)
    assert packs == [
        (1, 8 * 4)
    ]  # without padding, and the samples of a prompt share the pass over it
    lengths = torch.tensor([len(text) for text in texts(sampled)])
    assert rows == [int((lengths > t).sum()) for t in range(1, len(rows) + 1)] and rows[-1] < 64


def test_a_draw_inverts_the_cumulated_distribution():
    probs = torch.tensor([0.1, 0.0, 0.4, 0.5])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = sampler.draw(probs.log().expand(1000, 4), uniform)
    assert drawn.bincount(minlength=4).tolist() == [100, 0, 400, 500] and (drawn.diff() >= 0).all()
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampler.draw(probs.log().expand(2, 4), edges).tolist() == [0, 3]


def test_samples_follow_the_model():
    """Of 4,000 first tokens each is met as often as its probability says."""
    model = tiny()
    sampled = write(model, [[9, 10]], samples=4000, longest=1, temperature=1.3)
    first = torch.tensor(sampled.completions)[:, 0]
    probs = (model(torch.tensor([[9, 10]])).logits[0, -1] / 1.3).softmax(0).detach().double()
    off = (first.bincount(minlength=40).double() / 4000 - probs).abs() / (
        probs * (1 - probs) / 4000
    ).sqrt()
    assert off.max() < 4 and probs.max() < 0.9


def test_temperature_zero_is_greedy():
    model, prompts = tiny().eval(), prompts_of([5, 8])
    sampled = write(model, prompts, samples=1, temperature=0.0)
    assert not model.training
    for prompt, text in zip(prompts, texts(sampled), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, eos_token_id=END)[
            0
        ].tolist()
        assert text == expected


def test_a_spare_copy_follows_the_model():
    model = tiny()
    spare = tiny()
    copy = whole_copy.update_copy(spare, model)
    assert copy is spare and texts(write(copy, prompts_of([4]))) == texts(
        write(model, prompts_of([4]))
    )


# --------------------------------------------------------------------------------------------------
# Learning from it
# --------------------------------------------------------------------------------------------------


def test_packs_hold_every_token_once_within_the_budget():
    sampled = write(tiny(), prompts_of([3, 9, 1, 6, 14, 2]))
    packs = rollout.packs_of(sampled, list(range(18)), 60)
    assert [row for pack in packs for row in pack.rows.tolist()] == list(range(18))
    assert len(packs) > 3 and all(sum(pack.doc_lens) <= 60 for pack in packs)
    for pack in packs:
        assert pack.X.size(1) == sum(pack.doc_lens)
        rows = [sampled.prompts[row] + sampled.completions[row] for row in pack.rows.tolist()]
        assert pack.X[0].tolist() == [token for row in rows for token in row[:-1]]
        written = [sampled.completions[row] for row in pack.rows.tolist()]
        assert pack.targets.tolist() == sum(written, [])
        assert pack.lengths.tolist() == pack.of.bincount().tolist() == [*map(len, written)]
        assert (
            pack.X[0][pack.at[1:]][pack.of.diff() == 0] == pack.targets[:-1][pack.of.diff() == 0]
        ).all()
    alone = rollout.pack(sampled, [])
    assert (alone.X.tolist(), alone.doc_lens, len(alone.targets), len(alone.of)) == (
        [[0]],
        [],
        0,
        0,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mini_batches_are_the_same_prompts_on_any_number_of_ranks(ranks):
    together = [set() for _ in range(3)]
    for rank in range(ranks):
        mine = list(range(10))[rank::ranks]
        parts = rollout.mini_batch_rows(len(mine), 10, rank, ranks, 2, 3)
        for part, rows in zip(together, parts, strict=True):
            part |= {(mine[row // 2], row % 2) for row in rows}
    expected = [range(0, 4), range(4, 7), range(7, 10)]
    assert together == [{(n, sample) for n in part for sample in range(2)} for part in expected]


# --------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_prompts_of_the_four_formats(tokenizer, tmp_path):
    reply = {"role": "assistant", "content": "4"}
    rows = {
        "minimind": [
            {"conversations": user("2+2"), "answer": "4"},
            {"conversations": [*user("2+2"), reply]},
        ],
        "openai": [{"messages": user("2+2"), "answer": "4"}, {"messages": [*user("2+2"), reply]}],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]}
        ],
        "alpaca": [
            {"instruction": "2+2", "input": "", "output": "4"},
            {"instruction": "2+2", "answer": "4"},
        ],
    }
    expected = tokenizer.apply_chat_template(user("2+2"), add_generation_prompt=True)["input_ids"]
    for name, given in rows.items():
        dataset = PromptDataset(write_jsonl(tmp_path / f"{name}.jsonl", given), tokenizer, 64, 16)
        assert [dataset[n] for n in range(len(given))] == [expected] * len(given), name
        assert [row["answer"] for row in dataset.rows] == ["4"] * len(given)
        assert dataset.lengths.tolist() == [len(expected) + 16] * len(given)
    kept = PromptDataset(
        write_jsonl(tmp_path / "kept.jsonl", [{"messages": [*user("x"), reply], "answer": "5", "level": 3}]),
        tokenizer, 64, 16,
    )  # fmt: skip
    assert kept.rows[0]["answer"] == "5" and kept.rows[0]["level"] == 3
    assert "1 prompts" in describe_prompts(kept) and '"level": 3' in preview_prompts(
        kept, tokenizer, 5
    )


SAID = [
    {"role": role, "content": role} for role in ("system", "user", "assistant", "tool", "human")
]
ODD_TURNS = [*SAID, SAID[1] | {"loss": 0}, SAID[1] | {"name": None}, {"role": "user"}, None, "a"]
ODD_FIELDS = [("answer", "4"), ("answer", None), ("answer", 4), ("level", [1]), ("input", None),
              ("system", "s"), ("weight", 0), ("tools", "[]"), ("note", None)]  # fmt: skip


def test_plain_prompts_are_read_as_all_others_are(tokenizer):
    """`read_plain_prompt` says the same as `prompt_rows`, or leaves the row to it."""
    draw, coder, plain = random.Random(0), ChatCoder(tokenizer), 0
    for _ in range(10_000):
        turns = [
            draw.choice(SAID[:4] + SAID[1:2] * 20 + ODD_TURNS)
            for _ in range(draw.choice([0, 1, 1, 2, 3]))
        ]
        row = {draw.choice(["messages", "conversations"]): draw.choice([turns] * 9 + [None, "a"])}
        row |= dict(draw.choices(ODD_FIELDS, k=draw.choice([0, 0, 0, 1, 2])))
        fmt = draw.choice([plain_format(row, False)] * 6 + [None, "openai", "minimind", "sharegpt"])
        if fmt and fmt == plain_format(row, need_assistant=False):
            assert fmt == detect_format(row)
        if found := read_plain_prompt(row, fmt):
            assert split_prompt(row, fmt, coder) == found, row
            plain += 1
    assert 1_000 < plain < 8_000
    assert not any(read_plain_prompt(row, "openai") for row in (None, [1], {}, {"messages": []}))


def test_a_plan_row_is_a_prompt(tokenizer, tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"messages": user(f"what is {n}"), "answer": "x"} for n in range(7)],
    )
    dataset = PromptDataset(path, tokenizer, 64, 16)
    plan = plan_epoch(dataset, torch.arange(7).numpy(), 1, 64, 0, 3, 0, 0)
    seen = [number for step in range(3) for number in sum(plan.micro_batches(step, 0, 1, 2), [])]
    assert plan.steps == 3 and sorted(seen) == list(range(7))
    assert (
        PromptDataset(path, tokenizer, 64, 16).key
        == dataset.key
        != PromptDataset(path, tokenizer, 64, 15).key
    )


@pytest.mark.parametrize(
    "row, reason",
    [
        (
            {"messages": user("hi"), "weight": 0},
            "the row is not to be learned from (weight, train or loss)",
        ),
        ({"messages": user("hi"), "images": ["a.png"]}, "'images' is not supported"),
        (
            {"messages": [{"role": "system", "content": "be kind"}]},
            "no user turn, so there is nothing to answer",
        ),
        ({"messages": user("hi"), "answer": 4}, "'answer' must be a string"),
        (
            {
                "messages": [
                    {"role": "system", "content": "x"},
                    {"role": "assistant", "content": "x"},
                ]
            },
            "no user turn",
        ),
        (
            {"messages": [*user("hi")] + [{"role": "assistant", "content": "x"}] * 2},
            "must end with the user's turn",
        ),
        ("{broken", "broken JSON"),
        ({"text": "hi"}, "not a row of the openai format like the first"),
    ],
)
def test_bad_prompts(tokenizer, tmp_path, row, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": user("hi")}, row])
    with pytest.raises(ValueError) as error:
        PromptDataset(path, tokenizer, 80, 16)
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)
    kept = PromptDataset(path, tokenizer, 80, 16, skip_bad=True)
    assert len(kept) == 1 and "1 bad rows skipped (first: line 2:" in describe_prompts(kept)


def test_prompts_that_are_too_long_are_dropped(tokenizer, tmp_path):
    long = {"messages": user("word " * 60)}
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": user("hi")}, long, {"messages": user("hello")}]
    )
    dataset = PromptDataset(path, tokenizer, 80, 16)
    assert (len(dataset), dataset.stats["dropped"], dataset.places[1]) == (2, 1, f"{path}:3")
    assert describe_prompts(dataset).endswith("tokens on average, 1 dropped")
    with pytest.raises(
        ValueError, match="0 bad, 2 too long for --max_seq_len 80 with --max_new_tokens 16"
    ):
        PromptDataset(write_jsonl(tmp_path / "long.jsonl", [long, long]), tokenizer, 80, 16)


def test_prompts_with_a_system_text_and_with_null(tokenizer, tmp_path):
    said = [{"role": "system", "content": "Be brief."}, *user("2+2")]
    columns = dict.fromkeys(
        ("conversations", "messages", "instruction", "output", "tools", "answer", "history")
    )
    shares = [{"from": "human", "value": "2+2", "weight": None}, {"from": "gpt", "value": "4"}]
    rows = [{"messages": user("2+2"), "answer": "4"}, {"instruction": "2+2", "answer": "4"},
            {"conversations": [*user("2+2"), {"role": "assistant", "content": "4"}]},
            {"conversations": shares, "level": None}]  # fmt: skip
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    for row in rows:
        path = write_jsonl(tmp_path / "rows.jsonl", [columns | row | {"system": "Be brief."}])
        dataset = PromptDataset(path, tokenizer, 64, 16)
        assert dataset[0] == expected and dataset.rows[0]["answer"] == "4"
    assert "level" in dataset.rows[0]  # a reward may ask for it


def test_files_without_prompts(tokenizer, tmp_path):
    empty, bad = (
        write_jsonl(tmp_path / "e.jsonl", []),
        write_jsonl(tmp_path / "b.jsonl", [{"messages": []}]),
    )
    for path, reason in (
        (tmp_path / "no", "no such data file"),
        (empty, "file is empty"),
        (bad, "no usable row"),
    ):
        with pytest.raises(ValueError, match=reason):
            PromptDataset(path, tokenizer, 80, 16, skip_bad=True)


# --------------------------------------------------------------------------------------------------
# Rewards
# --------------------------------------------------------------------------------------------------

MINE = """
def length(prompts, completions, rows):
    return [len(text) for text in completions]
def raising(prompts, completions, rows):
    return [1 / (len(text) - 3) for text in completions]
def nan(prompts, completions, rows):
    return [float("nan") if text == "four" else 1.0 for text in completions]
def short(prompts, completions, rows):
    return [1.0] * (len(rows) - 1)
def nothing(prompts, completions, rows):
    pass
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)

    def load_one(*words):
        words = [word.replace("mine.py", str(tmp_path / "mine.py")) for word in words]
        args = Namespace(device=torch.device("cpu"), max_seq_len=32, strategy="auto")
        return rewards.load_rewards(words, LMConfig(vocab_size=6400), args)

    return load_one


def test_exact_and_format():
    rows = [
        {"answer": " 42 "},
        {"answer": "42"},
        {"answer": "42", "format": r"\d+"},
        {"answer": "1"},
    ]
    replies = ["42", "<think>\n6 x 7\n</think>\n\n42", "42 ", "42"]
    assert rewards.exact([""] * 4, replies, rows) == [1, 1, 1, 0]
    assert reward_words.format([""] * 4, replies, rows) == [0, 1, 0, 0]
    with pytest.raises(ValueError, match='no "answer"'):
        rewards.exact([""], ["x"], [{}])


def rewards_of(functions, tokenizer, replies: list[str]):
    """The rewards of given replies, as if they had been written."""
    ids = [
        tokenizer.encode(text) + [tokenizer.convert_tokens_to_ids("<|im_end|>")] for text in replies
    ]
    n = len(ids)
    sampled = rollout.Rollout([[9, 9]] * n, ids, [True] * n)
    rows = [{"answer": "four"}] * n
    return rewards.compute_rewards(
        functions, sampled, rows, [f"data:{k}" for k in range(1, n + 1)], ChatCoder(tokenizer)
    )


def test_rewards_have_weights(load, tokenizer):
    functions = load("exact", "mine.py:length:0.5")
    assert rewards_of(functions, tokenizer, ["four", "seven"]).tolist() == [[1, 2], [0, 2.5]]


def test_a_reward_model_scores_each_completion_by_itself(load, tokenizer, tmp_path):
    shape = SHAPE | {"vocab_size": 6400}
    model = RewardModel(RewardConfig(**shape))
    torch.nn.init.normal_(model.score.weight)
    for name, config in (
        ("fits", model.config),
        ("short", RewardConfig(**(shape | {"max_seq_len": 16}))),
    ):
        save_file(tmp_path / f"{name}.pth", model.state_dict())
        save_file(tmp_path / f"{name}.json", config.to_json())
    scores = rewards_of(load(f"{tmp_path}/fits.pth:2"), tokenizer, ["one", "four", "seventy seven"])
    ids = torch.tensor(
        [[9, 9, *tokenizer.encode("four"), tokenizer.convert_tokens_to_ids("<|im_end|>")]]
    )
    assert scores[1].item() == pytest.approx(2 * model.eval()(ids).scores.item(), rel=1e-6)
    with pytest.raises(
        ValueError,
        match=r"short.pth: made for 6400 tokens and contexts of 16, needed are 6400 and 32",
    ):
        load(f"{tmp_path}/short.pth")
    save_file(tmp_path / "short.json", RewardConfig(**(shape | {"dim": 64})).to_json())
    with pytest.raises(ValueError, match="short.pth: made for a model of another shape"):
        load(f"{tmp_path}/short.pth")


@pytest.mark.parametrize(
    "word, reason",
    [
        ("exactly", "neither exact, format, nor FILE.py:FUNCTION"),
        ("exact:1.2.3", "the weight 1.2.3 is not a number"),
        ("mine.py:other", "has no function other"),
        ("nowhere.py:other", "there is no file nowhere.py"),
        ("none.pth", "no such weights file"),
    ],
)
def test_rewards_that_cannot_be_loaded(load, word, reason):
    with pytest.raises(ValueError, match=reason):
        load(word)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("raising", "raising raised ZeroDivisionError at data:2: "),
        ("nan", "nan returned nan at data:4 for the completion 'four'"),
        ("short", "short returned 3 numbers for 4 completions, those of data:1"),
        ("nothing", "nothing must return a list of numbers, it returned NoneType"),
    ],
)
def test_a_reward_function_that_fails_is_named_with_the_row(load, tokenizer, name, reason):
    with pytest.raises(ValueError, match=reason) as error:
        rewards_of(load(f"mine.py:{name}"), tokenizer, ["seventy", "one", "seventy", "four"])
    assert "\n" not in str(error.value)
