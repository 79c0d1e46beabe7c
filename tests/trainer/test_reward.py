"""Reward model: scores of a document alone, Bradley-Terry, any number of processes, refusals."""

import json
import math

import pytest
import torch
from conftest import curve
from stage_runs import pair_runs, same_bits, same_metrics

from model.lm import LMConfig, MiniMindLM
from model.reward import RewardConfig, RewardModel, load_reward_model
from model.weights import load_model, load_weights

SHAPE = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 99,
    "max_seq_len": 64,
}
KINDS = {"dense": {}, "moe": {"use_moe": True}}


def reward_model(kind: str = "dense", **options) -> RewardModel:
    model = RewardModel(RewardConfig(**SHAPE, **KINDS[kind], **options)).eval()
    torch.nn.init.normal_(model.score.weight, std=0.1)
    return model


@pytest.fixture
def documents() -> list[torch.Tensor]:
    """None of fewer than four tokens: products of so few rows are rounded in another way."""
    return [torch.randint(0, 99, (n,)) for n in (5, 40, 17, 64, 23, 4)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_change_with_its_neighbours(kind, documents):
    model = reward_model(kind)
    alone = torch.cat([model(doc.view(1, -1), doc_lens=[len(doc)]).scores for doc in documents])
    assert alone.dtype == torch.float32 and alone.unique().numel() == len(documents)
    lens = [len(doc) for doc in documents]
    row = torch.cat(documents).view(1, -1)
    packed = model(row, doc_lens=lens).scores
    torch.testing.assert_close(
        packed, alone, atol=1e-6, rtol=0
    )  # products of fewer rows may be rounded in another way
    others = torch.cat([documents[0], *(doc.flip(0) for doc in documents[1:])]).view(1, -1)
    assert model(others, doc_lens=lens).scores[0] == packed[0]
    padded = torch.cat([row, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, doc_lens=lens).scores, alone, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_does_not_change_with_padding(kind, side, documents):
    model, ids = reward_model(kind), torch.zeros(len(documents), 64, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, doc in enumerate(documents):
        place = slice(0, len(doc)) if side == "right" else slice(64 - len(doc), 64)
        ids[row, place], mask[row, place] = doc, 1
    alone = torch.cat([model(doc.view(1, -1)).scores for doc in documents])
    torch.testing.assert_close(model(ids, mask).scores, alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_values_at_any_token(documents):
    """What a critic is asked for: the last one is the score of the document so far."""
    model, doc = reward_model(), documents[1]
    values = model(doc.view(1, -1), doc_lens=[40], values_at=torch.arange(40)).scores
    prefixes = torch.cat([model(doc[: n + 1].view(1, -1)).scores for n in (7, 20, 39)])
    torch.testing.assert_close(values[[7, 20, 39]], prefixes, atol=1e-6, rtol=0)
    assert model(doc.view(1, -1), doc_lens=[], values_at=torch.arange(0)).scores.shape == (0,)


@torch.no_grad()
def test_names_and_scores_are_those_of_transformers(documents):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    ours = reward_model()
    c = ours.config
    theirs = Qwen3ForSequenceClassification(
        Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, num_labels=1,
            rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            max_position_embeddings=c.max_seq_len, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    for doc in documents:
        ids = doc.clamp_min(1).view(1, -1)  # 0 is their padding
        torch.testing.assert_close(ours(ids).scores, theirs(ids).logits[0], atol=1e-5, rtol=0)


def save(model, path) -> str:
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(model.config.to_json())
    return str(path)


def test_files_of_reward_and_language_models_are_told_apart(tmp_path):
    reward, lm = reward_model(), MiniMindLM(LMConfig(**SHAPE))
    paths = {name: tmp_path / f"{name}.pth" for name in ("reward", "lm")}
    save(reward, paths["reward"]), save(lm, paths["lm"])
    assert load_reward_model(paths["reward"]).state_dict().keys() == reward.state_dict().keys()
    with pytest.raises(ValueError, match="lm.pth: a language model, not a reward model"):
        load_reward_model(paths["lm"])
    with pytest.raises(
        ValueError, match="reward.pth: a reward model, which scores texts but writes none"
    ):
        load_model(paths["reward"])
    with pytest.raises(ValueError, match="reward.pth: a reward model, a language model is wanted"):
        load_weights(lm, paths["reward"])
    with pytest.raises(ValueError, match="absent.pth: no such weights file"):
        load_reward_model(tmp_path / "absent.pth")
    smaller = RewardModel(RewardConfig(**SHAPE | {"dim": 32}))
    torch.save(smaller.state_dict(), paths["reward"])
    with pytest.raises(
        ValueError, match="made for a model of another shape: model.embed_tokens.weight is .99, 32."
    ):
        load_reward_model(paths["reward"])
    torch.save(lm.state_dict(), paths["reward"])  # beside the configuration of a reward model
    with pytest.raises(ValueError, match="the file has no score.weight"):
        load_reward_model(paths["reward"])


def test_a_reward_model_starts_from_either_kind(tmp_path):
    lm, old = MiniMindLM(LMConfig(**SHAPE)), reward_model()
    for source, head in ((lm, torch.zeros(1, 64)), (old, old.score.weight)):
        model = RewardModel(RewardConfig(**SHAPE))
        load_weights(model, save(source, tmp_path / "a.pth"), new_head=True)
        assert torch.equal(model.score.weight, head)
        for name, value in model.model.state_dict().items():
            assert torch.equal(value, source.model.state_dict()[name]), name


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

STEPS = 20


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    # At 3e-3 the ninth step meets a tie of the router, and layouts part by 1e-5.
    return pair_runs("reward", tmp_path_factory.mktemp("reward"), STEPS, "--learning_rate=2.5e-3")


@pytest.fixture(scope="module")
def alone(train):
    return train("alone", "--use_moe=1")


def test_it_learns_and_logs(alone):
    lines = curve(alone)
    first, last, evaluation = lines[0], lines[-2], lines[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0.0
    assert last["step"] == STEPS and last["loss"] < 0.3 and last["accuracy"] > 0.8
    assert (
        evaluation["eval_accuracy"] > 0.8
        and evaluation["eval_margin"] > 0
        and evaluation["eval_loss"] < 0.6
    )
    needed = (
        "epoch loss aux_loss lr grad_norm tokens supervised_tokens tokens_per_sec accuracy margin"
        " pairs"
    )
    assert set(needed.split()) <= first.keys()
    assert json.loads(alone.with_suffix(".json").read_text())["head"] == "score"


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_train_as_one(train, alone, strategy):
    """An odd number of rows in some windows: a rank then takes part without a pair."""
    run = train(strategy, "--use_moe=1", f"--strategy={strategy}", nproc=2)
    same_metrics(run, alone, rel=1e-5, abs=1e-7)
    ours, wanted = load_reward_model(f"{run}.pth"), load_reward_model(f"{alone}.pth")
    for (name, value), other in zip(
        ours.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        assert (value - other).norm() <= 1e-4 * other.norm(), name


def test_three_resumes_change_nothing(train):
    """The second and third one go on from what the resume before them has saved."""
    flags = ("--dropout=0.1", "--save_total_limit=9")
    source = whole = train("whole", *flags)
    for step in (5, 10, 15):
        source = train("resumed", *flags, f"--resume={source / 'checkpoints' / f'step_{step:08d}'}")
    same_bits(source, whole, first=5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(train, dtype):
    lines = curve(train(dtype, f"--dtype={dtype}", "--max_steps=8"))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(
        math.isfinite(line[name])
        for line in lines
        if "loss" in line
        for name in ("loss", "grad_norm")
    )
    assert lines[7]["loss"] < 0.6
