"""Direct preference optimisation (DPO; IPO, SimPO): make chosen answers likelier than rejected.

Reads  --data_path (pairs: chosen and rejected) and the weights of --from_weight, which are also the
       reference.
Writes out/dpo_512.pth with its .json, and out/dpo_512/: metrics.jsonl, training.log, checkpoints.

    python trainer/train_dpo.py
    torchrun --nproc_per_node 8 trainer/train_dpo.py --ddp
"""

import argparse
import copy
import functools
import math
import random
import sys
from collections.abc import Callable
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

from dataset.cached_dataset import describe
from dataset.packing import Plan, batches, plan_epoch
from dataset.preference_dataset import open_pairs
from model.lm import LMConfig, MiniMindLM
from model.preference_loss import METRICS, bradley_terry, logps_of, sum_metrics
from model.weight_hash import hash_weights
from runtime import checkpoint, launch, parallel
from runtime.device import choose_device
from runtime.kernel_loader import apply_kernels
from runtime.optim import make_optimizer, scale_lr
from runtime.run import Run
from runtime.start import open_start
from runtime.tracking import Tracker

Losses = tuple[Tensor, Tensor, Tensor]  # losses, rewards of chosen and rejected: (P,) each


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


def check_loss(args: argparse.Namespace) -> None:
    """Set --beta where it is not given, and refuse values that make no sense: ValueError."""
    if args.beta is None:
        args.beta = 2.0 if args.loss_type == "simpo" else 0.1
    smoothing = f"--label_smoothing {args.label_smoothing}"
    if not args.beta > 0:
        raise ValueError(f"--beta {args.beta}: must be positive")
    if not 0 <= args.label_smoothing < 0.5:
        raise ValueError(f"{smoothing}: must lie in [0, 0.5), it is a share of wrong labels")
    if args.label_smoothing and args.loss_type == "ipo":
        raise ValueError(f"{smoothing}: ipo has none, use --loss_type sigmoid or simpo")
    if not args.sft_weight >= 0:
        raise ValueError(f"--sft_weight {args.sft_weight}: must be 0 or more")


