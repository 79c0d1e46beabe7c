"""Group relative policy optimisation (GRPO): learn which completions of a prompt are better.

Reads  --data_path (conversations that end where the assistant is to speak, "answer" and other
       fields beside them for --reward) and the weights of --from_weight.
Writes out/grpo_512.pth with its .json, and out/grpo_512/: metrics.jsonl, training.log, checkpoints.

A rollout completes --global_batch_size prompts, --group_size times each; then come
--updates_per_rollout passes over it, of --mini_batches optimizer steps each. A row of --batch_size
is a prompt: so many are completed at once, and a forward pass of an update packs completions up to
batch_size x max_seq_len tokens. Checkpoints lie between rollouts.

    python trainer/train_grpo.py
    torchrun --nproc_per_node 8 trainer/train_grpo.py --ddp
"""

import argparse
import copy
import functools
import math
import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.launcher import die_with_launcher, read_launch

die_with_launcher()  # before the imports, which take seconds

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dataset.packing import Plan, plan_epoch, split_rows
from dataset.prompt_dataset import PromptDataset, describe_prompts
from model.lm import LMConfig, MiniMindLM
from runtime import checkpoint, launch, parallel
from runtime.device import choose_device, to_float64
from runtime.kernel_loader import apply_kernels
from runtime.optim import make_optimizer, scale_lr
from runtime.rl.rewards import load_rewards
from runtime.rl.rollout import mini_batch_rows, mini_batches, rank_prompts, score
from runtime.rl.sampler import Sampler, rollout_metrics, show_samples
from runtime.run import Run
from runtime.start import open_start
from runtime.tracking import Tracker

# How far the ratio of the new policy to the old one may go: [1 - low, 1 + high]. Low 1 is no limit.
CLIPS = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "cispo": (1.0, 4.0),
    "gspo": (3e-4, 4e-4),
}


# Copied from trainer.train_pretrain.init_distributed_mode
def init_distributed_mode(args: argparse.Namespace) -> torch.device:
    """Join the process group that torchrun describes; returns the device of this process."""
    launched = read_launch(needed_by="--ddp" if args.ddp else "")
    name = choose_device(args.device, args.ddp)
    cuda = name.startswith("cuda")
    if cuda and (args.ddp or name == "cuda"):
        name = f"cuda:{launched.local_rank if args.ddp else 0}"
    device = torch.device(name)
    gpus = torch.cuda.device_count()
    if cuda and max(device.index + 1, launched.local_world_size) > gpus:
        raise ValueError(f"{device} is asked for, but torch {torch.__version__} sees {gpus} GPUs")
    if args.ddp:
        from runtime.distributed import heartbeat

        timeout = heartbeat.start(args.timeout)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    return device


