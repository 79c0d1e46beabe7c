"""What losses on preference pairs share: log-probabilities of answers, Bradley-Terry, metrics.

P is the number of pairs in a batch. DPO, IPO and SimPO stand in trainer/train_dpo.py, the loss of
reward models in trainer/train_reward.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METRICS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


def bradley_terry(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin), where a share of the pairs may be labelled the wrong way round.

    Source: Bradley and Terry (1952); with smoothing Mitchell, A Note on DPO with Noisy Preferences
    (2023), eq. 3.
    """
    loss = -F.logsigmoid(margin)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


def sum_metrics(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(5,) float32, METRICS summed over the pairs: only the loss has gradients.

    Args:
        losses: (P,) float32.
        chosen, rejected: (P,) float32, rewards of the answers. A pair counts as right where that of
            chosen is higher.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    metrics = (losses, (chosen > rejected).float(), chosen - rejected, chosen, rejected)
    return torch.stack([values.sum() for values in metrics])


def logps_of(
    model: nn.Module, X: Tensor, Y: Tensor, loss_mask: Tensor, doc_lens: list[int], device
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the answers of a batch of pairs, all in one forward pass.

    Args:
        X, Y, loss_mask, doc_lens: of `PreferenceDataset.collate`.

    Returns:
        Log-probabilities and lengths of the answers, see `answer_logps`; the model's auxiliary
        loss, a mean over tokens.
    """
    pinned = X.is_pinned()  # for CUDA; an Apple GPU would read memory that is not its own too late
    # (K,) positions, found on the CPU: a GPU would have to be waited for
    positions = loss_mask.flatten().nonzero().squeeze(1)
    targets = Y.flatten()[positions].to(device, non_blocking=pinned)
    positions = positions.to(device, non_blocking=pinned)
    out = model(X.to(device, non_blocking=pinned), doc_lens=doc_lens, logits_at=positions)
    token_losses = F.cross_entropy(out.logits.float(), targets, reduction="none")
    return *answer_logps(token_losses, loss_mask, doc_lens), out.aux_loss


def answer_logps(
    token_losses: Tensor, loss_mask: Tensor, doc_lens: list[int]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of answers, and their lengths in tokens: (P, 2) float32, chosen, rejected.

    Args:
        token_losses: (K,) -log p of the supervised tokens.
        loss_mask: (1, N) on the CPU, with K ones.
        doc_lens: [chosen 1, rejected 1, chosen 2, ...]; [] gives shapes (0, 2) that gradients still
            flow through.
    """
    lengths = [int(part.sum()) for part in loss_mask[0, : sum(doc_lens)].split(doc_lens)]
    # A sum of its own for each answer: the same wherever it stands in the row, so equal answers get
    # equal numbers.
    parts = [part.sum(0, keepdim=True) for part in token_losses.split(lengths)]
    sums = torch.cat([token_losses[:0], *parts])
    lens = torch.tensor(lengths, dtype=torch.float32, device=sums.device)
    return -sums.view(-1, 2), lens.view(-1, 2)
