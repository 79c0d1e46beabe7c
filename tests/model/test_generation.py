"""Generation: cache, batching and sampling do what they say and change nothing else."""

import numpy as np
import pytest
import torch
from test_model import KINDS, MOE, TINY, build, huggingface, ids

from model.generate import stream_text
from model.generate_batch import generate_batch
from model.generate_slots import generate_slots
from model.kv_cache import Decoder, KVCache
from model.sampling import sample
from model.stream_rows import stream_rows


def left_padded(prompts: list[torch.Tensor], filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (1, n) of unequal length as one batch, padded on the left, and its mask."""
    width = max(prompt.size(1) for prompt in prompts)
    x = torch.full((len(prompts), width), filler)
    mask = torch.zeros_like(x)
    for row, prompt in enumerate(prompts):
        x[row, width - prompt.size(1) :], mask[row, width - prompt.size(1) :] = prompt[0], 1
    return x, mask


# --------------------------------------------------------------------------------------------------
# The cache and the batch
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
@pytest.mark.parametrize("steps", [[40] + [1] * 30, [1] * 70, [10, 25, 1, 1, 30, 3]], ids=str)
@torch.no_grad()
def test_cached_logits_equal_uncached(kind, steps):
    model = build(**KINDS.get(kind, {**MOE, "n_shared_experts": 1}))
    x = ids(2, 70)
    cache = KVCache(model.config, 2, 70, x.device, torch.float32)
    cached = [model(part, cache=cache).logits for part in x.split(steps, dim=1)]
    assert cache.lengths.tolist() == [70, 70]
    assert (torch.cat(cached, dim=1) - model(x).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_logits_behind_packed_prompts_equal_each_prompt_alone(kind):
    model = build(**KINDS[kind])
    prompts, tail = [ids(1, n) for n in (30, 4, 17, 1)], ids(4, 12)
    cache, ends = (
        KVCache(model.config, 4, 42, torch.device("cpu"), torch.float32),
        torch.tensor([30, 34, 51, 52]) - 1,
    )
    packed = model(torch.cat(prompts, dim=1), doc_lens=[30, 4, 17, 1], logits_at=ends, cache=cache)
    steps = [packed.logits.unsqueeze(1)]
    steps += [model(tail[:, n : n + 1], cache=cache).logits for n in range(12)]
    batched = torch.cat(steps, dim=1)
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, tail[row : row + 1]], dim=1)).logits[
            :, prompt.size(1) - 1 :
        ]
        assert (batched[row] - alone[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [0, 50])
def test_a_batch_generates_what_each_prompt_generates_alone(kind, filler):
    model = build(**KINDS[kind])
    prompts = [ids(1, n) for n in (30, 4, 17, 1, 30)]
    for options in ({}, {"repetition_penalty": 1.3}):
        batched = model.generate(*left_padded(prompts, filler), max_new_tokens=25, **options)
        for row, prompt in enumerate(prompts):
            assert torch.equal(
                batched[row], model.generate(prompt, max_new_tokens=25, **options)[0]
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 17, 63, 255, 256])
def test_one_prompt_alone_generates_what_it_does_among_the_slots_of_a_batch(kind, length):
    """The short loop for one prompt against the general one, bit for bit."""
    model, prompt = build(**KINDS[kind]), ids(1, length)
    greedy = list(model.stream(prompt, max_new_tokens=20))
    for limit in (0, -1, 1, 20):
        for end in [None, *(token.item() for token in greedy[4:5])]:
            for option in (
                {},
                {"temperature": 0.7},
                {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
            ):
                option = {"temperature": 0.0, "top_k": 0, "top_p": 1.0} | option
                seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
                most = min(limit, model.config.max_seq_len - length)
                steps = stream_rows(model, prompt, None, most, end, generator=seeds[0], **option)
                option |= {"max_new_tokens": limit, "eos_token_id": end, "generator": seeds[1]}
                expected = [token.tolist() for token in steps]
                assert [token.tolist() for token in model.stream(prompt, **option)] == expected
                assert len(expected) <= max(0, most)


class KeepsRows(Decoder):
    keeps_rows = True


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_without_waiting_prompts_generates_what_slots_do(kind):
    """The direct form against the general one: rows, positions and tokens, bit for bit."""
    model, random = build(**KINDS[kind]), np.random.default_rng(3)
    for n in range(40):
        prompts = [ids(1, int(size))[0].tolist() for size in random.integers(1, 40, n % 7)]
        limits = [int(limit) for limit in random.integers(-1, 12, len(prompts))]
        samples, end = 1 + n % 3, None if n % 4 == 0 else 5

        def sampler(logits, row, position):
            first = logits.topk(3).indices[torch.arange(len(row)), (row + position) % 3]
            return first.where((row * 7 + position) % 5 > 0, 5)

        results = []
        for make in (None, KeepsRows):  # the second one always goes through the slots
            model.make_decoder = make
            steps = generate_batch(model, prompts, limits, sampler, end, samples, len(prompts) or 1)
            results.append([[part.tolist() for part in step] for step in steps])
        waiting = [number for number, limit in enumerate(limits) if limit > 0]
        waiting.sort(key=lambda number: -len(prompts[number]))
        cache = KVCache(
            model.config, samples * len(waiting), 64, torch.device("cpu"), torch.float32
        )
        options = (sampler, end, samples)
        steps = generate_slots(Decoder(model, cache), prompts, limits, waiting, *options)
        results.append([[part.tolist() for part in step] for step in steps])
        assert results[0] == results[1] == results[2] and bool(results[0]) == bool(waiting)
        model.make_decoder = None


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(kind):
    """With the mask passed: else transformers takes every token 0 of a prompt for padding."""
    # Tied and random it would repeat its last token for ever.
    model = build(**KINDS[kind], tie_embeddings=False)
    reference = huggingface(model.config)
    reference.load_state_dict(model.state_dict(), strict=True)
    x = ids(3, 50)
    x[:, 5] = 0
    ours = []
    for options in ({}, {"repetition_penalty": 1.5}):
        length = dict(max_new_tokens=30, eos_token_id=None)
        fixed = dict(attention_mask=torch.ones_like(x), do_sample=False, pad_token_id=0)
        ours.append(model.generate(x, **length, **options))
        assert torch.equal(ours[-1], reference.generate(x, **length, **fixed, **options)[:, 50:])
    assert len(set(ours[1].flatten().tolist())) > 15  # they say something


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_generation_runs_in_half_precision(kind, dtype):
    model, prompts = build(**KINDS[kind]), [ids(1, 9), ids(1, 3)]
    with torch.autocast("cpu", dtype=dtype):
        assert model.generate(*left_padded(prompts), max_new_tokens=5).shape == (2, 5)
    model.to(dtype)
    assert model.generate(*left_padded(prompts), max_new_tokens=5, temperature=1.0).shape == (2, 5)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.0, -0.5])


def allowed_by_hand(temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability: the definition, written out without tensors."""
    ranked = sorted(range(len(LOGITS)), key=lambda token: -LOGITS[token])
    weights = {
        token: float(torch.exp(LOGITS[token] / temperature))
        for token in ranked[: top_k or len(ranked)]
    }
    total, kept, mass = sum(weights.values()), {}, 0.0
    for token, weight in weights.items():
        if mass < top_p:
            kept[token] = weight
        mass += weight / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "top_k, top_p", [(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.6), (0, 0.9), (4, 0.7), (99, 0.01)]
)
def test_samples_follow_the_distribution_computed_by_hand(temperature, top_k, top_p):
    n = 20_000
    drawn = sample(
        LOGITS.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0)
    )
    share = torch.bincount(drawn, minlength=len(LOGITS)) / n
    expected = allowed_by_hand(temperature, top_k, top_p)
    assert set(drawn.tolist()) <= set(expected)
    for token, probability in expected.items():
        assert abs(share[token].item() - probability) < 0.015


