"""LoRA fine-tuning of a model of SmolLM2-135M's shape: trainer/train_lora.py against TRL with PEFT.

Both train the same rows once, in bfloat16, with the same layers, rank, learning rate and rows per
optimizer step. TRL takes its rows as it does best: padded (alike lengths together), padding-free or
packed, the frozen base in float32 or in bfloat16. What counts is supervised tokens per second from
the second step on, one process after the other in turns, and the highest memory of each.

    python benchmarks/finetune_speed.py                                  # random weights
    python benchmarks/finetune_speed.py --folder SmolLM2-135M-Instruct

Needs `pip install trl peft`.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOAL = 2.5  # times TRL's best
RANK, ALPHA, RATE = 8, 16, 1e-3
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
LAYOUTS = {
    "padded": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
}
PEERS = [f"{kind}, {dtype} base" for kind in LAYOUTS for dtype in ("float32", "bfloat16")]


def write_random_weights(folder: Path) -> None:
    """A folder with random weights of SmolLM2-135M's shape, and the tokenizer of the project."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    sizes |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1e5}
    LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "model/minimind_tokenizer").save_pretrained(folder)


def write_rows(source: Path, target: Path, count: int) -> None:
    """The first conversations of a file."""
    with open(source, encoding="utf-8") as lines:
        rows = list(itertools.islice(lines, count))
    if len(rows) < count:
        sys.exit(f"{source}: {len(rows)} rows, {count} are needed: take fewer --steps")
    target.write_text("".join(rows), encoding="utf-8")


def run(command: list[str]) -> tuple[str, float]:
    """What a process printed, and its highest memory in GiB."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            code = os.waitstatus_to_exitcode(status)
            sys.exit(f"{' '.join(command)} ended with {code}\n{printed}{errors.read()}")
    return printed, usage.ru_maxrss / 2**20


def ours(folder: Path, rows: Path, out: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Supervised tokens per second of trainer/train_lora.py, and its memory."""
    flags = {"from_weight": folder, "data_path": rows, "out_dir": out, "dtype": "bfloat16"}
    flags |= {"packing": 0, "batch_size": args.step_rows, "max_seq_len": 512, "log_interval": 1}
    flags |= {"lora_rank": RANK, "lora_alpha": ALPHA, "learning_rate": RATE, "save_interval": 0}
    words = [f"--{name}={value}" for name, value in flags.items()]
    _, memory = run(["trainer/train_lora.py", *words])
    lines = (out / "lora_576/metrics.jsonl").read_text().splitlines()[1:]
    steps = [json.loads(line) for line in lines]
    seconds = sum(step["tokens"] / step["tokens_per_sec"] for step in steps)
    return sum(step["supervised_tokens"] for step in steps) / seconds, memory


def peer(name: str, folder: Path, rows: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Supervised tokens per second of TRL with PEFT, and its memory."""
    words = ["--peer", name, "--folder", str(folder), "--data_path", str(rows)]
    words += ["--step_rows", str(args.step_rows)]
    printed, memory = run(["benchmarks/finetune_speed.py", *words])
    return float(printed.splitlines()[-1]), memory


def train_peer(args: argparse.Namespace) -> None:
    """In a process of its own: train with TRL, print the supervised tokens per second."""
    import time

    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    table, supervised = read_table(args)
    layout, dtype = args.peer.removesuffix(" base").split(", ")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, dtype)
    )
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    micro, accumulation = args.step_rows, 1
    if layout != "packed":  # all rows at once are slower
        micro, accumulation = args.step_rows // 4, 4
    else:  # as many tokens in a step: a pack has several rows
        mean = sum(map(len, table["input_ids"])) / len(table["input_ids"])
        micro = max(1, round(args.step_rows * mean / 513))
    options = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation,
        "max_length": 513, "bf16": True, "optim": "adamw_torch_fused", "learning_rate": RATE,
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "num_train_epochs": 1, "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model,
            SFTConfig(out, **options | LAYOUTS[layout]),
            train_dataset=Dataset.from_dict(table),
            processing_class=transformers.AutoTokenizer.from_pretrained(args.folder),
            peft_config=lora,
            callbacks=[Clock()],
        )
        trainer.train()
    share = (len(ends) - 1) / len(ends)  # of the tokens, in all steps but the first
    print(supervised * share / (ends[-1] - ends[0]))


def read_table(args: argparse.Namespace) -> tuple[dict[str, list], int]:
    """Token ids and labels as our data set makes them, so that both learn the same tokens."""
    sys.path.insert(0, str(ROOT))
    from dataset.lm_dataset import SFTDataset, load_tokenizer

    rows = SFTDataset(args.data_path, load_tokenizer(args.folder), 512)
    table: dict[str, list] = {"input_ids": [], "labels": []}
    for X, Y, mask in (rows[n] for n in range(len(rows))):
        table["input_ids"].append([*X.tolist(), int(Y[-1])])
        table["labels"].append([-100, *Y.where(mask.bool(), -100).tolist()])
    return table, int(rows.supervised.sum())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="weights in Hugging Face's format (default: random ones)")
    parser.add_argument("--data_path", default=str(ROOT / "dataset/demo/sft.jsonl"), help="rows")
    parser.add_argument("--step_rows", type=int, default=32, help="rows of an optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=1, help="turns that each of them takes")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="how TRL is run")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.peer:
        train_peer(args)
        return 0
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = Path(args.folder or work / "random")
        if not args.folder:
            code = f"from finetune_speed import *; write_random_weights(Path({str(folder)!r}))"
            environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
            subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        write_rows(Path(args.data_path), work / "rows.jsonl", args.steps * args.step_rows)
        for turn in range(args.rounds):
            for kind in ("ours", *args.peers):
                if kind == "ours":
                    done = ours(folder, work / "rows.jsonl", work / f"out{turn}", args)
                else:
                    done = peer(kind, folder, work / "rows.jsonl", args)
                results.setdefault(kind, []).append(done)
                print(
                    f"{kind:28} {done[0]:8.1f} supervised tokens/s, {done[1]:.2f} GiB", flush=True
                )
    medians = {kind: statistics.median(rate for rate, _ in of) for kind, of in results.items()}
    best = max(args.peers, key=medians.__getitem__)
    times = medians["ours"] / medians[best]
    print(f"{times:.2f} x TRL + PEFT ({best}); the goal is {GOAL} x")
    return int(times < GOAL)


if __name__ == "__main__":
    sys.exit(main())
