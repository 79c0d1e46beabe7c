"""Supervised tokens per second of our SFT step against the classical loop, on the same rows, in one run.

The classical loop pads every row to max_seq_len, computes logits for every token and works in float32. Ours lays the
rows one behind the other, computes logits for supervised tokens alone, and is run in float32 and bfloat16. Model,
optimizer, rows and global batch are the same; the variants take turns, and the medians of the paired ratios count.

    python benchmarks/sft_throughput.py --data_path alpaca_en.json alpaca_zh.json
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import SFTDataset
from model.lm import LMConfig, MiniMindLM
from runtime.optim import make_optimizer
from trainer.train_full_sft import sft_loss


def classical_loss(model, samples, max_seq_len, device):
    """Every row padded to max_seq_len; cross-entropy of every position, then masked: mean over supervised tokens."""
    X, Y, loss_mask = (torch.zeros(len(samples), max_seq_len, dtype=torch.int64) for _ in range(3))
    for row, sample in enumerate(samples):
        for padded, values in zip((X, Y, loss_mask), sample, strict=True):
            padded[row, : len(values)] = values
    X, Y, loss_mask = X.to(device), Y.to(device), loss_mask.to(device)
    logits = model(X).logits
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), Y.view(-1), reduction="none").view(Y.size())
    return (loss * loss_mask).sum() / loss_mask.sum()


def our_loss(model, samples, max_seq_len, device):
    X, Y, loss_mask, doc_lens = SFTDataset.collate(samples)
    loss, _ = sft_loss(model, X, Y, loss_mask, doc_lens, device)
    return loss / loss_mask.sum()


def step(model, optimizer, loss_of, micro_batches, max_seq_len, autocast, device) -> float:
    """One optimizer step; seconds."""
    begin = time.perf_counter()
    for samples in micro_batches:
        with autocast:
            loss = loss_of(model, samples, max_seq_len, device)
        (loss / len(micro_batches)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", nargs="+", default=[str(ROOT / "dataset/demo/sft.jsonl")], help="SFT data")
    parser.add_argument("--dim", type=int, default=512, help="width")
    parser.add_argument("--n_layers", type=int, default=8, help="blocks")
    parser.add_argument("--max_seq_len", type=int, default=768, help="length that the classical loop pads to")
    parser.add_argument("--rows", type=int, default=16, help="rows per optimizer step")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model/minimind_tokenizer")
    datasets = [SFTDataset(path, tokenizer, args.max_seq_len) for path in args.data_path]
    rows = [dataset[row] for dataset in datasets for row in range(len(dataset))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()

    config = LMConfig(dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer), max_seq_len=args.max_seq_len)
    variants = {  # name: loss, rows per micro-batch, autocast
        "classical float32": (classical_loss, 4, nullcontext()),
        "ours float32": (our_loss, args.rows, nullcontext()),
        "ours bfloat16": (our_loss, args.rows, torch.autocast(args.device, torch.bfloat16)),
    }
    models = {}
    for name in variants:
        torch.manual_seed(0)
        model = MiniMindLM(config).to(args.device)
        models[name] = model, make_optimizer(model, "adamw", 1e-4, 0.1)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(args.rounds + 1):  # the first round warms up
        chosen = [rows[order[(round_ * args.rows + n) % len(rows)]] for n in range(args.rows)]
        supervised = sum(int(sample[2].sum()) for sample in chosen)
        for name, (loss_of, size, autocast) in variants.items():
            micro_batches = [chosen[at : at + size] for at in range(0, len(chosen), size)]
            seconds = step(*models[name], loss_of, micro_batches, args.max_seq_len, autocast, args.device)
            if round_:
                rates[name].append(supervised / seconds)

    share = sum(len(sample[0]) for sample in rows) / len(rows) / args.max_seq_len
    print(f"dim {args.dim} x {args.n_layers}, {sum(p.numel() for p in models['ours float32'][0].parameters()):,} "
          f"parameters, {args.rows} rows a step, {args.threads} threads, torch {torch.__version__}; the average row "
          f"fills {share:.0%} of max_seq_len {args.max_seq_len}")  # fmt: skip
    table = {}
    for name, values in rates.items():
        ratio = statistics.median(ours / base for ours, base in zip(values, rates["classical float32"], strict=True))
        table[name] = {"supervised_tokens_per_sec": statistics.median(values), "ratio": ratio}
        print(f"{name:20} {statistics.median(values):9,.0f} supervised tokens/s   {ratio:5.2f} x classical")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
