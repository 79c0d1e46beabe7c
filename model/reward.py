"""RewardModel: a decoder whose head gives numbers: a reward, or a critic's values.

Parameter names and scores are those of transformers' `Qwen3ForSequenceClassification` with one
label.
"""

import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.lm import LMConfig, MiniMindLM
from model.meta_device import on_meta_device
from model.weights import config_from_json, load_weights


@dataclass
class RewardConfig(LMConfig):
    """Shape of a reward model; its JSON has `head`, which no language model's has."""

    tie_embeddings: bool = False  # there is no language head that the embedding could be
    head: str = "score"

    @classmethod
    def of(cls, config: LMConfig) -> "RewardConfig":
        """That of a reward model with the decoder of a language model."""
        return cls(**asdict(config) | {"tie_embeddings": False})


class RewardOutput(NamedTuple):  # a tuple: DDP finds the tensors in it
    scores: Tensor  # (K,) float32
    aux_loss: Tensor  # scalar float32: aux_loss_alpha x load-balancing loss; 0 for a dense model


class ScoreHead(nn.Linear):
    """Scores of x (K, dim), (K,) float32: rewards differ by less than bfloat16 resolves.

    Each row is a product and a sum of its own: a matrix product would round it by how many rows
    there are.
    """

    def __init__(self, dim: int):
        super().__init__(dim, 1, bias=False)
        nn.init.zeros_(self.weight)  # every text has the score 0 at first, a pair the loss ln 2

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() * self.weight.float()).sum(dim=-1)


class RewardModel(MiniMindLM):
    """A score for each document, at its last token, or a value for each of any tokens.

    The score of a document does not depend on what else is in the row. Give it conversations up to
    and including the end-of-turn token of the answer, as training does (there X ends with it).
    """

    def __init__(self, config: LMConfig, gradient_checkpointing: int = 0):
        super().__init__(config, gradient_checkpointing)
        self.lm_head = nn.Identity()  # the forward pass below ends with hidden states
        self.score = ScoreHead(config.dim)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        doc_lens: list[int] | None = None,
        values_at: Tensor | None = None,
    ) -> RewardOutput:
        """Scores of documents, or values at given tokens.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) 0/1; 0 marks padding, on either side.
            doc_lens: lengths of the documents packed into the one row (B = 1); tokens behind them
                are padding.
            values_at: (K,) int64, positions in the flattened (B * T); default: the last token of
                each document, or without doc_lens of each row. An empty one is fine: no scores.

        Raises:
            ValueError: a document longer than max_seq_len; a token id outside the vocabulary.
        """
        if values_at is None:
            values_at = last_tokens(input_ids, attention_mask, doc_lens)
        out = super().forward(input_ids, attention_mask, doc_lens, values_at)
        return RewardOutput(self.score(out.logits), out.aux_loss)


class ActorCritic(nn.Module):
    """A policy and its critic as one module: one strategy, one optimizer, one checkpoint."""

    def __init__(self, actor: MiniMindLM, critic: RewardModel):
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, X: Tensor, doc_lens: list[int], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (K, vocab) and values (K,) at positions `at` of a packed row X; auxiliary loss."""
        out = self.actor(X, doc_lens=doc_lens, logits_at=at)
        valued = self.critic(X, doc_lens=doc_lens, values_at=at)
        return out.logits, valued.scores, out.aux_loss + valued.aux_loss


def last_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, doc_lens: list[int] | None
) -> Tensor:
    """Positions of the last token of each document, or row, in the flattened input, (K,) int64."""
    (B, T), device = input_ids.shape, input_ids.device
    if doc_lens is not None:
        return torch.tensor(
            [end - 1 for end in accumulate(doc_lens)], dtype=torch.int64, device=device
        )
    last = torch.full((B,), T - 1, device=device)
    if attention_mask is not None:
        last = (attention_mask.bool() * torch.arange(T, device=device)).amax(dim=1)
    return torch.arange(B, device=device) * T + last


def load_reward_model(path: str | Path) -> RewardModel:
    """The reward model in a weights file, on the CPU, float32, in evaluation mode.

    Raises:
        ValueError: see `read_reward_config`, or the two files do not fit.
    """
    with on_meta_device():
        model = RewardModel(read_reward_config(path))
    load_weights(model, path)
    return model.eval()


def read_reward_config(path: str | Path) -> RewardConfig:
    """The shape of the reward model in a weights file.

    Raises:
        ValueError: there is none, or it is a language model.
    """
    path = Path(path)
    config_path = path.with_suffix(".json")
    faults = {path: "no such weights file", config_path: "missing; it holds the model's shape"}
    for needed, fault in faults.items():
        if not needed.is_file():
            advice = "trainer/train_reward.py writes a reward model, .pth and .json"
            raise ValueError(f"{needed}: {fault}; {advice}")
    try:
        is_reward = json.loads(config_path.read_text(encoding="utf-8")).get("head") == "score"
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config_path}: not a model configuration ({error})") from None
    if not is_reward:
        fault = "a language model, not a reward model"
        raise ValueError(f"{path}: {fault}; trainer/train_reward.py makes one")
    return RewardConfig.of(config_from_json(config_path, leave_out="head"))
