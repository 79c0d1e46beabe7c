"""Our losses on the same numbers as TRL's own code.

Skips where TRL is not installed: pip install trl==1.16.0
"""

import functools
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from model.preference_loss import answer_logps
from trainer.train_dpo import check_loss, preference_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    dpo_trainer = pytest.importorskip(
        "trl.trainer.dpo_trainer", reason="TRL is not installed: pip install trl==1.16.0"
    )
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")

FLAGS = {
    "loss_type": "sigmoid",
    "beta": 0.3,
    "label_smoothing": 0.0,
    "simpo_gamma": 0.7,
    "sft_weight": 0.0,
}
PAIRS, LONGEST = 6, 12


def choose_loss(flags: dict):
    """The loss that flags describe: (policy, lens, reference) -> METRICS summed over the pairs."""
    args = SimpleNamespace(**flags)
    check_loss(args)
    return functools.partial(preference_loss, args)


def alone(value):
    """What gathering over processes gives in a single one."""
    return value


@pytest.fixture(scope="module")
def answers():
    """Log-probabilities of policy and reference for pairs of answers of unequal length.

    mask, policy, reference: padded, all chosen before all rejected, as TRL has them; logps (the
    policy's), others (the reference's) and lens: sums over tokens and lengths as ours, (P, 2).
    """
    generator = torch.Generator().manual_seed(3)
    lens = torch.randint(
        1, LONGEST, (2 * PAIRS,), generator=generator
    )  # chosen of all pairs, then rejected of all
    mask = (torch.arange(LONGEST) >= 2) & (
        torch.arange(LONGEST) < 2 + lens.view(-1, 1).clamp_max(LONGEST - 2)
    )
    policy, reference = (
        -3 * torch.rand(2 * PAIRS, LONGEST - 1, generator=generator) for _ in range(2)
    )
    packed = [
        (logps * mask[:, 1:]).view(2, PAIRS, -1).transpose(0, 1).flatten(0, 1)
        for logps in (policy, reference)
    ]
    doc_lens = [LONGEST - 1] * (2 * PAIRS)
    ours = mask[:, 1:].view(2, PAIRS, -1).transpose(0, 1).flatten().long().view(1, -1)
    (chosen, lens), (others, _) = (
        answer_logps(-logps.flatten()[ours[0].bool()], ours, doc_lens) for logps in packed
    )
    return SimpleNamespace(
        mask=mask, policy=policy, reference=reference, logps=chosen, others=others, lens=lens
    )


def dpo_of_trl(answers, loss_type: str, beta: float) -> tuple[float, dict]:
    """Loss and metrics of DPOTrainer on these log-probabilities, its models replaced."""

    def model_of(logps):
        zeros = torch.zeros_like(logps)
        masked = logps * answers.mask[:, 1:]
        out = SimpleNamespace(
            log_probs=masked, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=None
        )
        return lambda **inputs: out

    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        ref_model=model_of(answers.reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone),
        loss_types=[loss_type], loss_weights=[1.0], beta=beta, f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=False, aux_loss_enabled=False, use_weighting=False, label_smoothing=0.0,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer.model.is_gradient_checkpointing = False
    ids = torch.zeros(2 * PAIRS, LONGEST, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": answers.mask.long(),
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model_of(answers.policy), inputs, False)
    return loss.item(), {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_and_ipo(answers, loss_type, beta):
    expected, found = dpo_of_trl(answers, loss_type, beta)
    ours = choose_loss(FLAGS | {"loss_type": loss_type, "beta": beta})(
        answers.logps, answers.lens, answers.others
    )
    loss, accuracy, margin, chosen, rejected = (ours / PAIRS).tolist()
    assert loss == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert accuracy == pytest.approx(found["rewards/accuracies"]) and 0 < accuracy < 1
    rewards = [found[f"rewards/{name}"] for name in ("margins", "chosen", "rejected")]
    assert [margin, chosen, rejected] == pytest.approx(rewards, abs=1e-6, rel=1e-6)


def cpo_of_trl(chosen, rejected, loss_type: str, smoothing: float) -> torch.Tensor:
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device=torch.device("cpu")), loss_type=loss_type,
        beta=FLAGS["beta"], simpo_gamma=FLAGS["simpo_gamma"], label_smoothing=smoothing,
    )  # fmt: skip
    return cpo_trainer.CPOTrainer.cpo_loss(trainer, chosen, rejected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(answers, smoothing):
    losses, chosen, rejected = cpo_of_trl(
        *(answers.logps / answers.lens).unbind(1), "simpo", smoothing
    )
    ours = choose_loss(FLAGS | {"loss_type": "simpo", "label_smoothing": smoothing})(
        answers.logps, answers.lens, None
    )
    right = (chosen > rejected).float()
    expected = torch.stack([losses, right, chosen - rejected, chosen, rejected]).sum(dim=1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_label_smoothing(answers):
    """TRL's DPO has lost it; the CPO of TRL still has it, on ratios where we give it them."""
    losses, *_ = cpo_of_trl(*(answers.logps - answers.others).unbind(1), "sigmoid", 0.2)
    ours = choose_loss(FLAGS | {"label_smoothing": 0.2})(
        answers.logps, answers.lens, answers.others
    )
    assert ours[0].item() == pytest.approx(losses.sum().item(), rel=1e-6)
