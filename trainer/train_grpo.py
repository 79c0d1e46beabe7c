"""Group relative policy optimisation (GRPO): learn from rewards which of several completions of a
prompt are better.

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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.launcher import die_with_launcher, read_launch

die_with_launcher()  # before the imports, which take seconds

import numpy as np
import torch
import torch.distributed as dist

from dataset.lm_dataset import load_tokenizer
from dataset.packing import plan_epoch, split_rows
from dataset.prompt_dataset import PromptDataset, describe_prompts, preview_prompts
from model.lm import LMConfig, MiniMindLM
from model.weights import hash_weights, start_weights
from runtime import checkpoint, launch, parallel
from runtime.kernel_loader import apply_kernels
from runtime.optim import make_optimizer, scale_lr
from runtime.rl import rewards, rollout
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
    """Join the process group that torchrun describes in the environment; returns the device of this
    process."""
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device.startswith("cuda")
    launched = read_launch(needed_by="--ddp" if args.ddp else "")
    if args.ddp:
        device = torch.device("cuda", launched.local_rank) if cuda else torch.device("cpu")
    else:
        device = torch.device(
            ("cuda:0" if cuda else "cpu") if args.device in ("auto", "cuda") else args.device
        )
    if cuda and max(device.index + 1, launched.local_world_size) > torch.cuda.device_count():
        raise ValueError(
            f"{device} is asked for, but torch {torch.__version__} sees {torch.cuda.device_count()}"
            " GPUs"
        )
    if args.ddp:
        timeout = launch.start_heartbeat(args.timeout)
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None
        )
    return device


# Copied from trainer.train_pretrain.get_lr
def get_lr(
    current_step: int, total_steps: int, lr: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """Linear warm-up to lr, then a cosine down to lr / 10, a line down to 0, or constant; wsd:
    constant for 90 % of the steps behind the warm-up, then a line down to 0.

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
    """Have the float32 weights written as a plain state dict, the model's shape as JSON beside it;
    for all ranks."""
    state_dict = model.module.state_dict() if hasattr(model, "module") else model.state_dict()
    checkpoint.save_weights(path, state_dict, config.to_json())


def group_advantages(scores: torch.Tensor, loss_type: str) -> torch.Tensor:
    """How much better than its group each completion is: (prompts, group_size) rewards -> the same
    shape.

    In units of the group's standard deviation, for dr_grpo in those of the reward.
    Source: Shao et al., DeepSeekMath (2024), section 4.1.2; Liu et al., Dr. GRPO (2025), section
    3.2.
    """
    centred = scores - scores.mean(dim=1, keepdim=True)
    return centred if loss_type == "dr_grpo" else centred / (scores.std(dim=1, keepdim=True) + 1e-4)


def policy_terms(log_probs, old, advantages, of, lengths, loss_type: str, low: float, high: float):
    """The loss of each token, to be weighted by `token_weights`; which ones are clipped below, and
    which above.

    Args:
        log_probs: (K,) float32, of the tokens of some completions, with gradient.
        old: (K,) float32, the same under the policy that wrote them.
        advantages: (R,) float32, of the completions.
        of, lengths: (K,) int64, the completion of each token; (R,) int64, tokens of each
        completion.

    Source: Shao et al., DeepSeekMath (2024), eq. 3; Yu et al., DAPO (2025), eq. 8; MiniMax-M1
    (2025), eq. 4 and 5,
        CISPO: the clipped ratio is a weight; Zheng et al., GSPO (2025), eq. 5 and 7: one ratio for
        all its tokens.
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


def kl_terms(log_probs: torch.Tensor, old: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Terms whose gradient is, in expectation over tokens drawn from the old policy, that of
    KL(policy || reference).

    That is E_policy[(log policy - log reference) grad log policy], the other part, E_policy[grad
    log policy], being 0. The usual estimator of the value, reference / policy - 1 - log(reference /
    policy), has the gradient of the KL the other way round. (K,) float32 each; the prefixes of the
    tokens are taken as given.
    Source: Schulman, Approximating KL Divergence (2020), k2; Tang and Munos, On a few pitfalls in
    KL divergence
        gradient estimation for RL (2025).
    """
    return (log_probs - old).detach().exp() * 0.5 * (log_probs - reference).square()


