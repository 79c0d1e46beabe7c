"""Other losses on preference pairs than DPO's: --loss_type ipo and simpo of trainer/train_dpo.py.

P is the number of pairs in a batch.
"""

from torch import Tensor

from model.preference_loss import bradley_terry

Losses = tuple[Tensor, Tensor, Tensor]  # losses, rewards of chosen and rejected: (P,) each


def variant_loss(args, policy: Tensor, lens: Tensor, reference: Tensor | None) -> Losses:
    """The loss of --loss_type; the other arguments as in `ipo_loss` and `simpo_loss`."""
    if args.loss_type == "ipo":
        return ipo_loss(policy, reference, lens, args.beta)
    return simpo_loss(policy, lens, args.beta, args.simpo_gamma, args.label_smoothing)


def ipo_loss(policy: Tensor, reference: Tensor, lens: Tensor, beta: float) -> Losses:
    """Identity preference optimisation: bring the margin to 1 / (2 beta), and no further.

    Log-ratios are means over the tokens of an answer, as in TRL and, so its source says, in the
    paper's experiments.

    Args:
        policy, reference: (P, 2) float32, log-probabilities of the chosen and rejected answers.
        lens: (P, 2) float32, tokens of the answers.

    Source: Azar et al., A General Theoretical Paradigm to Understand Learning from Human
    Preferences (2024), eq. 17, where beta is called tau.
    """
    chosen, rejected = (policy - reference).unbind(dim=1)
    margin = chosen / lens[:, 0] - rejected / lens[:, 1]
    return (margin - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected


def simpo_loss(
    policy: Tensor, lens: Tensor, beta: float, gamma: float, label_smoothing: float
) -> Losses:
    """Simple preference optimisation: the mean log-probability of a token, x beta, is the reward.

    Args:
        policy, lens: as in `ipo_loss`; there is no reference.
        gamma: what the margin of the rewards should exceed.

    Source: Meng et al., SimPO (2024), eq. 6.
    """
    chosen, rejected = (beta * policy / lens).unbind(dim=1)
    return bradley_terry(chosen - rejected - gamma, label_smoothing), chosen, rejected


def check_smoothing(loss_type: str, label_smoothing: float) -> None:
    """ValueError: a loss that has no label smoothing, or so much that labels say nothing."""
    smoothing = f"--label_smoothing {label_smoothing}"
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{smoothing}: must lie in [0, 0.5), it is a share of wrong labels")
    if loss_type == "ipo":
        raise ValueError(f"{smoothing}: ipo has none, use --loss_type sigmoid or simpo")
