"""Losses on preference pairs: pure functions of what models say about the two answers to a prompt.

All tensors are (P,) float32, an entry per pair: log-probabilities of whole answers (sums over their
tokens), and their lengths in tokens. Each loss is returned with the rewards that it implies for the
two answers, without gradients.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Losses = tuple[Tensor, Tensor, Tensor]  # losses, rewards of chosen, rewards of rejected: (P,) each
METRICS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


def summed(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(5,) float32, METRICS summed over the pairs: only the loss has gradients.

    Args: losses, and the rewards of the answers, (P,) each. A pair counts as right where chosen has
    the higher reward.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    found = (losses, (chosen > rejected).float(), chosen - rejected, chosen, rejected)
    return torch.stack([values.sum() for values in found])


def answer_logps(
    token_losses: Tensor, loss_mask: Tensor, doc_lens: list[int]
) -> tuple[Tensor, Tensor]:
    """The log-probability of each answer, and its length in tokens: (P, 2) float32 each, chosen and
    rejected.

    Args:
        token_losses: (K,) -log p of the supervised tokens.
        loss_mask: (1, N) on the CPU, with K ones.
        doc_lens: [chosen 1, rejected 1, chosen 2, ...]; [] gives shapes (0, 2) that gradients still
        flow through.
    """
    sizes = [int(part.sum()) for part in loss_mask[0, : sum(doc_lens)].split(doc_lens)]
    # A sum of its own for each answer: the same wherever it stands in the row, so equal answers get
    # equal numbers.
    sums = torch.cat(
        [token_losses[:0], *(part.sum(0, keepdim=True) for part in token_losses.split(sizes))]
    )
    return -sums.view(-1, 2), torch.tensor(sizes, dtype=torch.float32, device=sums.device).view(
        -1, 2
    )


def bradley_terry(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin), where a share of the pairs may be labelled the wrong way round.

    Source: Bradley and Terry (1952); with smoothing Mitchell, A Note on DPO with Noisy Preferences
    (2023), eq. 3.
    """
    loss = -F.logsigmoid(margin)
    return (
        loss
        if not label_smoothing
        else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    )


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Losses:
    """Direct preference optimisation: the policy's log-ratio to the reference is the reward, up to
    a factor beta.

    Source: Rafailov et al., Direct Preference Optimization (2023), eq. 7.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    losses = bradley_terry(beta * (chosen - rejected), label_smoothing)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_lens: Tensor,
    rejected_lens: Tensor,
    beta: float,
) -> Losses:
    """Identity preference optimisation: bring the margin to 1 / (2 beta), and no further.

    Log-ratios are means over the tokens of an answer, as in TRL and, so its source says, in the
    paper's experiments.
    Source: Azar et al., A General Theoretical Paradigm to Understand Learning from Human
    Preferences (2024), eq. 17,
        where beta is called tau.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    losses = (chosen / chosen_lens - rejected / rejected_lens - 1 / (2 * beta)) ** 2
    return losses, beta * chosen.detach(), beta * rejected.detach()


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_lens: Tensor,
    rejected_lens: Tensor,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Losses:
    """Simple preference optimisation: the reward is the policy's mean log-probability of a token;
    no reference.

    Args:
        gamma: what the margin of the rewards should exceed.

    Source: Meng et al., SimPO (2024), eq. 6.
    """
    chosen, rejected = beta * policy_chosen / chosen_lens, beta * policy_rejected / rejected_lens
    return (
        bradley_terry(chosen - rejected - gamma, label_smoothing),
        chosen.detach(),
        rejected.detach(),
    )


def choose_beta(flags: dict) -> float:
    """The flag beta, or what its loss_type has by default."""
    return (
        (2.0 if flags["loss_type"] == "simpo" else 0.1) if flags["beta"] is None else flags["beta"]
    )


def choose_loss(flags: dict) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The loss that a stage's flags describe: (policy, lens, reference) -> METRICS summed over the
    pairs, (5,).

    Its arguments are (P, 2) float32, chosen and rejected: log-probabilities of the answers, and
    their lengths; simpo takes None for the reference.

    Args:
        flags: loss_type; beta, where None stands for 0.1, or 2 for simpo; label_smoothing;
        simpo_gamma; sft_weight, of
            the mean -log p of a token of the chosen answer.
            Source: Pang et al., Iterative Reasoning Preference Optimization (2024), eq. 1, its
            right part.

    Raises:
        ValueError: a value that makes no sense; names the flag.
    """
    kind, smoothing, gamma = (
        flags[name] for name in ("loss_type", "label_smoothing", "simpo_gamma")
    )
    beta = choose_beta(flags)
    if not beta > 0:
        raise ValueError(f"--beta {beta}: must be positive")
    if not 0 <= smoothing < 0.5:
        raise ValueError(
            f"--label_smoothing {smoothing}: must lie in [0, 0.5), it is a share of wrong labels"
        )
    if smoothing and kind == "ipo":
        raise ValueError(
            f"--label_smoothing {smoothing}: ipo has none, use --loss_type sigmoid or simpo"
        )
    if not flags["sft_weight"] >= 0:
        raise ValueError(f"--sft_weight {flags['sft_weight']}: must be 0 or more")

    def loss_of(policy: Tensor, lens: Tensor, reference: Tensor | None) -> Tensor:
        sides = [*policy.unbind(dim=1), *(reference.unbind(dim=1) if kind != "simpo" else ())]
        if kind == "sigmoid":
            losses, *rewards = dpo_loss(*sides, beta, smoothing)
        elif kind == "ipo":
            losses, *rewards = ipo_loss(*sides, *lens.unbind(dim=1), beta)
        else:
            losses, *rewards = simpo_loss(*sides, *lens.unbind(dim=1), beta, gamma, smoothing)
        if flags["sft_weight"]:
            losses = losses - flags["sft_weight"] * policy[:, 0] / lens[:, 0]
        return summed(losses, *rewards)

    return loss_of