def dpo_loss(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> Losses:
    """Direct preference optimisation: the log-ratio of policy and reference, x beta, is the reward.

    Args:
        policy, reference: (P, 2) float32, log-probabilities of the chosen and rejected answers.

    Source: Rafailov et al., Direct Preference Optimization (2023), eq. 7.
    """
    chosen, rejected = (policy - reference).unbind(dim=1)
    losses = bradley_terry(beta * (chosen - rejected), label_smoothing)
    return losses, beta * chosen, beta * rejected


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


def preference_loss(args, policy: Tensor, lens: Tensor, reference: Tensor | None) -> Tensor:
    """The loss of --loss_type, and that of SFT on the chosen answers times --sft_weight.

    Args:
        policy, lens, reference: as in `ipo_loss`; simpo takes None for the reference.

    Returns:
        (5,) float32, METRICS summed over the pairs.

    Source: Pang et al., Iterative Reasoning Preference Optimization (2024), eq. 1: --sft_weight.
    """
    if args.loss_type == "sigmoid":
        losses, *rewards = dpo_loss(policy, reference, args.beta, args.label_smoothing)
    elif args.loss_type == "ipo":
        losses, *rewards = ipo_loss(policy, reference, lens, args.beta)
    else:
        options = (args.beta, args.simpo_gamma, args.label_smoothing)
        losses, *rewards = simpo_loss(policy, lens, *options)
    if args.sft_weight:
        losses = losses - args.sft_weight * policy[:, 0] / lens[:, 0]
    return sum_metrics(losses, *rewards)


def batch_loss(args, reference, model, *batch) -> tuple[Tensor, Tensor]:
    """`preference_loss` of a batch, and the auxiliary loss, a scalar.

    Args:
        reference: the frozen model; None for simpo, and where the batch has what it says.
        batch: X, Y, loss_mask, doc_lens of `PreferenceDataset.collate`, perhaps (P, 2)
            log-probabilities of the reference, and the device.
    """
    *inputs, device = batch
    policy, lens, aux_loss = logps_of(model, *inputs[:4], device)
    reference_logps = inputs[4].to(device) if len(inputs) > 4 else None
    if reference is not None:
        with torch.no_grad():
            reference_logps = logps_of(reference, *inputs[:4], device)[0]
    return preference_loss(args, policy, lens, reference_logps), aux_loss


def train_epoch(run: Run, plan: Plan, pairs, held_out: tuple, loss_of: Callable) -> None:
    """Train to the end of the epoch, to the last step of the run, or to a signal.

    Args:
        run: the run, whose counters say where in the epoch to begin.
        plan: the epoch's rows, an optimizer step a window.
        pairs: the dataset to train on.
        held_out: a dataset, and its rows (n,) to evaluate on; none for no evaluation.
        loss_of: (model, *batch, device) -> METRICS summed over the pairs, (5,); auxiliary loss.
    """
    args = run.args
    model = run.model
    optimizer = run.optimizer
    scaler = run.scaler
    share = (*parallel.data_world(), args.batch_size)
    windows = range(run.progress["step_in_epoch"], plan.steps)
    loader = batches(pairs, plan, windows, *share, args.num_workers, parallel.row_split())
    for window in windows:
        # 1. Learning rate
        warmup_steps = int(args.warmup_ratio * args.total_steps)
        lr = get_lr(run.step, args.total_steps, args.peak_lr, warmup_steps, args.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. Gradients. The loss is one mean over the pairs of the whole window, all micro-batches
        #    and all ranks, whose number the plan knows. Gradients are averaged over ranks, hence
        #    the factor `replicas`.
        tokens, supervised = plan.counts(window)
        n_pairs = plan.size(window)
        n_micro = len(plan.micro_batches(window, *share))
        window_sums = torch.zeros(len(METRICS), device=args.device)
        window_aux = torch.zeros((), device=args.device)
        for micro in range(n_micro):
            batch = next(loader)  # X, Y, loss_mask, doc_lens, perhaps the reference's log-probs
            with parallel.sync_gradients(model, micro == n_micro - 1):
                with run.autocast:
                    sums, aux_loss = loss_of(model, *batch, args.device)
                loss, aux_loss = sums[0] / n_pairs, aux_loss * (sum(batch[3]) / tokens)
                scaler.scale((loss + aux_loss) * parallel.replicas()).backward()
            window_sums, window_aux = window_sums + sums.detach(), window_aux + aux_loss.detach()

        # 3. Clip and step. All ranks have each other's numbers: all step, or all skip.
        scaler.unscale_(optimizer)
        grad_norm = parallel.clip_gradients(model, args.grad_clip)
        sums = (window_aux, float(run.stop.received), *window_sums)
        grad_norm, aux_loss, stopping, *sums = parallel.agree_on_step(grad_norm, *sums)
        means = [total / n_pairs for total in sums]
        is_finite = math.isfinite(means[0] + aux_loss + grad_norm)
        if is_finite:
            scaler.step(optimizer)
        scaler.update(None if is_finite else scaler.get_scale() / 2)  # the same scale on all ranks
        optimizer.zero_grad(set_to_none=True)

        # 4. Count, log, evaluate, save
        run.count_step(tokens, is_finite, means[0], grad_norm)
        metrics = {"aux_loss": aux_loss, "lr": lr, "pairs": n_pairs, "grad_norm": grad_norm}
        metrics |= {"tokens": tokens, "supervised_tokens": supervised}
        run.log_step(metrics | dict(zip(METRICS, means, strict=True)))
        if len(held_out[1]) and run.is_due(args.eval_interval):
            from runtime.evaluation import evaluate_pairs

            metrics = evaluate_pairs(run, loss_of, *held_out, METRICS)
            run.log({"step": run.step} | metrics)
        if run.end_step(stopping):
            return
    run.progress.update(epoch=run.progress["epoch"] + 1, step_in_epoch=0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument("--config", help="YAML file with defaults for these flags")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=str(ROOT / "dataset/demo/preferences.jsonl"), help="training data")
    add("--tokenizer_dir", help="tokenizer folder (default: that of the weights, else our own)")
    add("--chat_template", help="Jinja file, instead of the tokenizer's own chat template")
    add("--cache_dir", help="where token caches live (default: out/cache)")
    add("--max_seq_len", type=int, help="longest row in tokens; the context is at least that")
    add("--packing", type=int, choices=(0, 1), default=1, help="1: a row is a pack of documents")
    add("--curriculum", default="none", help="easy first: none, length, field:NAME")
    add("--skip_bad", action="store_true", help="leave bad rows out and count them")
    add("--eval_ratio", type=float, default=0.0, help="share of the rows held out for evaluation")
    add("--eval_data", help="file of held-out pairs, instead of --eval_ratio")
    add("--num_workers", type=int, default=0, help="processes that read data")
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

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--max_steps", type=int, default=0, help="stop after so many optimizer steps (0: no limit)")
    add("--batch_size", type=int, default=8, help="rows per process and micro-batch")
    add("--accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--global_batch_size", type=int, help="rows per optimizer step (default: their product)")
    add("--learning_rate", type=float, default=1e-5, help="peak learning rate")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up")
    schedules = ("cosine", "linear", "constant", "wsd")
    add("--lr_schedule", choices=schedules, default="cosine", help="learning rate behind warm-up")
    scalings = ("none", "linear", "sqrt")
    add("--lr_scaling", choices=scalings, default="none", help="learning rate by data ranks")
    add("--loss_type", choices=("sigmoid", "ipo", "simpo"), default="sigmoid", help="sigmoid: DPO")
    add("--beta", type=float, help="less: farther from the reference (default: 0.1, simpo: 2)")
    add("--label_smoothing", type=float, default=0.0, help="share of pairs labelled the wrong way")
    add("--simpo_gamma", type=float, default=1.0, help="simpo: margin of the rewards to exceed")
    add("--sft_weight", type=float, default=0.0, help="weight of SFT's loss on the chosen answers")
    add("--cache_reference", type=int, choices=(0, 1), default=0, help="1: ask the reference once")
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
    add("--save_weight", default="dpo", help="name of the run and its weights")
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
    check_loss(args)
    args.device = init_distributed_mode(args)
    parallel.make_mesh(args)
    setup_seed(args.seed)

    # 2. Data and the plan of the epochs. Rank 0 tokenises, the others then find the cache.
    dataset, train_rows, *held_out = parallel.rank_zero_first(
        lambda: open_pairs(vars(args), start.tokenizer)
    )
    counts = f"--- {describe(dataset)}"
    if args.preview:
        from dataset.preview import show_pairs

        Logger(show_pairs(dataset, start.tokenizer, args.preview, sys.stdout.isatty()) + counts)
        return 0
    Logger(counts)
    data_ranks = parallel.data_world()[1]
    global_batch = args.global_batch_size or args.batch_size * args.accumulation_steps * data_ranks
    order = (args.seed, args.max_seq_len, args.packing, global_batch, 0)
    plans = functools.partial(plan_epoch, dataset, train_rows, *order)
    steps = sum(plans(epoch).steps for epoch in range(args.epochs))
    args.total_steps = min(args.max_steps or math.inf, steps)
    args.peak_lr = scale_lr(args.learning_rate, args.lr_scaling, data_ranks)

    # 3. Precision: float16 alone needs its gradients scaled
    dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    autocast = nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(args.device.type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0**14, enabled=dtype == "float16")

    # 4. Strategy and model, also the reference: tensors of a checkpoint come in step 5. Without
    #    dropout, or the two would differ
    if args.dropout:
        Logger(f"--dropout {args.dropout}: left out, as the policy is compared with the reference")
    config = replace(start.config, dropout=0.0)
    make = functools.partial(MiniMindLM, config, args.gradient_checkpointing)
    run_dir = start.run_dir
    args.strategy = parallel.choose_strategy(config, dataset, args, dtype)
    model = start.build(make, args)
    apply_kernels(model, args.device, dtype)
    weights, reference = {}, None
    if args.loss_type != "simpo":
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        if start.fill:  # processes that share a model share the reference, too
            from runtime.frozen import wrap_frozen

            reference = wrap_frozen(reference, args, dtype, start.fill)
        weights = {"the weights of --from_weight": hash_weights(reference.state_dict())}
    identity = checkpoint.identity_of(vars(args), global_batch, dataset.key) | weights
    identity |= {"the data of --eval_data": held_out[0].key} if args.eval_data else {}
    resumed, changes = checkpoint.find_run(run_dir, args.resume, identity, args.resume_with_changes)
    if args.cache_reference and weights:
        from runtime.reference import attach_reference

        options = (reference, args, autocast, dtype, weights)
        dataset = attach_reference(dataset, *options)
        held_out[0] = attach_reference(held_out[0], *options)
        reference = None
    loss_of = functools.partial(batch_loss, args, reference)

    # 5. Strategy, compile, wrap, optimizer. Every rank has the same model, but its own dropout.
    setup_seed(args.seed + parallel.world()[0])
    model = parallel.wrap(model, args, dtype, global_batch, start.fill)
    shard = args.strategy == "zero1"
    optimizer = make_optimizer(model, args.optimizer, args.peak_lr, args.weight_decay, shard)
    progress = checkpoint.load_run(resumed, model, optimizer, scaler)

    # 6. Tracking
    tracker = parallel.rank_zero_first(
        lambda: Tracker(run_dir, vars(args), is_main_process(), resumed, changes)
    )
    steps = f"{args.total_steps} steps of {global_batch} rows, learning rate {args.peak_lr:g}"
    tracker.print(f"{run_dir.name}: {parallel.describe(model, args, dtype)}, {steps}")

    def save() -> None:
        tracker.sync()
        state = (model, optimizer, scaler, progress, identity)
        checkpoint.save_run(run_dir, args.save_total_limit, *state)
        save_weights(model, config, Path(f"{run_dir}.pth"))

    # 7. Epochs
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
        train_epoch(run, plans(progress["epoch"]), dataset, held_out, loss_of)

    # 8. Clean up. Resumed behind the last step, the weights may be missing, or older.
    if run.step == tracker.first_step:
        save_weights(model, config, Path(f"{run_dir}.pth"))
    return run.finish(f"weights in {run_dir}.pth")


if __name__ == "__main__":
    launch.run(main)
