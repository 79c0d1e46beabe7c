"""What distillation needs of the models: a student and a teacher whose logits exist for a chunk of
tokens at a time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.lm import MiniMindLM
from model.weights import load_model, newest_weights


class LateHead(nn.Linear):
    """A head that hands the hidden states on, so that a model ends with them; others multiply with
    its weight later."""

    def __init__(self, head: nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the Parameter itself, which the embedding may share

    def forward(self, x: Tensor) -> Tensor:
        return x


class Student(MiniMindLM):
    """MiniMindLM whose forward pass ends in the losses of distillation; its names and weights are
    the same.

    Args:
        teacher: from `load_teacher`; is not a part of the student: nothing wraps, moves, trains or
        saves it. kl, temperature: see `divergence`.
        chunk: tokens whose logits exist at once, in the forward pass and once more in the backward
        pass.
    """

    def __init__(
        self,
        config,
        teacher,
        kl: str,
        temperature: float,
        gradient_checkpointing=0,
        chunk: int = 512,
    ):
        super().__init__(config, gradient_checkpointing)
        self.lm_head = LateHead(self.lm_head)
        self.distillation, self.chunk = (
            (teacher, kl, temperature),
            chunk,
        )  # in a tuple a module is no submodule

    def forward(
        self, input_ids: Tensor, doc_lens: list[int], at: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        """Cross-entropy and divergence from the teacher, each summed over some tokens, and the
        auxiliary loss.

        Both models run up to their last hidden states. Logits are made of those for a chunk of
        tokens at a time and dropped; the backward pass makes them once more.

        Args:
            input_ids, doc_lens: as in MiniMindLM.
            at: (K,) int64, positions in the row; there may be none.
            targets: (K,) int64, the tokens that follow there.
        """
        teacher, *how = self.distillation
        with torch.no_grad():
            theirs = teacher(
                input_ids, doc_lens=doc_lens, logits_at=at
            ).logits  # (K, the teacher's dim)
        out = super().forward(input_ids, doc_lens=doc_lens, logits_at=at)

        def losses(own: Tensor, theirs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(own, self.lm_head.weight).float()  # (k, vocab)
            ce = F.cross_entropy(logits, targets, reduction="sum")
            return ce, divergence(logits, F.linear(theirs, teacher.lm_head.weight), *how).sum()

        sums = []
        for begin in range(
            0, max(1, len(at)), self.chunk
        ):  # without a token, too: every rank exchanges
            parts = [values[begin : begin + self.chunk] for values in (out.logits, theirs, targets)]
            sums.append(checkpoint(losses, *parts, use_reentrant=False, preserve_rng_state=False))
        return *map(sum, zip(*sums, strict=True)), out.aux_loss


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """How far the student's distribution is from the teacher's, token by token, times
    temperature^2.

    With P the teacher and Q the student: 'forward' KL(P, Q), 'reverse' KL(Q, P), 'js' (KL(P, M) +
    KL(Q, M)) / 2 where M = (P + Q) / 2. Gradients through softmax(logits / T) shrink as 1 / T^2;
    the factor T^2 undoes that, so that a weight beside the cross-entropy means the same at every
    temperature.

    Args: student, teacher: logits (k, vocab), in any dtype. Returns: (k,) float32.
    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2; Agarwal
    et al., On-Policy Distillation (GKD, 2024), section 2, generalised JSD with beta = 1/2.
    """
    log_q, log_p = (
        (logits.float() / temperature).log_softmax(dim=-1) for logits in (student, teacher)
    )
    if kind == "forward":
        value = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    elif kind == "reverse":
        value = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=-1) / 2
    return value * temperature**2


def load_teacher(weight: str, out_dir: str, vocab_size: int, max_seq_len: int) -> MiniMindLM:
    """The teacher: frozen, in evaluation mode, its forward pass ends with hidden states.

    Args:
        weight, out_dir: as for `newest_weights`.
        vocab_size, max_seq_len: of the student.

    Raises:
        ValueError: there is none, or teacher and student do not match.
    """
    path = newest_weights(weight, out_dir, "--teacher_weight")
    with torch.random.fork_rng(devices=[]):  # the student starts as it would without a teacher
        teacher = load_model(path)
    if teacher.config.vocab_size != vocab_size:
        sizes = (
            f"a vocabulary of {teacher.config.vocab_size}, the student's tokenizer has {vocab_size}"
        )
        raise ValueError(
            f"--teacher_weight {path}: it has {sizes}; both must have the same tokenizer"
        )
    if teacher.config.max_seq_len < max_seq_len:
        raise ValueError(
            f"--max_seq_len {max_seq_len}: the context of the teacher is"
            f" {teacher.config.max_seq_len}"
        )
    teacher.lm_head = LateHead(teacher.lm_head)
    return teacher.requires_grad_(False)
