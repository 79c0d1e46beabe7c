"""Time until the held-out loss that the classical loop ends with: the same data, model and machine.

The classical loop trains one epoch, 16 rows a step, with AdamW, the default learning rate and its
cosine. Ours is trainer/train_full_sft.py with Muon, as a user starts it, for longer and longer
schedules until one ends at that loss or below. The time of that run alone counts, from the start of
its process to the end.
"""

import json
import random
import tempfile
import time
from pathlib import Path

import torch
from common import TOKENIZER, dtypes, figure, model_of
from training import ROWS, Loop, classical

from benchmarks.demo_model import run
from dataset.lm_dataset import SFTDataset, load_tokenizer
from model.weights import load_model
from trainer.train_full_sft import get_lr, sft_loss

SHAPE = {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 768}
FLAGS = (
    "--optimizer muon --learning_rate 1e-2 --batch_size 2 --from_weight none --save_interval 0"
    " --device cpu"
)


@torch.no_grad()
def held_out_loss(model, dataset: SFTDataset) -> float:
    model.eval()
    rows = ([dataset[row]] for row in range(len(dataset)))
    return (
        sum(sft_loss(model, *SFTDataset.collate(row), "cpu")[0].item() for row in rows)
        / dataset.supervised.sum()
    )


def measure(args) -> list[dict]:
    raw = [row for path in args.data_path for row in json.loads(Path(path).read_text("utf-8"))]
    random.Random(0).shuffle(raw)
    kind, tokenizer = dtypes(torch.device("cpu"))[-1], load_tokenizer(TOKENIZER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"held_out": raw[:200], "train": raw[200 : 200 + args.loss_rows]}
        for part, rows in parts.items():
            (folder / f"{part}.json").write_text(json.dumps(rows))
        held_out, train = (
            SFTDataset(folder / f"{part}.json", tokenizer, 768, folder / "cache") for part in parts
        )

        loop, steps = (
            Loop(model_of("cpu", **SHAPE, vocab_size=6400), torch.device("cpu"), kind, classical),
            0,
        )
        order, begin = torch.randperm(len(train)).split(ROWS), time.perf_counter()
        for steps, rows in enumerate(order):
            for group in loop.optimizer.param_groups:
                group["lr"] = get_lr(steps, len(order), 5e-4, len(order) // 33)
            loop.step([train[row] for row in rows.tolist()])
        theirs = time.perf_counter() - begin
        target, found = held_out_loss(loop.model, held_out), None
        print(
            f"classical loop, {kind}: {len(order)} steps in {theirs:.0f} s, held-out loss"
            f" {target:.4f}",
            flush=True,
        )
        shape = [f"--{key}={value}" for key, value in SHAPE.items()]
        for max_steps in args.loss_steps:
            flags = [
                *FLAGS.split(),
                *shape,
                f"--data_path={folder / 'train.json'}",
                f"--cache_dir={folder / 'cache'}",
            ]
            seconds = run("trainer/train_full_sft.py", *flags, f"--out_dir={folder}", f"--dtype={kind}",
                          "--epochs=9", f"--max_steps={max_steps}")  # fmt: skip
            loss = held_out_loss(load_model(folder / f"full_sft_{SHAPE['dim']}.pth"), held_out)
            print(f"ours, {max_steps} steps: {seconds:.0f} s, held-out loss {loss:.4f}", flush=True)
            if loss <= target:
                found = seconds
                break
    what = "time to the classical loop's held-out loss: its wall time / ours"
    return [
        figure(
            what,
            theirs / found if found else 0.0,
            least=10.0,
            detail=f"{theirs:.0f} s, loss {target:.3f}",
        )
    ]
