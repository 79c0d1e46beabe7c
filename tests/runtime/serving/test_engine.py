"""Continuous batching: what a request gets is what it would get alone."""

import queue

import pytest
import torch
from test_model import KINDS, MOE, TINY, build

import kernels
from model.generate_batch import generate_batch
from model.kv_cache import Decoder, KVCache
from model.sampling import make_sampler
from runtime.device_map import keep_layout_near
from runtime.serving.engine import Engine, EngineThread, Output, QueueFull, Request
from runtime.serving.prompt_pieces import Piece, read_pieces
from runtime.serving.sampling import Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)
END = 1


def make_model(kind: str = "dense", fast: bool = False):
    model = build(**({**TINY, **MOE} if kind == "moe" else KINDS.get(kind, {})))
    if fast:
        kernels.apply(model, CPU, torch.float32)
    return model.eval()


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY["vocab_size"], (length,), generator=generator).tolist()


class Client:
    """Submits requests and keeps what comes back."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def ask(self, ids: list[int], new: int, sampling: Sampling = GREEDY, ends=(), **options):
        outputs: list[Output] = []
        request = Request(ids, new, frozenset(ends), sampling, outputs.append, **options)
        generation = self.engine.submit(request)
        generation.outputs = outputs
        return generation


def run_engines(*engines: Engine) -> EngineThread:
    thread = EngineThread()
    thread.start(list(engines))
    return thread


def ids_of(generation) -> list[int]:
    return [token.id for output in generation.outputs for token in output.tokens]


def reason(generation) -> str | None:
    return generation.outputs[-1].finish_reason if generation.outputs else None


def finish(engine: Engine) -> int:
    """Step until nobody waits; returns how many steps that took."""
    for steps in range(1, 1000):
        if not engine.step():
            return steps
    raise AssertionError("requests that never end")


def alone(model, ids: list[int], new: int, end: int | None = None) -> list[int]:
    sampler = make_sampler([ids], model.config.vocab_size, CPU)
    tokens = [int(t) for _, _, t in generate_batch(model, [ids], [new], sampler, end)]
    return tokens[:-1] if tokens[-1] == end else tokens


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("kind", [*KINDS, "moe"])
@torch.no_grad()
def test_pieces_of_prompts_give_the_logits_of_whole_ones(kind, fast):
    """Pieces of several prompts in one pass, some behind what is there, some from the start."""
    model = make_model(kind, fast)
    prompts = [prompt(n, length) for n, length in enumerate((40, 7, 33, 1))]
    cache = KVCache(model.config, 6, 60, CPU, torch.float32)
    cache.kv.fill_(1.0)  # what is not read must not matter
    decoder = (model.make_decoder or Decoder)(model, cache)
    slots, held, logits = [5, 0, 3, 2], [0] * 4, {}
    for lengths in ((10, 0, 33, 0), (1, 7, 0, 1), (29, 0, 0, 0)):
        parts = [n for n in range(4) if lengths[n]]
        pieces = [
            Piece(slots[n], held[n], prompts[n][held[n] : held[n] + lengths[n]]) for n in parts
        ]
        for n, row in zip(parts, read_pieces(decoder, pieces), strict=True):
            held[n] += lengths[n]
            logits[n] = row
    for n, ids in enumerate(prompts):
        exact = model(torch.tensor([ids])).logits[0, -1]
        assert (logits[n] - exact).abs().max() <= 1e-5 * exact.abs().max()


class KeepsRows(Decoder):
    """A decoder that computes with all rows in each step, as the recorded one of a GPU does."""

    keeps_rows = True


@pytest.mark.parametrize("decoder", ["plain", "kernels", "keeps rows"])
def test_greedy_replies_do_not_depend_on_who_else_is_there(decoder):
    """Requests that join one by one, leave at different times, and share slots after each other."""
    model = make_model(fast=decoder == "kernels")
    if decoder == "keeps rows":
        model.make_decoder = KeepsRows
    engine = Engine(model, 3, 60, 20)
    client, generations = Client(engine), []
    for n in range(12):
        generations.append(client.ask(prompt(n, 3 + 5 * (n % 4)), 5 + 3 * (n % 5)))
        engine.step()
    finish(engine)
    for n, generation in enumerate(generations):
        assert ids_of(generation) == alone(model, prompt(n, 3 + 5 * (n % 4)), 5 + 3 * (n % 5))
        assert reason(generation) == "length" and generation.finished
    assert engine.running == 0 and engine.submitted == 0
    assert engine.generated_tokens == sum(len(ids_of(g)) for g in generations)


def test_an_end_token_ends_a_reply_and_is_not_delivered():
    model = make_model()
    ids = prompt(0, 8)
    end = alone(model, ids, 10)[4]
    wanted = alone(model, ids, 10)[: alone(model, ids, 10).index(end)]
    engine = Engine(model, 2, 60, 20)
    generation = Client(engine).ask(ids, 10, ends=[end])
    finish(engine)
    assert ids_of(generation) == wanted and reason(generation) == "stop"


def test_a_reply_may_fill_the_context():
    model = make_model()
    engine = Engine(model, 2, 30, 20)
    first, second = (Client(engine).ask(prompt(n, 20), 10) for n in range(2))
    finish(engine)
    assert ids_of(first) == alone(model, prompt(0, 20), 10)
    assert ids_of(second) == alone(model, prompt(1, 20), 10)


# --------------------------------------------------------------------------------------------------
# Shared prefixes
# --------------------------------------------------------------------------------------------------


def count_read(engine: Engine, monkeypatch) -> list[int]:
    """The number of tokens of prompts in each pass, from here on."""
    from runtime.serving import engine as module

    counts, read = [], read_pieces

    def counting(decoder, pieces):
        counts.append(sum(len(piece.ids) for piece in pieces))
        return read(decoder, pieces)

    monkeypatch.setattr(module, "read_pieces", counting)
    return counts


def test_a_prompt_that_several_ask_is_read_once(monkeypatch):
    model = make_model()
    engine, ids = Engine(model, 8, 60, 20), prompt(0, 40)
    counts = count_read(engine, monkeypatch)
    generations = [Client(engine).ask(ids, 4) for _ in range(5)]
    finish(engine)
    assert sum(counts) == 40 + 4  # the others read the last token, which gives the logits
    assert [g.cached_tokens for g in generations] == [0, 39, 39, 39, 39]
    assert all(ids_of(g) == alone(model, ids, 4) for g in generations)
    assert (engine.prompt_tokens, engine.cached_tokens) == (200, 156)


def test_a_chat_goes_on_in_its_slot_and_a_system_prompt_is_copied(monkeypatch):
    model = make_model()
    engine, system = Engine(model, 4, 90, 20), prompt(0, 30)
    client, counts = Client(engine), count_read(engine, monkeypatch)
    first = client.ask([*system, *prompt(1, 5)], 6)
    finish(engine)
    said = [*system, *prompt(1, 5), *ids_of(first)]
    other = client.ask([*system, *prompt(2, 7)], 6)
    finish(engine)
    assert other.cached_tokens == 30
    second = client.ask([*said, *prompt(3, 4)], 6)
    finish(engine)
    assert second.cached_tokens == len(said) - 1  # the last token of a reply was never read
    assert sum(counts) == 35 + 7 + 5
    assert ids_of(other) == alone(model, [*system, *prompt(2, 7)], 6)
    assert ids_of(second) == alone(model, [*said, *prompt(3, 4)], 6)


def test_what_a_running_request_holds_is_shared_too():
    model = make_model()
    engine, ids = Engine(model, 2, 60, 20), prompt(0, 20)
    running = Client(engine).ask(ids, 20)
    for _ in range(5):
        engine.step()
    later = Client(engine).ask([*ids, *ids_of(running)[:3], 7], 5)
    finish(engine)
    assert later.cached_tokens == 23
    assert ids_of(running) == alone(model, ids, 20)
    assert ids_of(later) == alone(model, [*ids, *ids_of(running)[:3], 7], 5)


def test_a_long_prompt_comes_in_pieces_while_others_go_on(monkeypatch):
    model = make_model()
    engine = Engine(model, 3, 90, 20)
    monkeypatch.setattr(engine, "reading_tokens", lambda _, streaming: 10 if streaming else 100)
    counts = count_read(engine, monkeypatch)
    stream = Client(engine).ask(prompt(0, 4), 30)
    engine.step()
    before = len(ids_of(stream))
    late = Client(engine).ask(prompt(1, 64), 5)
    while not late.outputs:
        engine.step()
    assert counts == [4, 10, 10, 10, 10, 10, 10, 4]
    assert len(ids_of(stream)) == before + 7  # one with each piece
    finish(engine)
    assert ids_of(late) == alone(model, prompt(1, 64), 5)
    assert ids_of(stream) == alone(model, prompt(0, 4), 30)


# --------------------------------------------------------------------------------------------------
# Leaving, waiting, faults
# --------------------------------------------------------------------------------------------------


def test_a_request_that_is_cancelled_frees_its_slot_before_the_next_step():
    model = make_model()
    engine = Engine(model, 1, 60, 20)
    first, second, third = (Client(engine).ask(prompt(n, 5), 10) for n in range(3))
    engine.step()
    engine.cancel(first)
    engine.cancel(third)
    engine.step()
    assert reason(first) == reason(third) == "cancelled" and not ids_of(third)
    assert ids_of(second) and engine.running == 1 and not engine.waiting
    engine.cancel(first)  # again: nothing
    finish(engine)
    assert len(first.outputs) == 1 + len(ids_of(first)) and len(third.outputs) == 1
    assert ids_of(second) == alone(model, prompt(1, 5), 10) and engine.submitted == 0


def test_no_more_wait_than_may():
    engine = Engine(make_model(), 2, 60, 3)
    generations = [Client(engine).ask(prompt(n, 5), 3) for n in range(5)]
    with pytest.raises(QueueFull):
        Client(engine).ask(prompt(6, 5), 3)
    engine.step()
    with pytest.raises(QueueFull):
        Client(engine).ask(prompt(6, 5), 3)
    finish(engine)
    assert all(reason(g) == "length" for g in generations)
    Client(engine).ask(prompt(6, 5), 3)
    assert finish(engine)


def test_a_fault_in_a_step_ends_those_who_are_there_and_nobody_else(monkeypatch, capsys):
    model = make_model()
    engine = Engine(model, 2, 60, 20)
    generations, done = [Client(engine).ask(prompt(n, 5), 3) for n in range(3)], queue.SimpleQueue()
    step = engine.decoder.step

    def fail(token):
        engine.decoder.step = step
        raise RuntimeError("out of memory\nand more")

    engine.decoder.step = fail
    thread = run_engines(engine)
    request = Request(prompt(9, 5), 3, frozenset(), GREEDY, lambda output: done.put(output))
    while not all(g.finished for g in generations):
        pass
    assert [reason(g) for g in generations] == ["error"] * 3
    assert generations[0].outputs[-1].error == "RuntimeError: out of memory"
    engine.submit(request)
    outputs = [done.get(timeout=60) for _ in range(3)]
    thread.close()
    tokens = [token.id for output in outputs for token in output.tokens]
    assert tokens == alone(model, prompt(9, 5), 3)
    assert "out of memory" in capsys.readouterr().err


def test_two_models_take_turns_in_one_thread():
    models = [make_model(), make_model("moe")]
    engines = [Engine(model, 2, 60, 20) for model in models]
    outputs = queue.SimpleQueue()
    thread = run_engines(*engines)
    for number, engine in enumerate(engines):
        engine.submit(
            Request(
                prompt(number, 6),
                5,
                frozenset(),
                GREEDY,
                lambda output, number=number: outputs.put((number, output)),
            )
        )
    tokens = {0: [], 1: []}
    for _ in range(10):
        number, output = outputs.get(timeout=60)
        tokens[number] += [token.id for token in output.tokens]
    thread.close()
    assert tokens == {n: alone(models[n], prompt(n, 6), 5) for n in range(2)}


def test_closing_ends_what_runs():
    engine, outputs = Engine(make_model(), 1, 60, 20), queue.SimpleQueue()
    thread = run_engines(engine)
    for n in range(2):
        engine.submit(Request(prompt(n, 5), 50, frozenset(), GREEDY, outputs.put))
    outputs.get(timeout=60)
    thread.close()
    reasons = []
    while not outputs.empty():
        reasons.append(outputs.get().finish_reason)
    assert sorted(r for r in reasons if r) in (["error"] * 2, ["error", "length"], ["length"] * 2)
    assert engine.running == 0


def test_a_model_whose_blocks_lie_on_several_devices():
    """Two names of the CPU stand for two GPUs."""
    whole, model = make_model(), make_model()
    model.load_state_dict(whole.state_dict())
    keep_layout_near(model, {"": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu:0"})
    engine, ids = Engine(model, 3, 60, 20), prompt(0, 30)
    generations = [Client(engine).ask([*ids, n], 6) for n in range(3, 6)]
    finish(engine)
    assert [g.cached_tokens for g in generations] == [0, 30, 30]
    for n, generation in zip(range(3, 6), generations, strict=True):
        assert ids_of(generation) == alone(whole, [*ids, n], 6)


class Broken:
    """A constraint that fails at its third token."""

    def __init__(self):
        self.error, self.tokens = "", 0

    def allowed(self) -> torch.Tensor:
        if self.tokens == 2:
            self.error = "too many items"
        return torch.ones(TINY["vocab_size"], dtype=torch.bool)

    def advance(self, token: int) -> None:
        self.tokens += 1


def test_a_constraint_that_fails_ends_its_own_request_with_an_error():
    model = make_model()
    engine = Engine(model, 2, 60, 20)
    broken = Client(engine).ask(prompt(0, 5), 10, constraint=Broken())
    other = Client(engine).ask(prompt(1, 5), 10)
    finish(engine)
    assert (
        broken.outputs[-1] == Output([], "refused", "too many items") and len(ids_of(broken)) == 2
    )
    assert ids_of(other) == alone(model, prompt(1, 5), 10) and reason(other) == "length"


def test_a_fault_while_a_slot_is_taken_loses_no_request(monkeypatch):
    model = make_model()
    engine, ids = Engine(model, 3, 60, 20), prompt(0, 30)
    first = Client(engine).ask(ids, 3)
    finish(engine)
    second, third = (Client(engine).ask([*ids, n], 3) for n in (3, 4))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "layers", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.fail("a fault")
    assert [reason(g) for g in (first, second, third)] == ["length", "error", "error"]
    assert (engine.submitted, engine.running, len(engine.waiting)) == (0, 0, 0)
    later = Client(engine).ask([*ids, 3], 3)
    finish(engine)
    assert ids_of(later) == alone(model, [*ids, 3], 3)
