"""Direct preference optimisation (DPO, or IPO, SimPO): make the chosen answers likelier than the
rejected ones.

Reads  --data_path (pairs: chosen and rejected) and the weights of --from_weight, which are also the
       reference.
Writes out/dpo_512.pth with its .json, and out/dpo_512/: metrics.jsonl, training.log, checkpoints.

    python trainer/train_dpo.py
    torchrun --nproc_per_node 8 trainer/train_dpo.py --ddp
"""

import argparse
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
from dataset.packing import batches, plan_epoch
from dataset.preference_dataset import open_pairs, preview_pairs
from model.lm import LMConfig, MiniMindLM
from model.preference_loss import METRICS, choose_beta, choose_loss
from model.weights import start_weights
from runtime import checkpoint, launch, parallel
from runtime.evaluation import evaluate_pairs
from runtime.kernel_loader import apply_kernels
from runtime.optim import make_optimizer, scale_lr
from runtime.reference import Reference, logps_of
from runtime.tracking import Tracker


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


def dpo_loss(preference_loss, reference, model, *batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of --loss_type, see model/preference_loss.py. Args: batch: of `dataset.collate`, and
    then the device.

    Returns: (5,) float32, METRICS summed over the pairs, of which the loss has gradients; the
    auxiliary loss, a scalar.
    """
    policy, lens, aux_loss = logps_of(model, *batch[:4], batch[-1])
    return preference_loss(policy, lens, reference(*batch)), aux_loss


def train_epoch(
    args,
    plan,
    data,
    held_out,
    loss_of,
    model,
    optimizer,
    scaler,
    autocast,
    tracker,
    progress,
    stop,
    save,
):
    """Train from the step in `progress` to the end of the epoch, to the last step of the run, or to
    a signal."""
    share, windows = (
        (*parallel.data_world(), args.batch_size),
        range(progress["step_in_epoch"], plan.steps),
    )
    loader = batches(data, plan, windows, *share, args.num_workers, parallel.row_split())
    for window in windows:
        # 1. Learning rate
        warmup_steps = int(args.warmup_ratio * args.total_steps)
        lr = get_lr(
            progress["step"], args.total_steps, args.peak_lr, warmup_steps, args.lr_schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. Gradients. The loss is one mean over the pairs of the whole window, all micro-batches
        #    and all ranks, whose number the plan knows. Gradients are averaged over ranks, hence
        #    the factor `replicas`.
        (tokens, supervised), pairs = plan.counts(window), plan.size(window)
        n_micro = len(plan.micro_batches(window, *share))
        window_sums, window_aux = (
            torch.zeros(len(METRICS), device=args.device),
            torch.zeros((), device=args.device),
        )
        for micro in range(n_micro):
            batch = next(
                loader
            )  # X, Y, loss_mask, doc_lens, perhaps log-probabilities of the reference
            with parallel.sync_gradients(model, micro == n_micro - 1):
                with autocast:
                    sums, aux_loss = loss_of(model, *batch, args.device)
                sums, aux_loss = sums / pairs, aux_loss * (sum(batch[3]) / tokens)
                scaler.scale((sums[0] + aux_loss) * parallel.replicas()).backward()
            window_sums, window_aux = window_sums + sums.detach(), window_aux + aux_loss.detach()

        # 3. Clip and step. All ranks have each other's numbers, so all of them step or all of them
        #    skip.
        scaler.unscale_(optimizer)
        grad_norm = parallel.clip_gradients(model, args.grad_clip)
        sums = (window_aux, float(stop.received), *window_sums)
        grad_norm, aux_loss, stopping, *means = parallel.agree_on_step(grad_norm, *sums)
        finite = math.isfinite(means[0] + aux_loss + grad_norm)
        if finite:
            scaler.step(optimizer)
        scaler.update(None if finite else scaler.get_scale() / 2)  # the same scale on all ranks
        optimizer.zero_grad(set_to_none=True)

        # 4. Count, log, evaluate, save
        progress["step"] += 1
        progress["step_in_epoch"] += 1
        progress["tokens"] += tokens
        step, done = progress["step"], progress["step"] == args.total_steps
        tracker.count_skipped(progress, finite, f"loss {means[0]}, gradient norm {grad_norm}")
        if step % args.log_interval == 0 or step == 1 or done:
            metrics = {
                "step": step,
                "epoch": progress["epoch"] + 1,
                "aux_loss": aux_loss,
                "lr": lr,
                "pairs": pairs,
            }
            metrics |= {"grad_norm": grad_norm, "tokens": tokens, "supervised_tokens": supervised}
            tracker.log(
                metrics
                | dict(zip(METRICS, means, strict=True))
                | {"total_tokens": progress["tokens"]}
            )
        if len(held_out[1]) and (done or args.eval_interval and step % args.eval_interval == 0):
            how = (args.batch_size, autocast, args.device)
            tracker.log({"step": step} | evaluate_pairs(loss_of, model, *held_out, *how))
        stop.sync_stop(stopping)
        parallel.check_replicas(model, step, args.replica_check)
        if stopping or done or args.save_interval and step % args.save_interval == 0:
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
        "--data_path", default=str(ROOT / "dataset/demo/preferences.jsonl"), help="training data"
    )
    data.add_argument(
        "--tokenizer_dir", default=str(ROOT / "model/minimind_tokenizer"), help="tokenizer folder"
    )
    data.add_argument("--cache_dir", help="where token caches live (default: out/cache)")
    data.add_argument(
        "--max_seq_len",
        type=int,
        default=512,
        help="longest row, and context of the model, in tokens",
    )
    data.add_argument(
        "--packing", type=int, choices=(0, 1), default=1, help="1: a row is a pack of documents"
    )
    data.add_argument("--curriculum", default="none", help="easy first: none, length, field:NAME")
    data.add_argument("--skip_bad", action="store_true", help="leave bad rows out and count them")
    data.add_argument(
        "--eval_ratio", type=float, default=0.0, help="share of the rows held out for evaluation"
    )
    data.add_argument("--eval_data", help="file of held-out pairs, instead of --eval_ratio")
    data.add_argument("--num_workers", type=int, default=0, help="processes that read data")
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
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, default=1, help="passes over the data")
    optim.add_argument(
        "--max_steps", type=int, default=0, help="stop after so many optimizer steps (0: no limit)"
    )
    optim.add_argument("--batch_size", type=int, default=8, help="rows per process and micro-batch")
    optim.add_argument(
        "--accumulation_steps", type=int, default=1, help="micro-batches per optimizer step"
    )
    optim.add_argument(
        "--global_batch_size",
        type=int,
        help="rows per optimizer step (default: product of the others)",
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
        "--loss_type",
        choices=("sigmoid", "ipo", "simpo"),
        default="sigmoid",
        help="sigmoid: DPO's own",
    )
    optim.add_argument(
        "--beta", type=float, help="less: farther from the reference (default: 0.1, simpo: 2)"
    )
    optim.add_argument(
        "--label_smoothing",
        type=float,
        default=0.0,
        help="share of pairs that may be labelled wrongly",
    )
    optim.add_argument(
        "--simpo_gamma", type=float, default=1.0, help="simpo: margin of the rewards to exceed"
    )
    optim.add_argument(
        "--sft_weight",
        type=float,
        default=0.0,
        help="weight of the loss of SFT on the chosen answers",
    )
    optim.add_argument(
        "--cache_reference",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: run the reference only once",
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
    output.add_argument("--save_weight", default="dpo", help="name of the run and its weights")
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
    args.device = init_distributed_mode(args)
    parallel.assert_same_on_all_ranks(launch.fingerprint(args.data_path, vars(args)))
    parallel.make_mesh(args.device, args.strategy, 1, 1, bool(args.offload))
    setup_seed(args.seed)

    # 2. Data and the plan of the epochs. Rank 0 tokenises, the others then find the cache.
    tokenizer = load_tokenizer(args.tokenizer_dir)
    dataset, rows, *held_out = parallel.rank_zero_first(lambda: open_pairs(vars(args), tokenizer))
    Logger(preview_pairs(dataset, tokenizer, args.preview, colour=sys.stdout.isatty()))
    if args.preview:
        return 0
    global_batch = (
        args.global_batch_size
        or args.batch_size * args.accumulation_steps * parallel.data_world()[1]
    )
    plans = functools.partial(
        plan_epoch, dataset, rows, args.seed, args.max_seq_len, args.packing, global_batch, 0
    )
    args.total_steps = min(
        args.max_steps or math.inf, sum(plans(epoch).steps for epoch in range(args.epochs))
    )
    args.peak_lr = scale_lr(args.learning_rate, args.lr_scaling, parallel.data_world()[1])

    # 3. Precision: float16 alone needs its gradients scaled
    dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    autocast = (
        nullcontext()
        if dtype == "float32"
        else torch.autocast(args.device.type, getattr(torch, dtype))
    )
    scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0**14, enabled=dtype == "float16")

    # 4. The model, also the reference: tensors of a checkpoint come in step 5. Without dropout, or
    #    the two would differ
    if args.dropout:
        Logger(f"--dropout {args.dropout}: left out, as the policy is compared with the reference")
    config = LMConfig.from_flags({**vars(args), "dropout": 0.0}, vocab_size=len(tokenizer))
    suffix = f"_{args.dim}{'_moe' if args.use_moe else ''}"
    run_dir = Path(args.out_dir) / f"{args.save_weight}{suffix}"
    model = MiniMindLM(config, args.gradient_checkpointing).to(args.device)
    apply_kernels(model, args.device, dtype)
    Logger(start_weights(model, args.from_weight, "full_sft", args.out_dir, suffix))
    reference = Reference(model, vars(args), autocast, dtype)
    args.beta = choose_beta(vars(args))
    identity = checkpoint.identity_of(vars(args), global_batch, dataset.key) | reference.identity
    identity |= {"the data of --eval_data": held_out[0].key} if args.eval_data else {}
    found, changes = checkpoint.find_run(run_dir, args.resume, identity, args.resume_with_changes)
    dataset, held_out[0] = reference.attach(dataset), reference.attach(held_out[0])
    loss_of = functools.partial(dpo_loss, choose_loss(vars(args)), reference)

    # 5. Strategy, compile, wrap, optimizer
    setup_seed(
        args.seed + parallel.world()[0]
    )  # one model everywhere, but dropout of its own on every rank
    args.strategy = parallel.choose_strategy(config, dataset, args, dtype)
    model = parallel.wrap(model, args, dtype, global_batch)
    optimizer = make_optimizer(
        model, args.optimizer, args.peak_lr, args.weight_decay, args.strategy == "zero1"
    )
    progress = checkpoint.load_run(found, model, optimizer, scaler)

    # 6. Tracking
    tracker = parallel.rank_zero_first(
        lambda: Tracker(run_dir, vars(args), is_main_process(), found, changes)
    )
    steps = f"{args.total_steps} steps of {global_batch} rows, learning rate {args.peak_lr:g}"
    tracker.print(f"{run_dir.name}: {parallel.describe(model, args, dtype)}, {steps}")

    def save() -> None:
        tracker.sync()
        checkpoint.save_run(
            run_dir, args.save_total_limit, model, optimizer, scaler, progress, identity
        )
        save_weights(model, config, Path(f"{run_dir}.pth"))

    # 7. Epochs
    tracker.start(progress, args.total_steps)
    stop = launch.StopSignal()
    rest = (held_out, loss_of, model, optimizer, scaler, autocast, tracker, progress, stop, save)
    while progress["step"] < args.total_steps and not stop.number:
        train_epoch(args, plans(progress["epoch"]), dataset, *rest)

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