def test_temperature_zero_is_greedy_and_rows_are_filtered_each_by_itself():
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    assert sample(rows, 0.0, top_k=2, top_p=0.5).tolist() == [0, 7]
    assert sample(rows, 1.0, top_k=1).tolist() == [0, 7]
    assert sample(rows, 1.0, top_p=1e-9).tolist() == [0, 7]


def test_repetition_penalty_lowers_what_was_seen_and_nothing_else():
    """Against the rule: positive logits divided, negative multiplied, padding not counted."""
    model, penalty = build(), 1.7
    x, mask = left_padded([ids(1, 20), ids(1, 6)], filler=3)
    x[1, -6:] = torch.tensor([9, 8, 9, 7, 6, 5])  # not 3, which is the filler
    got = model.generate(x, mask, max_new_tokens=15, repetition_penalty=penalty)
    for row, length in enumerate((20, 6)):
        context = x[row, -length:].tolist()
        for token in got[row].tolist():
            logits = model(torch.tensor([context])).logits[0, -1].tolist()
            for seen in set(context):
                logits[seen] = (
                    logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
                )
            assert token == max(range(len(logits)), key=logits.__getitem__)
            context.append(token)


def test_the_same_generator_gives_the_same_tokens():
    model, x = build(), ids(2, 10)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            x, max_new_tokens=30, temperature=1.0, top_k=20, top_p=0.95, generator=generator
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# --------------------------------------------------------------------------------------------------
# Ends
# --------------------------------------------------------------------------------------------------


