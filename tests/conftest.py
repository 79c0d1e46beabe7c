"""What all tests share: running scripts as users do, tiny models, data, and the same randomness
every time."""

import json
import os
import random
import re
import signal
import subprocess
import tempfile
from pathlib import Path

# Before torch and transformers are imported: in the tests' own process too, nothing asks a network.
os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)

import hypothesis
import numpy as np
import pytest
import torch
from running import ROOT, kill_all, run_ranks, run_script, start
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dataset import lm_dataset
from dataset.pretrain_dataset import PretrainDataset
from model.lm import LMConfig, MiniMindLM

# Under nohup the scripts that a test starts would inherit that SIGHUP is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED_DATA = ROOT.parent / "shared" / "data"

# The same examples in every run, and no time limit per example: the machine may be busy.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

LONGEST = (
    "readme docs resume launcher lightning multinode pipeline accelerate deepspeed faults strategies"
    " exactness".split()
)


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest come first: no worker is then left alone with one at the end."""
    place = {f"test_{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


# --------------------------------------------------------------------------------------------------
# Running scripts
# --------------------------------------------------------------------------------------------------


@pytest.fixture(name="run_script", scope="session")
def _run_script():
    return run_script


@pytest.fixture
def start_script(tmp_path):
    """start_script(*args, env=, nproc=, cwd=, gpu=) -> the running Popen, for tests that signal or
    kill it.

    Its output, both streams, goes to the file `process.log`. What still runs when the test ends is
    killed.
    """
    started = []

    def start_one(*args, env=None, nproc=None, cwd=ROOT, gpu=False) -> subprocess.Popen:
        log = tmp_path / f"script_{len(started)}.log"
        with open(log, "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = start(args, env, nproc, cwd, gpu, **streams)
        process.log = log
        started.append(process)
        return process

    yield start_one
    for process in started:
        kill_all(process)


# --------------------------------------------------------------------------------------------------
# Models and data
# --------------------------------------------------------------------------------------------------


def write_jsonl(path, rows) -> Path:
    """Write rows as JSON, one a line. A str row is written as it is, so that a test can spoil a
    line."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict:
    return {
        "conversations": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(name="write_jsonl", scope="session")
def _write_jsonl():
    return write_jsonl


@pytest.fixture(scope="session")
def tokenizer():
    """The project's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "model" / "minimind_tokenizer")


# A model and data for runs that are compared with each other.
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
RUN_FLAGS = [f"--{key}={size}" for key, size in SIZES.items()]
RUN_FLAGS += ["--device=cpu", "--max_seq_len=128", "--log_interval=1"]


def conversations(count: int) -> list[dict]:
    """Rows with very unequal masks: answers of one word behind long questions, and the other way
    round."""
    rows = []
    for n in range(count):
        question, answer = ("what is it " * (1 + 3 * (n % 4)), "yes " * (1 + (n * n) % 17))
        turns = [
            {"role": "user", "content": f"{n} {question}"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"conversations": turns * (1 + n % 2)})
    return rows


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """train(name, rows, *flags, nproc=) -> the run's folder; the runs of a file share data and
    cache.

    With count=True the collectives that rank 0 called are counted, in collectives.json of that
    folder.
    """
    folder = tmp_path_factory.mktemp("job")
    data = {
        count: write_jsonl(folder / f"{count}.jsonl", conversations(count)) for count in (8, 90)
    }

    def train(
        name: str,
        rows: int,
        *flags: str,
        nproc: int | None = None,
        script="train_full_sft",
        count=False,
    ):
        out = folder / name
        fixed = [
            *RUN_FLAGS,
            f"--data_path={data[rows]}",
            f"--cache_dir={folder / 'cache'}",
            f"--out_dir={out}",
        ]
        words = [
            *(["tests/count_collectives.py"] if count else []),
            f"trainer/{script}.py",
            *fixed,
            *flags,
        ]
        printed = run_ranks(*words, *(["--ddp"] if nproc else []), nproc=nproc)
        run = next(path for path in out.iterdir() if path.is_dir())
        if count:
            (run / "collectives.json").write_text(
                re.search("^collectives (.*)", printed, re.MULTILINE)[1]
            )
        return run

    train.folder, train.data = folder, data
    return train


def curve(run: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same_run(run: Path, reference: Path, first: int = 1) -> None:
    """The curve from step `first` on, evaluations and final weights of a run are those of the
    reference."""
    exact, close = ("tokens", "supervised_tokens", "lr", "epoch"), ("loss", "aux_loss", "grad_norm")
    ours, expected = (
        {line["step"]: line for line in curve(path) if "loss" in line} for path in (run, reference)
    )
    assert [*ours] == [*range(first, max(expected) + 1)]
    for step, line in ours.items():
        assert [line[key] for key in exact] == [expected[step][key] for key in exact]
        assert [line[key] for key in close] == pytest.approx(
            [expected[step][key] for key in close], rel=1e-5
        ), step
    evaluations = [
        [line["eval_loss"] for line in curve(path) if "eval_loss" in line]
        for path in (run, reference)
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5) and evaluations[0]
    weights, wanted = (torch.load(f"{path}.pth", weights_only=True) for path in (run, reference))
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        assert (
            value.dtype == torch.float32
            and (value - wanted[name]).norm() <= 1e-4 * wanted[name].norm()
        ), name


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    return {line["step"]: line["loss"] for line in curve(run) if "loss" in line}


# A run under the engines of other libraries, and the one that it must equal.
ENGINE_RUN = "full_sft_32_moe"


@pytest.fixture(scope="module")
def engine_flags(tmp_path_factory) -> list[str]:
    """Data with answers of very unequal length, the last window of an epoch shorter than the
    others."""
    folder = tmp_path_factory.mktemp("engine")
    turns = [(f"say it {n} times", "it " * (n * 7 % 40 + 1)) for n in range(1, 98)]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in turns]
    data = write_jsonl(folder / "data.jsonl", rows)
    flags = (
        "--max_seq_len=64 --from_weight=none --use_moe=1 --global_batch_size=8 --batch_size=2"
        " --epochs=2"
    )
    flags += (
        f" --learning_rate=3e-3 --eval_ratio=0.05 --data_path={data} --cache_dir={folder / 'cache'}"
    )
    return [*RUN_FLAGS, *flags.split()]


@pytest.fixture(scope="module")
def one_process(engine_flags, tmp_path_factory) -> Path:
    """The run of one process without an engine."""
    out = tmp_path_factory.mktemp("one")
    run_ranks("trainer/train_full_sft.py", *engine_flags, f"--out_dir={out}")
    return out / ENGINE_RUN


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        dcp_to_torch_save(folder, Path(scratch) / "whole.pt")
        return torch.load(Path(scratch) / "whole.pt", weights_only=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data beside the repository; without it the test is skipped, which the
    summary tells."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return SHARED_DATA


def _dataset_opener(kind, tokenizer, tmp_path):
    def open_dataset(data, max_length=512, **options):
        path = data if isinstance(data, Path) else write_jsonl(tmp_path / "data.jsonl", data)
        return kind(path, tokenizer, max_length, cache_dir=tmp_path / "cache", **options)

    return open_dataset


@pytest.fixture
def sft(tokenizer, tmp_path):
    """sft(rows or path, **options) -> SFTDataset with its cache below tmp_path."""
    return _dataset_opener(lm_dataset.SFTDataset, tokenizer, tmp_path)


@pytest.fixture
def pretrain(tokenizer, tmp_path):
    """pretrain(rows or path, **options) -> PretrainDataset with its cache below tmp_path."""
    return _dataset_opener(PretrainDataset, tokenizer, tmp_path)


@pytest.fixture
def tiny_flags() -> list[str]:
    """Flags of every stage script for a model that trains in a moment."""
    flags = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --device cpu --num_workers 0"
    return flags.split()


STAGE_SIZES = "--dim=32 --n_layers=1 --n_heads=4 --n_kv_heads=2 --max_seq_len=128"


@pytest.fixture(scope="module")
def start_weights(tmp_path_factory, tokenizer):
    """An SFT model as the stages look for it: full_sft_32.pth in --out_dir."""
    out = tmp_path_factory.mktemp("stages")
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128}
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **sizes))
    torch.save(model.state_dict(), out / "full_sft_32.pth")
    (out / "full_sft_32.json").write_text(model.config.to_json())
    return out


@pytest.fixture(autouse=True)
def same_every_time():
    """Every test starts with the same random state and computes with one thread, whatever ran
    before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
