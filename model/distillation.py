"""A student and a teacher whose logits exist for a chunk of tokens at a time.

The losses themselves stand in trainer/train_distillation.py.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.lm import LMConfig, MiniMindLM
from model.weights import read_config


class LateHead(nn.Linear):
    """A head that returns the hidden states: a model ends with them, its weight is used later."""

    def __init__(self, head: nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the Parameter itself, which the embedding may share

    def forward(self, x: Tensor) -> Tensor:
        return x


class Student(MiniMindLM):
    """MiniMindLM whose forward pass ends in losses of distillation; names and weights are equal.

    Args:
        teacher: of `make_teacher`, frozen; is not a part of the student: what wraps, moves, trains
            or saves that leaves it alone. Ranks may share it, which call it equally often.
        losses_of: (student's logits (k, vocab) float32, teacher's logits, targets (k,)) -> scalars,
            each a loss summed over the k tokens.
        chunk: tokens whose logits exist at once, in the forward pass and once more in the backward
            pass.
    """

    def __init__(
        self,
        config,
        teacher: MiniMindLM,
        losses_of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        gradient_checkpointing: int = 0,
        chunk: int = 512,
    ):
        super().__init__(config, gradient_checkpointing)
        self.lm_head = LateHead(self.lm_head)
        self.teacher = (teacher,)  # in a tuple a module is no submodule
        self.losses_of = losses_of
        self.chunk = chunk

    def forward(
        self, input_ids: Tensor, doc_lens: list[int], at: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        """The losses, each summed over some tokens, and the auxiliary loss.

        Both models run up to their last hidden states. Logits are made of those for a chunk of
        tokens at a time and dropped; the backward pass makes them once more.

        Args:
            input_ids, doc_lens: as in MiniMindLM.
            at: (K,) int64, positions in the row; there may be none.
            targets: (K,) int64, the tokens that follow there.
        """
        (teacher,) = self.teacher
        with torch.no_grad():  # (K, the teacher's dim)
            teacher_states = teacher(input_ids, doc_lens=doc_lens, logits_at=at).logits
        teacher_head = teacher.lm_head.weight
        if hasattr(teacher_head, "full_tensor"):  # shared: whole until the backward pass is done
            teacher_head = teacher_head.full_tensor()
        out = super().forward(input_ids, doc_lens=doc_lens, logits_at=at)

        def losses(states: Tensor, teacher_states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            logits = F.linear(states, self.lm_head.weight).float()  # (k, vocab)
            teacher_logits = F.linear(teacher_states, teacher_head)
            return self.losses_of(logits, teacher_logits, targets)

        sums = []
        # At least one chunk: without a token, too, every rank exchanges gradients
        for begin in range(0, max(1, len(at)), self.chunk):
            chunk = slice(begin, begin + self.chunk)
            parts = (out.logits[chunk], teacher_states[chunk], targets[chunk])
            sums.append(checkpoint(losses, *parts, use_reentrant=False, preserve_rng_state=False))
        return *map(sum, zip(*sums, strict=True)), out.aux_loss


def read_teacher_config(path: Path, vocab_size: int, max_seq_len: int) -> LMConfig:
    """The shape of the teacher.

    Args:
        path: its weights.
        vocab_size, max_seq_len: of the student.

    Raises:
        ValueError: it has none, or teacher and student do not match.
    """
    config = read_config(path)
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"--teacher_weight {path}: it has a vocabulary of {config.vocab_size}, the"
            f" student's tokenizer has {vocab_size}; both must have the same tokenizer"
        )
    if config.max_seq_len < max_seq_len:
        raise ValueError(
            f"--max_seq_len {max_seq_len}: the context of the teacher is {config.max_seq_len}"
        )
    return config


def make_teacher(config: LMConfig) -> MiniMindLM:
    """A model whose forward pass ends with hidden states: a teacher's, still without its values."""
    teacher = MiniMindLM(config)
    teacher.lm_head = LateHead(teacher.lm_head)
    return teacher
