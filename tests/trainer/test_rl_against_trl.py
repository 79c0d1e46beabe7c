"""Losses and advantages of GRPO and its kin as TRL's code has them; skips without TRL."""

import inspect
import textwrap
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trainer import train_grpo as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    grpo_trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="TRL is not installed: pip install trl==1.16.0"
    )

LENGTHS, LONGEST = [5, 1, 8, 3, 8, 2], 8
# Ours: (loss type, low, high); TRL's flags for the same. CISPO's limit is 1 + high there, GSPO a
# level of GRPO.
PAIRS = {
    "grpo": ("grpo", 0.2, 0.2, "token", 0.2),
    "dr_grpo": ("dr_grpo", 0.2, 0.2, "token", 0.2),
    "dapo": ("dapo", 0.2, 0.28, "token", 0.28),
    "cispo": ("cispo", 1.0, 0.5, "token", 1.5),
    "gspo": ("grpo", 0.1, 0.15, "sequence", 0.15),
}


def theirs(log_probs, old, mask, advantages, loss_type, low, high, level) -> torch.Tensor:
    """What GRPOTrainer._compute_loss returns for these log-probabilities, padded (R, LONGEST)."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, torch.zeros_like(log_probs), None),
        model=SimpleNamespace(training=True), accelerator=accelerator, _metrics={"train": defaultdict(list)},
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=low, epsilon_high=high, beta=0.0,
        args=SimpleNamespace(delta=None, steps_per_generation=1), current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False,
    )  # fmt: skip
    empty = torch.zeros(len(mask), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": mask.long(),
        "completion_mask": mask,
    }
    inputs |= {
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients(name):
    loss_type, low, high, level, their_high = PAIRS[name]
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(LONGEST) < lengths.unsqueeze(1)
    old = -3 * torch.rand(6, LONGEST)
    advantages = torch.randn(6)
    log_probs = (old + 0.4 * torch.randn(6, LONGEST)).requires_grad_()
    expected = theirs(log_probs, old, mask.float(), advantages, loss_type, low, their_high, level)
    (their_gradient,) = torch.autograd.grad(expected, log_probs)
    of = torch.arange(6).repeat_interleave(lengths)
    terms, _, _ = ours.policy_terms(
        log_probs[mask], old[mask], advantages, of, lengths, name, low, high
    )
    loss = (terms * ours.token_weights(of, lengths, 6, len(of), name, LONGEST)).sum()
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and abs(expected.item()) > 1e-3
    assert (gradient - their_gradient).abs().max() <= 1e-6 < gradient.abs().max()


@pytest.mark.parametrize("scale, name", [("group", "grpo"), ("none", "dr_grpo")])
def test_advantages(scale, name):
    """Their lines stand in the middle of a long method: they are cut out of it and run."""
    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    begin = source.index("            # Apply weights to each reward function's output and sum")
    end = source.index("            is_std_zero = ", begin)
    rewards = torch.rand(12, 1)
    names = {
        "self": SimpleNamespace(reward_weights=torch.ones(1), scale_rewards=scale), "torch": torch, "device": "cpu",
        "rewards_per_func": rewards, "unscorable_mask": torch.zeros(12, dtype=torch.bool), "num_generations": 4,
        "nanstd": grpo_trainer.nanstd,
    }  # fmt: skip
    exec(textwrap.dedent(source[begin:end]), names)
    assert (
        ours.group_advantages(rewards.view(3, 4), name).flatten() - names["advantages"]
    ).abs().max() <= 1e-6
