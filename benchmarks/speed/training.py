"""SFT steps of this project and of its peers on the same rows: supervised tokens per second.

The classical loop pads every row to max_seq_len, computes logits for all tokens, and waits for the
loss of every micro-batch. TRL's SFTTrainer runs padding-free and packed, transformers' Trainer pads
to the longest row of a batch, grouped by length; both with a fused AdamW. LitGPT is its model in
its own loop's form: padded to the longest row, its chunked cross-entropy. All have the same shape
of model, the same rows, and as many rows (or their tokens) per step: 16, in padded micro-batches of
4, or on a GPU what --step_rows says, in micro-batches of a quarter.
"""

import contextlib
import functools
import importlib.util
import io
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from common import (
    Sample,
    autocast,
    dtypes,
    figure,
    in_turn,
    matrix_peak,
    model_of,
    qwen,
    ratio,
    samples_of,
    seconds_of,
    step_flops,
    supervised,
)

from dataset.lm_dataset import SFTDataset, load_tokenizer
from kernels.compiling import compile_blocks
from runtime import parallel
from runtime.optim import make_optimizer
from trainer.train_full_sft import sft_loss

ROWS = 16  # of a step, by default


def padded(samples: list[Sample], length: int, ignore: int = 0) -> list[torch.Tensor]:
    """X, Y and mask (rows, length)."""
    parts = [torch.zeros(len(samples), length, dtype=torch.int64) for _ in range(3)]
    for row, sample in enumerate(samples):
        for part, values in zip(parts, sample, strict=True):
            part[row, : len(values)] = values
    parts[1][parts[2] == 0] = ignore
    return parts


class Loop:
    """A model with its own optimizer, trained by a function from rows to gradients."""

    def __init__(self, model, device, dtype: str, gradients, step_rows: int = ROWS):
        self.model, self.device, self.dtype, self.gradients = model, device, dtype, gradients
        self.step_rows, self.micro_rows = step_rows, step_rows // 4
        self.optimizer = make_optimizer(model, "adamw", 1e-4, 0.1)

    def __call__(self, rows: list[Sample]) -> float:
        steps = [rows[at : at + self.step_rows] for at in range(0, len(rows), self.step_rows)]
        return seconds_of(lambda: [self.step(step) for step in steps], self.device)

    def step(self, rows: list[Sample]) -> None:
        self.gradients(self, rows)
        self.update()

    def update(self) -> None:
        parallel.clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def ours(loop: Loop, rows: list[Sample]) -> None:
    X, Y, mask, lens = SFTDataset.collate(rows)
    with parallel.sync_gradients(loop.model, True):
        with autocast(loop.device, loop.dtype):
            loss, aux_loss = sft_loss(loop.model, X, Y, mask, lens, loop.device)
        (loss / mask.sum() + aux_loss).backward()


def classical(loop: Loop, rows: list[Sample]) -> None:
    for at in range(0, len(rows), loop.micro_rows):
        part = rows[at : at + loop.micro_rows]
        X, Y, mask = (t.to(loop.device) for t in padded(part, loop.model.config.max_seq_len))
        with autocast(loop.device, loop.dtype):
            logits = loop.model(X).logits
            loss = F.cross_entropy(
                logits.view(-1, logits.size(-1)), Y.view(-1), reduction="none"
            ).view(Y.size())
            loss = (loss * mask).sum() / mask.sum() / (len(rows) / loop.micro_rows)
        loss.backward()
        loss.item()


def litgpt(loop: Loop, rows: list[Sample]) -> None:
    from litgpt.utils import chunked_cross_entropy

    for at in range(0, len(rows), loop.micro_rows):
        part = rows[at : at + loop.micro_rows]
        X, Y, _ = (
            t.to(loop.device)
            for t in padded(part, max(len(sample[0]) for sample in part), ignore=-100)
        )
        with autocast(loop.device, loop.dtype):
            logits = loop.model(X, lm_head_chunk_size=128)
            loss = chunked_cross_entropy(logits, Y, chunk_size=128) / (len(rows) / loop.micro_rows)
        loss.backward()