# Copied from trainer.train_pretrain.get_lr
def get_lr(
    current_step: int, total_steps: int, lr: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The learning rate of a step: a linear warm-up to lr, then what the schedule says.

    cosine: down to lr / 10; linear: down to 0; constant; wsd: constant for 90 % of the steps behind
    the warm-up, then a line down to 0.

    Source: Loshchilov and Hutter, SGDR (2017), eq. 5, one cycle with eta_min = lr / 10; Hu et al.,
    MiniCPM (2024), section 4, for warm-up, stable, decay, with the last tenth for the decay.
    """
    if current_step < warmup_steps:
        return lr * (current_step + 1) / warmup_steps
    done = (current_step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "constant":
        return lr
    if schedule == "wsd":
        return lr * min(1.0, 10 * (1 - done))
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


# Copied from trainer.train_pretrain.setup_seed
def setup_seed(seed: int) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# Copied from trainer.train_pretrain.is_main_process
def is_main_process() -> bool:
    """True on rank 0, and without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


# Copied from trainer.train_pretrain.Logger
def Logger(content: str) -> None:
    """Print on rank 0."""
    if is_main_process():
        print(content, flush=True)


# Copied from trainer.train_pretrain.save_weights
def save_weights(model: torch.nn.Module, config: LMConfig, path: Path) -> None:
    """Write the float32 weights as a state dict, and the shape as JSON; all ranks call it."""
    state_dict = model.module.state_dict() if hasattr(model, "module") else model.state_dict()
    checkpoint.save_weights(path, state_dict, config.to_json())


def group_advantages(rewards: Tensor, loss_type: str) -> Tensor:
    """How much better than its group each completion is.

    In units of the group's standard deviation, for dr_grpo in those of the reward.

    Args:
        rewards: (prompts, group_size).

    Returns:
        (prompts, group_size).

    Source: Shao et al., DeepSeekMath (2024), section 4.1.2; Liu et al., Dr. GRPO (2025), section
    3.2.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if loss_type == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def policy_terms(log_probs, old, advantages, of, lengths, loss_type: str, low: float, high: float):
    """The loss of each token, before `token_weights`; which are clipped below, and which above.

    Args:
        log_probs: (K,) float32, of the tokens of some completions, with gradient.
        old: (K,) float32, the same under the policy that they were sampled from.
        advantages: (R,) float32, of the completions.
        of: (K,) int64, the completion of each token.
        lengths: (R,) int64, tokens of each completion.

    Source: Shao et al., DeepSeekMath (2024), eq. 3; Yu et al., DAPO (2025), eq. 8; MiniMax-M1
    (2025), eq. 4 and 5, CISPO: the clipped ratio is a weight; Zheng et al., GSPO (2025), eq. 5 and
    7: one ratio for all its tokens.
    """
    log_ratio, advantage = log_probs - old, advantages[of]
    if loss_type == "gspo":
        log_ratio = (log_ratio.new_zeros(len(lengths)).index_add(0, of, log_ratio) / lengths)[of]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    if loss_type == "cispo":
        terms = -clipped.detach() * advantage * log_probs
    else:
        terms = -torch.minimum(ratio * advantage, clipped * advantage)
    return terms, (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)


def kl_terms(log_probs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """Terms whose gradient is, in expectation over tokens, that of KL(policy || reference).

    That is E_policy[(log policy - log reference) grad log policy], the other part, E_policy[grad
    log policy], being 0. The usual estimator of the value, reference / policy - 1 - log(reference /
    policy), has the gradient of the KL the other way round. Tokens are sampled from the old policy,
    their prefixes are taken as given.

    Args:
        log_probs, old, reference: (K,) float32.

    Source: Schulman, Approximating KL Divergence (2020), k2; Tang and Munos, On a few pitfalls in
    KL divergence gradient estimation for RL (2025).
    """
    return (log_probs - old).detach().exp() * 0.5 * (log_probs - reference).square()


def token_weights(
    of, lengths, completions: int, tokens: int, loss_type: str, max_new_tokens: int
) -> Tensor:
    """(K,) float32, what each token counts in the loss of a mini-batch.

    Args:
        of, lengths: as in `policy_terms`.
        completions, tokens: of the mini-batch, over all ranks.

    Source: Shao et al., DeepSeekMath (2024), eq. 3, the mean over completions of the mean over
    their tokens, gspo too; Liu et al., Dr. GRPO (2025), a constant for each completion; Yu et al.,
    DAPO (2025), eq. 8, a mean over tokens.
    """
    if loss_type in ("grpo", "gspo"):
        return (1.0 / lengths / max(1, completions))[of]
    total = completions * max_new_tokens if loss_type == "dr_grpo" else tokens
    return torch.full(of.shape, 1.0 / max(1, total), device=of.device)


def roll_out(run: Run, plan: Plan, window: int, sampler: Sampler):
    """Sample group_size completions of each of this rank's prompts of a window; with their rewards.

    A group whose rewards are all the same says nothing: it is in no mini-batch, nor in what a loss
    is divided by.

    Returns:
        The rollout, its rewards (N, rewards), the mini-batches, whose packs keep the `advantages`
        of their completions, and what the log says.
    """
    args = run.args
    rank, ranks = parallel.data_world()
    numbers = rank_prompts(plan, window, rank, ranks)
    policy = parallel.unwrap(run.model)
    rollout, rewards = sampler.sample_completions(policy, numbers, args.group_size, run.step)
    groups = rewards.sum(dim=1).view(-1, args.group_size)
    is_flat = groups.amax(dim=1) == groups.amin(dim=1)
    prompts = len(plan.window(window))
    sizes = (len(numbers), prompts, rank, ranks, args.group_size, args.mini_batches)
    parts = [
        [row for row in part if not is_flat[row // args.group_size]]
        for part in mini_batch_rows(*sizes)
    ]
    batches = mini_batches(rollout, parts, args.batch_size * args.max_seq_len)
    advantages = group_advantages(groups, args.loss_type).flatten().float()
    for pack in (pack for batch in batches for pack in batch.packs):
        pack.kept["advantages"] = advantages[pack.rows].to(args.device)
    metrics = rollout_metrics(rollout, rewards, args.reward)
    metrics["groups_without_variance"] = parallel.sum_over_ranks(is_flat.sum())[0] / prompts
    return rollout, rewards, batches, metrics


def train_epoch(run: Run, plan: Plan, sampler: Sampler, reference, held_out: np.ndarray) -> None:
    """Train to the end of the epoch, to the last step of the run, or to a signal.

    Args:
        run: the run, whose counters say at which rollout of the epoch to begin.
        plan: the epoch's prompts, a rollout a window.
        reference: the model of the KL divergence, None without.
        held_out: (n,) prompts to evaluate on; none for no evaluation.
    """
    args = run.args
    model = run.model
    optimizer = run.optimizer
    scaler = run.scaler
    policy = parallel.unwrap(model)
    steps_per_rollout = args.updates_per_rollout * args.mini_batches
    limits = (args.loss_type, args.clip_low, args.clip_high)
    for window in range(run.progress["step_in_epoch"], plan.steps):
        # 1. Rollout, rewards, advantages
        rollout, rewards, batches, rollout_means = roll_out(run, plan, window, sampler)

        # 2. What policy and reference say now, by the passes of the updates. For a single update
        #    that is its own.
        with torch.no_grad(), run.autocast:
            for pack in (pack for batch in batches for pack in batch.packs):
                if steps_per_rollout > 1:
                    pack.kept["old"] = score(policy, pack, args.temperature)[0]
                if reference is not None:
                    pack.kept["reference"] = score(reference, pack, args.temperature)[0]

        for update in range(steps_per_rollout):
            # 3. Learning rate
            warmup_steps = int(args.warmup_ratio * args.total_steps)
            lr = get_lr(run.step, args.total_steps, args.peak_lr, warmup_steps, args.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 4. Gradients of one sum over all passes and ranks; they are averaged over ranks, hence
            #    `replicas`
            batch = batches[update % args.mini_batches]
            counts = (batch.completions, batch.supervised, args.loss_type, args.max_new_tokens)
            sums = to_float64(torch.zeros(7, device=args.device))
            for n, pack in enumerate(batch.packs):
                of, lengths = pack.of.to(args.device), pack.lengths.to(args.device)
                with parallel.sync_gradients(model, n == len(batch.packs) - 1):
                    with run.autocast:
                        log_probs, entropy, aux_loss = score(model, pack, args.temperature)
                    now = log_probs.detach()
                    old = pack.kept.get("old", now)
                    anchor = pack.kept.get("reference", now)
                    advantages = pack.kept["advantages"]
                    terms, below, above = policy_terms(
                        log_probs, old, advantages, of, lengths, *limits
                    )
                    if reference is not None:
                        terms = terms + args.kl_beta * kl_terms(log_probs, old, anchor)
                    loss = (terms * token_weights(of, lengths, *counts)).sum()
                    aux_loss = aux_loss * (sum(pack.doc_lens) / max(1, batch.tokens))
                    scaler.scale((loss + aux_loss) * parallel.replicas()).backward()
                columns = (loss.detach(), aux_loss.detach(), now - anchor, entropy)
                columns += (below, above, (now - old).exp())
                sums += torch.stack([to_float64(column).sum() for column in columns])

            # 5. Clip and step. All ranks have each other's numbers: all step, or all skip.
            scaler.unscale_(optimizer)
            grad_norm = parallel.clip_gradients(model, args.grad_clip)
            sums = parallel.agree_on_step(grad_norm, float(run.stop.received), *sums)
            grad_norm, stopping, loss, aux_loss, *sums = sums
            is_finite = math.isfinite(loss + aux_loss + grad_norm)
            if is_finite:
                scaler.step(optimizer)
            # The same scale on all ranks
            scaler.update(None if is_finite else scaler.get_scale() / 2)
            optimizer.zero_grad(set_to_none=True)

            # 6. Count and log
            run.count_step(batch.tokens, is_finite, loss, grad_norm)
            metrics = {"loss": loss, "aux_loss": aux_loss, "lr": lr, "grad_norm": grad_norm}
            metrics |= {"tokens": max(1, batch.tokens), "supervised_tokens": batch.supervised}
            names = ("kl", "entropy", "clipped_low", "clipped_high", "ratio")
            means = [total / max(1, batch.supervised) for total in sums]
            run.log_step(metrics | dict(zip(names, means, strict=True)) | rollout_means)
            parallel.check_replicas(model, run.step, args.replica_check)
            run.stop.sync_stop(stopping)

        # 7. Between two rollouts: show samples, evaluate, save
        run.progress["step_in_epoch"] += 1
        if run.has_passed(args.sample_interval, steps_per_rollout) or run.step == steps_per_rollout:
            shown = show_samples(rollout, rewards, sampler.dataset.coder)
            run.tracker.print(f"step {run.step} reward {rollout_means['reward']:.3f}\n{shown}")
        if len(held_out) and run.is_due(args.eval_interval, steps_per_rollout):
            from runtime.evaluation import evaluate_prompts

            run.log({"step": run.step} | evaluate_prompts(sampler, policy, held_out))
        if run.save_if_due(stopping, steps_per_rollout):
            return
    run.progress.update(epoch=run.progress["epoch"] + 1, step_in_epoch=0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument("--config", help="YAML file with defaults for these flags")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=str(ROOT / "dataset/demo/rl_prompts.jsonl"), help="training data")
    add("--tokenizer_dir", help="tokenizer folder (default: that of the weights, else our own)")
    add("--chat_template", help="Jinja file, instead of the tokenizer's own chat template")
    add("--max_seq_len", type=int, help="longest row in tokens; the context is at least that")
    add("--drop_last", type=int, choices=(0, 1), default=0, help="1: no shorter last global batch")
    add("--skip_bad", action="store_true", help="leave bad rows out and count them")
    add("--eval_ratio", type=float, default=0.0, help="share of the rows held out for evaluation")
    add("--preview", type=int, default=0, metavar="N", help="print N samples and exit")

    add = parser.add_argument_group("model").add_argument
    add("--dim", type=int, help="width (default, as of all sizes: that of the weights, or 512)")
    add("--n_layers", type=int, help="blocks (8)")
    add("--n_heads", type=int, help="query heads (8)")
    add("--n_kv_heads", type=int, help="key and value heads (2)")
    add("--dropout", type=float, default=0.0, help="dropout in training")
    add("--use_moe", type=int, choices=(0, 1), help="1: mixture of experts")
    add("--n_experts", type=int, help="routed experts per layer (4)")
    add("--n_experts_per_tok", type=int, help="routed experts per token (2)")
    add("--n_shared_experts", type=int, help="experts that every token visits (0)")
    add("--rope_scaling", metavar="KIND:FACTOR", help="longer context: linear, llama3 or yarn:4")
    add("--from_weight", help="stage name, path, folder, hub name or none")

    add = parser.add_argument_group("rollouts").add_argument
    add("--group_size", type=int, default=8, help="completions per prompt")
    add("--max_new_tokens", type=int, default=128, help="longest completion in tokens")
    add("--temperature", type=float, default=1.0, help="of the rollouts, and of what is learned")
    add("--reward", nargs="+", default=["exact"], help="exact, format, F.py:NAME, F.pth; :WEIGHT")
    add("--sample_interval", type=int, default=100, help="steps between samples shown (0: never)")

    add = parser.add_argument_group("loss").add_argument
    # Differs from trainer.train_dpo.--loss_type: other losses
    add("--loss_type", choices=tuple(CLIPS), default="grpo", help="whose objective")
    add("--clip_low", type=float, help="the ratio counts down to 1 - clip_low (default: see CLIPS)")
    add("--clip_high", type=float, help="the ratio counts up to 1 + clip_high (default: see CLIPS)")
    add("--kl_beta", type=float, default=0.0, help="weight of the KL from the start weights")
    add("--updates_per_rollout", type=int, default=1, help="passes over a rollout")
    add("--mini_batches", type=int, default=1, help="optimizer steps of a pass")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--max_steps", type=int, default=0, help="stop after so many optimizer steps (0: no limit)")
    add("--batch_size", type=int, default=8, help="rows per process and micro-batch")
    # Differs from trainer.train_pretrain.--global_batch_size: a row is a prompt
    add("--global_batch_size", type=int, help="prompts per rollout (default: batch_size x ranks)")
    add("--learning_rate", type=float, default=1e-5, help="peak learning rate")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up")
    schedules = ("cosine", "linear", "constant", "wsd")
    add("--lr_schedule", choices=schedules, default="cosine", help="learning rate behind warm-up")
    scalings = ("none", "linear", "sqrt")
    add("--lr_scaling", choices=scalings, default="none", help="learning rate by data ranks")
    optimizers = ("adamw", "muon", "lamb")
    add("--optimizer", choices=optimizers, default="adamw", help="lamb: for large batches")
    add("--weight_decay", type=float, default=0.1, help="of matrices")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm (0: no limit)")
    add("--seed", type=int, default=42, help="seed of everything random")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on GPU")
    add("--ddp", action="store_true", help="distributed: start with torchrun")
    add("--timeout", type=float, default=30.0, help="minutes of a rank's silence that end the job")
    add("--strategy", choices=("auto", *parallel.STRATEGIES), default="auto", help="how to shard")
    add("--offload", type=int, choices=(0, 1), default=0, help="1: zero2, zero3 live in CPU memory")
    add("--bucket_cap_mb", type=int, default=25, help="size of DDP's gradient messages in MiB")
    add("--replica_check", type=int, default=10, help="steps between checks of replicas (0: never)")
    add("--compile", type=int, choices=(0, 1), default=0, help="1: torch.compile each block")
    add("--gradient_checkpointing", type=int, choices=(0, 1, 2), default=0, help="1: least memory")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", default=str(ROOT / "out"), help="where weights and runs are written")
    add("--save_weight", default="grpo", help="name of the run and its weights")
    add("--save_interval", type=int, default=100, help="steps between checkpoints (0: at the end)")
    add("--save_total_limit", type=int, default=2, help="checkpoints that are kept")
    add("--log_interval", type=int, default=10, help="steps between log lines")
    add("--eval_interval", type=int, default=0, help="steps between evaluations (0: at the end)")
    add("--resume", default="none", help="none, auto (newest valid checkpoint) or a path")
    add("--resume_with_changes", action="store_true", help="go on also where flags are others")
    add("--use_wandb", action="store_true", help="same as --report_to wandb")
    trackers = ("none", "wandb", "tensorboard")
    add("--report_to", nargs="+", choices=trackers, default=[], help="where metrics go, too")

    return parser.parse_args(launch.command_line(parser))


def main() -> int:
    # 1. Flags, processes, seed
    args = parse_args()
    launch.check_flags(vars(args))
    start = open_start(args, "full_sft")
    low, high = CLIPS[args.loss_type]
    args.clip_low = low if args.clip_low is None else args.clip_low
    args.clip_high = high if args.clip_high is None else args.clip_high
    args.device = init_distributed_mode(args)
    parallel.make_mesh(args)
    setup_seed(args.seed)

    # 2. Prompts, the plan of the epochs, and rewards
    sizes = (args.max_seq_len, args.max_new_tokens)
    dataset = PromptDataset(args.data_path, start.tokenizer, *sizes, args.skip_bad)
    Logger(f"{args.data_path}: {describe_prompts(dataset)}")
    if args.preview:
        from dataset.preview import preview_prompts

        Logger(preview_prompts(dataset, start.tokenizer, args.preview))
        return 0
    train_rows, held_out = split_rows(len(dataset), args.eval_ratio, args.seed)
    data_ranks = parallel.data_world()[1]
    args.global_batch_size = args.global_batch_size or args.batch_size * data_ranks
    order = (args.seed, args.max_seq_len, 0, args.global_batch_size, args.drop_last)
    plans = functools.partial(plan_epoch, dataset, train_rows, *order)
    rollouts = sum(plans(epoch).steps for epoch in range(args.epochs))
    # The last rollout is used up, whatever --max_steps says
    steps_per_rollout = args.updates_per_rollout * args.mini_batches
    wanted = math.ceil(args.max_steps / steps_per_rollout) or rollouts
    args.total_steps = steps_per_rollout * min(rollouts, wanted)
    args.peak_lr = scale_lr(args.learning_rate, args.lr_scaling, data_ranks)
    config = replace(start.config, dropout=0.0)

    # 3. Precision: float16 alone needs its gradients scaled
    dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    autocast = nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(args.device.type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0**14, enabled=dtype == "float16")

    # 4. Strategy, rewards and the model, without dropout: the policy is compared with itself. The
    #    reference keeps the weights of the start. A copy generates for a policy that is sharded or
    #    compiled: the only model that a process then has whole.
    if args.dropout:
        reason = "a policy with dropout is not the one that wrote the rollout"
        Logger(f"--dropout {args.dropout} is taken as 0: {reason}")
    make = functools.partial(MiniMindLM, config, args.gradient_checkpointing)
    run_dir = start.run_dir
    args.strategy = parallel.choose_strategy(config, dataset, args, dtype)
    rewards = load_rewards(args.reward, config, args)
    model = start.build(make, args)
    apply_kernels(model, args.device, dtype)
    identity = checkpoint.identity_of(vars(args), args.global_batch_size, dataset.key)
    reference = None
    if args.kl_beta:
        from model.weight_hash import hash_weights
        from runtime.frozen import wrap_frozen

        reference = wrap_frozen(copy.deepcopy(model), args, dtype, start.fill)
        identity["the weights of --from_weight"] = hash_weights(reference.state_dict())
    resumed, changes = checkpoint.find_run(run_dir, args.resume, identity, args.resume_with_changes)

    # 5. Compile, wrap, optimizer
    plain_copy = None
    if args.compile or start.fill:
        from runtime.rl.whole_copy import copy_to_generate

        plain_copy = copy_to_generate(model, args.device)
    # Steps have any number of passes
    model = parallel.wrap(model, args, dtype, math.inf, start.fill)
    shard = args.strategy == "zero1"
    optimizer = make_optimizer(model, args.optimizer, args.peak_lr, args.weight_decay, shard)
    progress = checkpoint.load_run(resumed, model, optimizer, scaler)

    # 6. Tracking
    tracker = parallel.rank_zero_first(
        lambda: Tracker(run_dir, vars(args), is_main_process(), resumed, changes)
    )
    rollouts = f"rollouts of {args.global_batch_size} x {args.group_size} completions"
    steps = f"{args.total_steps} steps, {rollouts}, learning rate {args.peak_lr:g}"
    tracker.print(f"{run_dir.name}: {parallel.describe(model, args, dtype)}, {steps}")

    def save() -> None:
        tracker.sync()
        state = (model, optimizer, scaler, progress, identity)
        checkpoint.save_run(run_dir, args.save_total_limit, *state)
        save_weights(model, config, Path(f"{run_dir}.pth"))

    # 7. Epochs
    sampler = Sampler(args, rewards, dataset, autocast, plain_copy)
    tracker.start(progress, args.total_steps)
    run = Run(
        args=args,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        autocast=autocast,
        tracker=tracker,
        progress=progress,
        save=save,
    )
    while not (run.is_done or run.stop.number):
        train_epoch(run, plans(progress["epoch"]), sampler, reference, held_out)

    # 8. Clean up. Resumed behind the last step, the weights may be missing, or older.
    if run.step == tracker.first_step:
        save_weights(model, config, Path(f"{run_dir}.pth"))
    return run.finish(f"weights in {run_dir}.pth")


if __name__ == "__main__":
    launch.run(main)