def token_weights(
    of, lengths, completions: int, tokens: int, loss_type: str, max_new_tokens: int
) -> torch.Tensor:
    """(K,) float32, what each token counts in the loss of a mini-batch of so many completions and
    tokens in all.

    Source: Shao et al., DeepSeekMath (2024), eq. 3, the mean over completions of the mean over
    their tokens, gspo too;
        Liu et al., Dr. GRPO (2025), a constant for each completion; Yu et al., DAPO (2025), eq. 8,
        a mean over tokens.
    """
    if loss_type in ("grpo", "gspo"):
        return (1.0 / lengths / max(1, completions))[of]
    total = completions * max_new_tokens if loss_type == "dr_grpo" else tokens
    return torch.full(of.shape, 1.0 / max(1, total), device=of.device)


def roll_out(args, plan, window, tries, writer, step):
    """Complete each of this rank's prompts of a window group_size times, and judge the completions.

    A group whose rewards are all the same says nothing: it is in no mini-batch, nor in what a loss
    is divided by.
    Returns: the rollout, its rewards (N, rewards), advantages (N,), the mini-batches, and what the
    log says.
    """
    rank, ranks = parallel.data_world()
    numbers = rollout.own_prompts(plan, window, rank, ranks)
    tried, scores = tries(writer, numbers, args.group_size, step)
    groups = scores.sum(dim=1).view(-1, args.group_size)
    flat = groups.amax(dim=1) == groups.amin(dim=1)
    parts = rollout.shares(
        len(numbers), len(plan.window(window)), rank, ranks, args.group_size, args.mini_batches
    )
    parts = [[row for row in part if not flat[row // args.group_size]] for part in parts]
    minis = rollout.mini_batches(tried, parts, args.batch_size * args.max_seq_len)
    found = rewards.measures(tried, scores, args.reward)
    found["groups_without_variance"] = parallel.sum_over_ranks(flat.sum())[0] / len(
        plan.window(window)
    )
    return tried, scores, group_advantages(groups, args.loss_type).flatten().float(), minis, found


def train_epoch(
    args, plan, held_out, model, tools, optimizer, scaler, autocast, tracker, progress, stop, save
):
    """Train from the rollout in `progress` to the end of the epoch, to the last step of the run, or
    to a signal."""
    plain, (spare, reference, tries, tokenizer) = parallel.unwrap(model), tools
    steps_each = args.updates_per_rollout * args.mini_batches
    for window in range(progress["step_in_epoch"], plan.steps):
        # 1. Rollout, rewards, advantages
        writer = rollout.whole_copy(plain, spare)
        tried, scores, advantages, minis, found = roll_out(
            args, plan, window, tries, writer, progress["step"]
        )

        # 2. What policy and reference say now, by the passes of the updates. For a single update
        #    that is its own.
        with torch.no_grad(), autocast:
            for pack in (pack for mini in minis for pack in mini.packs):
                if steps_each > 1:
                    pack.kept["old"] = rollout.score(plain, pack, args.temperature)[0]
                if reference is not None:
                    pack.kept["reference"] = rollout.score(reference, pack, args.temperature)[0]

        for update in range(steps_each):
            # 3. Learning rate
            mini, warmup = (
                minis[update % args.mini_batches],
                int(args.warmup_ratio * args.total_steps),
            )
            lr = get_lr(progress["step"], args.total_steps, args.peak_lr, warmup, args.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 4. Gradients of one sum over all passes and ranks; they are averaged over ranks, hence
            #    `replicas`
            limits = (args.loss_type, args.clip_low, args.clip_high)
            counts = (mini.completions, mini.supervised, args.loss_type, args.max_new_tokens)
            sums = torch.zeros(7, dtype=torch.float64, device=args.device)
            for n, pack in enumerate(mini.packs):
                of, lengths, mine = (
                    t.to(args.device) for t in (pack.of, pack.lengths, advantages[pack.rows])
                )
                with parallel.sync_gradients(model, n == len(mini.packs) - 1):
                    with autocast:
                        log_probs, entropy, aux_loss = rollout.score(model, pack, args.temperature)
                    now = log_probs.detach()
                    old, anchor = pack.kept.get("old", now), pack.kept.get("reference", now)
                    terms, below, above = policy_terms(log_probs, old, mine, of, lengths, *limits)
                    if reference is not None:
                        terms = terms + args.kl_beta * kl_terms(log_probs, old, anchor)
                    loss = (terms * token_weights(of, lengths, *counts)).sum()
                    aux_loss = aux_loss * (sum(pack.doc_lens) / max(1, mini.tokens))
                    scaler.scale((loss + aux_loss) * parallel.replicas()).backward()
                columns = (
                    loss.detach(),
                    aux_loss.detach(),
                    now - anchor,
                    entropy,
                    below,
                    above,
                    (now - old).exp(),
                )
                sums += torch.stack([column.double().sum() for column in columns])

            # 5. Clip and step. All ranks have each other's numbers, so all of them step or all of
            #    them skip.
            scaler.unscale_(optimizer)
            grad_norm = parallel.clip_gradients(model, args.grad_clip)
            sums = parallel.agree_on_step(grad_norm, float(stop.received), *sums)
            grad_norm, stopping, loss, aux_loss, *sums = sums
            finite = math.isfinite(loss + aux_loss + grad_norm)
            if finite:
                scaler.step(optimizer)
            scaler.update(None if finite else scaler.get_scale() / 2)  # the same scale on all ranks
            optimizer.zero_grad(set_to_none=True)

            # 6. Count and log
            progress["step"] += 1
            progress["tokens"] += mini.tokens
            step, done = progress["step"], progress["step"] >= args.total_steps
            tracker.count_skipped(progress, finite, f"loss {loss}, gradient norm {grad_norm}")
            if step % args.log_interval == 0 or step == 1 or done:
                metrics = {
                    "step": step,
                    "epoch": progress["epoch"] + 1,
                    "loss": loss,
                    "aux_loss": aux_loss,
                    "lr": lr,
                }
                metrics |= {
                    "grad_norm": grad_norm,
                    "tokens": max(1, mini.tokens),
                    "supervised_tokens": mini.supervised,
                }
                names = ("kl", "entropy", "clipped_low", "clipped_high", "ratio")
                metrics |= {
                    name: total / max(1, mini.supervised)
                    for name, total in zip(names, sums, strict=True)
                }
                tracker.log(metrics | found | {"total_tokens": progress["tokens"]})
            parallel.check_replicas(model, step, args.replica_check)
            stop.sync_stop(stopping)

        # 7. Between two rollouts: show samples, evaluate, save
        progress["step_in_epoch"] += 1
        intervals = (args.sample_interval, args.eval_interval, args.save_interval)
        shows, evaluates, saves = (n and step // n > (step - steps_each) // n for n in intervals)
        if shows or step == steps_each:
            tracker.print(
                f"step {step} reward"
                f" {found['reward']:.3f}\n{rewards.shown(tried, scores, tokenizer)}"
            )
        if len(held_out) and (done or evaluates):
            reward = rewards.greedy_reward(tries, rollout.whole_copy(plain, spare), held_out)
            tracker.log({"step": step, "eval_loss": -reward, "eval_reward": reward})
        if stopping or done or saves:
            save()
        if stopping or done:
            return
    progress.update(epoch=progress["epoch"] + 1, step_in_epoch=0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument("--config", help="YAML file with defaults for these flags")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path", default=str(ROOT / "dataset/demo/rl_prompts.jsonl"), help="training data"
    )
    data.add_argument(
        "--tokenizer_dir", default=str(ROOT / "model/minimind_tokenizer"), help="tokenizer folder"
    )
    data.add_argument(
        "--max_seq_len",
        type=int,
        default=512,
        help="longest row, and context of the model, in tokens",
    )
    data.add_argument(
        "--drop_last", type=int, choices=(0, 1), default=0, help="1: no shorter last global batch"
    )
    data.add_argument("--skip_bad", action="store_true", help="leave bad rows out and count them")
    data.add_argument(
        "--eval_ratio", type=float, default=0.0, help="share of the rows held out for evaluation"
    )
    data.add_argument(
        "--preview", type=int, default=0, metavar="N", help="print N samples and exit"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--dim", type=int, default=512, help="width")
    model.add_argument("--n_layers", type=int, default=8, help="blocks")
    model.add_argument("--n_heads", type=int, default=8, help="query heads")
    model.add_argument("--n_kv_heads", type=int, default=2, help="key and value heads")
    model.add_argument("--dropout", type=float, default=0.0, help="dropout in training")
    model.add_argument(
        "--use_moe", type=int, choices=(0, 1), default=0, help="1: mixture of experts"
    )
    model.add_argument("--n_experts", type=int, default=4, help="routed experts per layer")
    model.add_argument("--n_experts_per_tok", type=int, default=2, help="routed experts per token")
    model.add_argument(
        "--n_shared_experts", type=int, default=0, help="experts that every token visits"
    )
    model.add_argument("--from_weight", help="stage name, path or none")
    tries = parser.add_argument_group("rollouts")
    tries.add_argument("--group_size", type=int, default=8, help="completions per prompt")
    tries.add_argument(
        "--max_new_tokens", type=int, default=128, help="longest completion in tokens"
    )
    tries.add_argument(
        "--temperature", type=float, default=1.0, help="of the rollouts, and of what is learned"
    )
    tries.add_argument(
        "--reward",
        nargs="+",
        default=["exact"],
        help="exact, format, FILE.py:NAME, FILE.pth; :WEIGHT",
    )
    tries.add_argument(
        "--sample_interval",
        type=int,
        default=100,
        help="steps between printed completions (0: never)",
    )
    loss = parser.add_argument_group("loss")
    # Differs from trainer.train_dpo.--loss_type: other losses
    loss.add_argument("--loss_type", choices=tuple(CLIPS), default="grpo", help="whose objective")
    loss.add_argument(
        "--clip_low", type=float, help="the ratio counts down to 1 - clip_low (default: see CLIPS)"
    )
    loss.add_argument(
        "--clip_high", type=float, help="the ratio counts up to 1 + clip_high (default: see CLIPS)"
    )
    loss.add_argument(
        "--kl_beta",
        type=float,
        default=0.0,
        help="weight of the KL divergence from the start weights",
    )
    loss.add_argument("--updates_per_rollout", type=int, default=1, help="passes over a rollout")
    loss.add_argument("--mini_batches", type=int, default=1, help="optimizer steps of a pass")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, default=1, help="passes over the data")
    optim.add_argument(
        "--max_steps", type=int, default=0, help="stop after so many optimizer steps (0: no limit)"
    )
    optim.add_argument("--batch_size", type=int, default=8, help="rows per process and micro-batch")
    # Differs from trainer.train_pretrain.--global_batch_size: a row is a prompt
    optim.add_argument(
        "--global_batch_size",
        type=int,
        help="prompts per rollout (default: batch_size x processes)",
    )
    optim.add_argument("--learning_rate", type=float, default=1e-5, help="peak learning rate")
    optim.add_argument(
        "--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up"
    )
    optim.add_argument(
        "--lr_schedule",
        choices=("cosine", "linear", "constant", "wsd"),
        default="cosine",
        help="learning rate behind the warm-up",
    )
    optim.add_argument(
        "--lr_scaling",
        choices=("none", "linear", "sqrt"),
        default="none",
        help="learning rate x data-parallel processes, or x their square root",
    )
    optim.add_argument(
        "--optimizer",
        choices=("adamw", "muon", "lamb"),
        default="adamw",
        help="muon: for the blocks' matrices; lamb: for large batches",
    )
    optim.add_argument("--weight_decay", type=float, default=0.1, help="of matrices")
    optim.add_argument(
        "--grad_clip", type=float, default=1.0, help="largest gradient norm (0: no limit)"
    )
    optim.add_argument("--seed", type=int, default=42, help="seed of everything random")
    system = parser.add_argument_group("machine")
    system.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    system.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on GPU"
    )
    system.add_argument("--ddp", action="store_true", help="distributed: start with torchrun")
    system.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        help="minutes without a sign of a rank that end the job",
    )
    system.add_argument(
        "--strategy",
        choices=("auto", *parallel.STRATEGIES),
        default="auto",
        help="how --ddp shares",
    )
    system.add_argument(
        "--offload", type=int, choices=(0, 1), default=0, help="1: zero2, zero3 live in CPU memory"
    )
    system.add_argument(
        "--bucket_cap_mb", type=int, default=25, help="size of DDP's gradient messages in MiB"
    )
    system.add_argument(
        "--replica_check", type=int, default=10, help="steps between checks of replicas (0: never)"
    )
    system.add_argument(
        "--compile", type=int, choices=(0, 1), default=0, help="1: torch.compile each block"
    )
    system.add_argument(
        "--gradient_checkpointing",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="1: saves most memory",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out_dir", default=str(ROOT / "out"), help="where weights and runs are written"
    )
    output.add_argument("--save_weight", default="grpo", help="name of the run and its weights")
    output.add_argument(
        "--save_interval",
        type=int,
        default=100,
        help="steps between checkpoints (0: only the last)",
    )
    output.add_argument("--save_total_limit", type=int, default=2, help="checkpoints that are kept")
    output.add_argument("--log_interval", type=int, default=10, help="steps between log lines")
    output.add_argument(
        "--eval_interval", type=int, default=0, help="steps between evaluations (0: at the end)"
    )
    output.add_argument(
        "--resume", default="none", help="none, auto (newest valid checkpoint) or a path"
    )
    output.add_argument(
        "--resume_with_changes", action="store_true", help="go on also where flags are others"
    )
    output.add_argument("--use_wandb", action="store_true", help="same as --report_to wandb")
    output.add_argument(
        "--report_to",
        nargs="+",
        choices=("none", "wandb", "tensorboard"),
        default=[],
        help="trackers",
    )
    return parser.parse_args(launch.command_line(parser))


def main() -> int:
    # 1. Flags, processes, seed
    args = parse_args()
    launch.check_flags(vars(args))
    if args.group_size < 2:
        raise ValueError(
            f"--group_size {args.group_size}: must be 2 or more, a completion is compared with its"
            " group"
        )
    low, high = CLIPS[args.loss_type]
    args.clip_low, args.clip_high = (
        b if a is None else a for a, b in ((args.clip_low, low), (args.clip_high, high))
    )
    args.device = init_distributed_mode(args)
    parallel.assert_same_on_all_ranks(launch.fingerprint(args.data_path, vars(args)))
    parallel.make_mesh(args.device, args.strategy, 1, 1, bool(args.offload))
    setup_seed(args.seed)

    # 2. Prompts, the plan of the epochs, and rewards
    tokenizer = load_tokenizer(args.tokenizer_dir)
    dataset = PromptDataset(
        args.data_path, tokenizer, args.max_seq_len, args.max_new_tokens, args.skip_bad
    )
    Logger(f"{args.data_path}: {describe_prompts(dataset)}")
    if args.preview:
        Logger(preview_prompts(dataset, tokenizer, args.preview))
        return 0
    train_rows, held_out = split_rows(len(dataset), args.eval_ratio, args.seed)
    args.global_batch_size = args.global_batch_size or args.batch_size * parallel.data_world()[1]
    order = (args.seed, args.max_seq_len, 0, args.global_batch_size, args.drop_last)
    plans = functools.partial(plan_epoch, dataset, train_rows, *order)
    steps_each = (
        args.updates_per_rollout * args.mini_batches
    )  # the last rollout is used up, whatever --max_steps says
    rollouts = sum(plans(epoch).steps for epoch in range(args.epochs))
    args.total_steps = steps_each * min(
        rollouts, math.ceil(args.max_steps / steps_each) or rollouts
    )
    args.peak_lr = scale_lr(args.learning_rate, args.lr_scaling, parallel.data_world()[1])
    judges = rewards.load_rewards(args.reward, len(tokenizer), args.max_seq_len, args.device)

    # 3. Precision: float16 alone needs its gradients scaled
    dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    autocast = (
        nullcontext()
        if dtype == "float32"
        else torch.autocast(args.device.type, getattr(torch, dtype))
    )
    scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0**14, enabled=dtype == "float16")

    # 4. The model, without dropout: the policy is compared with itself. The reference keeps the
    #    weights of the start.
    if args.dropout:
        Logger(
            f"--dropout {args.dropout} is taken as 0: a policy with dropout is not the one that"
            " wrote the rollout"
        )
    config = LMConfig.from_flags({**vars(args), "dropout": 0.0}, vocab_size=len(tokenizer))
    suffix = f"_{args.dim}{'_moe' if args.use_moe else ''}"
    run_dir = Path(args.out_dir) / f"{args.save_weight}{suffix}"
    model = MiniMindLM(config, args.gradient_checkpointing).to(args.device)
    apply_kernels(model, args.device, dtype)
    Logger(start_weights(model, args.from_weight, "full_sft", args.out_dir, suffix))
    reference = copy.deepcopy(model).eval().requires_grad_(False) if args.kl_beta else None
    identity = checkpoint.identity_of(vars(args), args.global_batch_size, dataset.key)
    identity |= (
        {"the weights of --from_weight": hash_weights(reference.state_dict())}
        if args.kl_beta
        else {}
    )
    found, changes = checkpoint.find_run(run_dir, args.resume, identity, args.resume_with_changes)

    # 5. Strategy, compile, wrap, optimizer. Sharded and compiled models leave the writing to a
    #    plain copy.
    args.strategy = parallel.choose_strategy(config, dataset, args, dtype)
    plain = args.strategy not in parallel.SHARDED and not args.compile
    spare = None if plain else copy.deepcopy(model).requires_grad_(False)
    model = parallel.wrap(model, args, dtype, math.inf)  # steps have any number of passes
    optimizer = make_optimizer(
        model, args.optimizer, args.peak_lr, args.weight_decay, args.strategy == "zero1"
    )
    progress = checkpoint.load_run(found, model, optimizer, scaler)

    # 6. Tracking
    tracker = parallel.rank_zero_first(
        lambda: Tracker(run_dir, vars(args), is_main_process(), found, changes)
    )
    steps = (
        f"{args.total_steps} steps, rollouts of {args.global_batch_size} x {args.group_size}"
        " completions"
    )
    steps += f", learning rate {args.peak_lr:g}"
    tracker.print(f"{run_dir.name}: {parallel.describe(model, args, dtype)}, {steps}")

    def save() -> None:
        tracker.sync()
        checkpoint.save_run(
            run_dir, args.save_total_limit, model, optimizer, scaler, progress, identity
        )
        save_weights(model, config, Path(f"{run_dir}.pth"))

    # 7. Epochs
    tries = rewards.bind(args, judges, dataset, tokenizer, autocast)
    tools = (spare, reference, tries, tokenizer)
    tracker.start(progress, args.total_steps)
    stop = launch.StopSignal()
    while progress["step"] < args.total_steps and not stop.number:
        plan = plans(progress["epoch"])
        how = (optimizer, scaler, autocast, tracker, progress, stop, save)
        train_epoch(args, plan, held_out, model, tools, *how)

    # 8. Clean up
    if (
        progress["step"] == tracker.first_step
    ):  # resumed behind the last step: the weights may be missing, or older
        save_weights(model, config, Path(f"{run_dir}.pth"))
    checkpoint.wait()
    ending = (
        f"stopped by signal {stop.number} at step {progress['step']}" if stop.number else "finished"
    )
    tracker.print(f"{ending}; weights in {run_dir}.pth")
    tracker.close()
    return 128 + stop.number if stop.number else 0


if __name__ == "__main__":
    launch.run(main)