def test_a_row_that_ended_is_filled_with_eos_until_all_have():
    model, x = build(), ids(3, 10)
    free = model.generate(x, max_new_tokens=40)
    eos = free[0, 4].item()
    ends = [row.index(eos) if eos in row else None for row in free.tolist()]
    got = model.generate(x, max_new_tokens=40, eos_token_id=eos)
    for row, end in enumerate(ends):
        keep = got.size(1) if end is None else end + 1
        assert torch.equal(got[row, :keep], free[row, :keep])
        assert (got[row, keep:] == eos).all()
    if None not in ends:
        assert got.size(1) == max(ends) + 1
    alone = model.generate(x[:1], max_new_tokens=40, eos_token_id=eos)
    assert alone.size(1) == ends[0] + 1 and alone[0, -1] == eos


def test_generation_ends_when_the_context_is_full():
    model = build(max_seq_len=16)
    assert model.generate(ids(2, 10), max_new_tokens=100).shape == (2, 6)
    assert model.generate(ids(2, 16), max_new_tokens=100).shape == (2, 0)
    assert model.generate(ids(2, 10), max_new_tokens=0).shape == (2, 0)


def test_a_prompt_that_is_too_long_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="17 tokens.*max_seq_len 16"):
        build(max_seq_len=16).generate(ids(1, 17))
    with pytest.raises(ValueError, match=f"{TINY['vocab_size']} entries"):
        build().generate(torch.tensor([[TINY["vocab_size"]]]))


def test_stream_yields_what_generate_returns():
    model, (x, mask) = build(), left_padded([ids(1, 12), ids(1, 5)])
    for options in ({}, {"temperature": 0.9, "top_k": 10}):
        streamed = list(
            model.stream(
                x, mask, max_new_tokens=9, generator=torch.Generator().manual_seed(3), **options
            )
        )
        whole = model.generate(
            x, mask, max_new_tokens=9, generator=torch.Generator().manual_seed(3), **options
        )
        assert all(token.shape == (2,) for token in streamed)
        assert torch.equal(torch.stack(streamed, dim=1), whole)


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


class Parrot:
    """Stands in for a model: streams the given ids."""

    def __init__(self, reply: list[int]):
        self.reply, self.lm_head = reply, torch.nn.Linear(1, 1)

    def stream(self, input_ids, **sampling):
        yield from (torch.tensor([token]) for token in self.reply)


def test_streamed_text_never_holds_half_a_character(tokenizer):
    text = "naïve 你好, 𠮷野家 \U0001f469\u200d\U0001f680 end"
    # A token per byte: all are split.
    reply = [id for byte in text.encode() for id in single_byte(tokenizer, byte)]
    assert len(reply) == len(text.encode())
    eos = tokenizer.eos_token_id
    pieces = list(
        stream_text(Parrot([*reply, eos, *reply]), tokenizer.decode, [5], eos_token_id=eos)
    )
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20  # it did stream


def test_streamed_text_ends_with_what_is_left_of_a_cut_character(tokenizer):
    cut = [id for byte in "ab你".encode()[:-1] for id in single_byte(tokenizer, byte)]
    assert "".join(stream_text(Parrot(cut), tokenizer.decode, [5])) == "ab\ufffd"


def single_byte(tokenizer, byte: int) -> list[int]:
    """The id of the token that is this one byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = ByteLevel.alphabet()
    assert len(alphabet) == 256
    # GPT-2's byte to character table.
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]
    others = [value for value in range(256) if value not in printable]
    character = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return [tokenizer.convert_tokens_to_ids(character)]