def litgpt_model(config, device):
    from litgpt.config import Config
    from litgpt.model import GPT

    torch.manual_seed(0)
    return GPT(
        Config(
            n_layer=config.n_layers, n_embd=config.dim, n_head=config.n_heads, n_query_groups=config.n_kv_heads,
            head_size=config.head_dim, intermediate_size=config.hidden_dim, block_size=config.max_seq_len,
            padded_vocab_size=config.vocab_size, vocab_size=config.vocab_size, norm_class_name="RMSNorm", bias=False,
            mlp_class_name="LLaMAMLP", rotary_percentage=1.0, parallel_residual=False, norm_qk=True,
        )
    ).to(device)  # fmt: skip


def tokens_per_second(work, rows: list[Sample]) -> float:
    """Supervised tokens per second."""
    return supervised(rows) / work(rows)


def trainer_seconds(
    kind: str, config, device, dtype: str, options: dict, rows: list[Sample]
) -> float:
    """Seconds that TRL's SFTTrainer or transformers' Trainer takes for one pass over the rows,
    start-up apart."""
    import transformers
    from datasets import Dataset

    transformers.logging.set_verbosity_error()
    clock = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    table = {"input_ids": [[*X.tolist(), int(Y[-1])] for X, Y, _ in rows]}
    table["labels"] = [
        [-100, *(y if m else -100 for y, m in zip(Y.tolist(), mask.tolist(), strict=True))]
        for _, Y, mask in rows
    ]
    torch.manual_seed(0)
    common = {
        "bf16": dtype == "bfloat16", "optim": "adamw_torch_fused", "learning_rate": 1e-4, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
        "use_cpu": device.type == "cpu", "num_train_epochs": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model, data = qwen(config).to(device), Dataset.from_dict(table)
        if kind == "trl":
            from common import TOKENIZER
            from trl import SFTConfig, SFTTrainer

            flags = SFTConfig(folder, **{"max_length": config.max_seq_len + 1, **common, **options})
            tokenizer = load_tokenizer(TOKENIZER).loaded
            trainer = SFTTrainer(
                model, flags, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
            )
        else:
            data = data.add_column("length", [len(ids) for ids in table["input_ids"]])

            def collate(batch):
                width = max(len(row["input_ids"]) for row in batch)
                fill = {"input_ids": 0, "labels": -100}
                parts = {
                    k: [row[k] + [v] * (width - len(row[k])) for row in batch]
                    for k, v in fill.items()
                }
                parts["attention_mask"] = [
                    [1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch
                ]
                return {key: torch.tensor(value) for key, value in parts.items()}

            flags = transformers.TrainingArguments(folder, **common, **options)
            trainer = transformers.Trainer(
                model, flags, data_collator=collate, train_dataset=data, callbacks=[Clock()]
            )
        trainer.train()
    return clock[-1] - clock[0]


def trl_settings(step_rows: int, device: torch.device) -> dict[str, dict]:
    """The ways in which TRL avoids padding; the best counts."""
    packed = {"per_device_train_batch_size": step_rows // 4, "packing": True}
    plain = {"per_device_train_batch_size": step_rows // 4, "gradient_accumulation_steps": 4}
    free = {"per_device_train_batch_size": step_rows, "padding_free": True, "max_length": None}
    if device.type == "cuda":  # all rows of a step at once need a mask of gigabytes
        free |= plain
    settings = {"TRL, plain": plain, "TRL, padding-free": free, "TRL, packed": packed}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        settings["TRL, packed, Liger"] = {**packed, "use_liger_kernel": True}
        settings["TRL, plain, Liger"] = {**plain, "use_liger_kernel": True}
    return settings


def measure(args) -> list[dict]:
    device = torch.device(args.device)
    samples = samples_of(args.data_path, 768)
    shapes = {"26 M": {"dim": 512, "n_layers": 8, "vocab_size": 6400}}
    if args.large and device.type == "cuda":
        shapes["104 M"] = {"dim": 768, "n_layers": 16, "vocab_size": 6400}
    elif args.large:
        shapes["768 x 8, 32k vocabulary"] = {"dim": 768, "n_layers": 8, "vocab_size": 32768}
    lines = []
    for label, shape in shapes.items():
        lines += compare(label, {**shape, "max_seq_len": 768}, samples, device, args)
    return lines


def compare(
    label: str, shape: dict, samples: list[Sample], device: torch.device, args
) -> list[dict]:
    config, kinds, rows = model_of("cpu", **shape).config, dtypes(device), args.step_rows
    loops = {
        f"classical {kind}": Loop(model_of(device, **shape), device, kind, classical, rows)
        for kind in kinds
    }
    loops |= {
        f"ours {kind}": Loop(model_of(device, **shape), device, kind, ours, rows) for kind in kinds
    }
    fast = kinds[-1]
    if args.compile:
        model = model_of(device, **shape)
        compile_blocks(model)
        loops[f"ours compiled {fast}"] = Loop(model, device, fast, ours, rows)
    if importlib.util.find_spec("litgpt"):
        loops[f"LitGPT {fast}"] = Loop(litgpt_model(config, device), device, fast, litgpt, rows)
    works = dict(loops)
    settings = trl_settings(rows, device)
    trainers = {name: ("trl", options) for name, options in settings.items()}
    trainers["Trainer"] = (
        "trainer",
        {**settings["TRL, plain"], "train_sampling_strategy": "group_by_length"},
    )
    for name, (which, options) in trainers.items():
        works[f"{name} {fast}"] = functools.partial(
            trainer_seconds, which, config, device, fast, options
        )
    variants = {name: functools.partial(tokens_per_second, work) for name, work in works.items()}
    print(f"{label}: supervised tokens/s", flush=True)
    count = rows * args.steps
    turns = [
        [samples[(turn * count + n) % len(samples)] for n in range(count)]
        for turn in range(args.rounds)
    ]
    by_length = sorted(
        (sample for turn in turns for sample in turn), key=lambda sample: len(sample[0])
    )
    # Warms up, too. A compiled block is compiled for short, middling and long rows: sums of many
    # numbers are nested.
    sizes = (turns[0][:rows], by_length[:rows], by_length[-rows:])
    compiling = {name: sum(map(loop, sizes)) for name, loop in loops.items()}
    for name in trainers:  # kernels that are prepared once
        works[f"{name} {fast}"](sizes[0])
    trained = [sample for turn in turns for sample in turn]
    lens = [len(sample[0]) for sample in trained]
    tokens = sum(lens) * rows // len(trained)
    limit = matrix_peak(device, fast, tokens, config)
    rates = in_turn(variants, turns)
    limit = max(
        limit, matrix_peak(device, fast, tokens, config)
    )  # the machine may have been slow at one of the two

    best = max(
        (f"ours {fast}", f"ours compiled {fast}"),
        key=lambda n: statistics.median(rates.get(n, [0.0])),
    )
    peer = max(
        (n for n in rates if n.startswith("TRL")),
        key=lambda n: ratio(rates, n, "classical float32"),
    )
    flops = step_flops(config, lens, supervised(trained)) / supervised(trained)
    wanted = {"classical float32": 9.0, peer: 2.5} | (
        {f"classical {fast}": 4.5} if fast != "float32" else {}
    )
    lines = [
        figure(f"SFT {label}: {best} / {name}", ratio(rates, best, name), least)
        for name, least in wanted.items()
    ]
    lines += [figure(f"SFT {label}: {best} / {name}", ratio(rates, best, name))
              for name in rates if name not in wanted and not name.startswith("ours")]  # fmt: skip
    done = statistics.median(rates[best]) * flops
    detail = f"{done / 1e9:.0f} of {limit / 1e9:.0f} GFLOP/s"
    lines.append(
        figure(
            f"SFT {label}: model FLOP rate / matrix-product peak, {best}",
            done / limit,
            0.7,
            detail=detail,
        )
    )
    if args.compile:
        first = compiling[f"ours compiled {fast}"] - compiling[f"ours {fast}"]
        eager = ratio(rates, f"ours compiled {fast}", f"ours {fast}")
        lines.append(
            figure(f"SFT {label}: compiled / eager", eager, detail=f"compiling took {first:.0f} s")
        )
    return lines
