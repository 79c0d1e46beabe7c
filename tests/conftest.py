"""What all tests share: running scripts as users do, tiny models, data, and the same randomness every time."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import uuid
from pathlib import Path

# Before torch and transformers are imported: in the tests' own process too, nothing asks a network.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

import hypothesis
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dataset import lm_dataset

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# What torchrun sets, and must not reach a script that a test starts without torchrun.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The same examples in every run, and no time limit per example: the machine may be busy.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


# ---------------------------------------------------------------------------------------------------------------------
# Running scripts
# ---------------------------------------------------------------------------------------------------------------------


def _start(args, env, nproc, cwd, gpu, **streams) -> subprocess.Popen:
    script, *rest = map(str, args)
    command = [sys.executable]
    if nproc is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command += [str(ROOT / script), *rest]

    tag = uuid.uuid4().hex
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    variables.update(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", MINIMIND_TEST_TAG=tag)
    if not gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    for name, value in (env or {}).items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = str(value)

    process = subprocess.Popen(command, cwd=cwd, env=variables, start_new_session=True, **streams)
    process.tag = tag
    return process


def _kill_all(process: subprocess.Popen) -> None:
    """Kill a script and everything it started that still runs.

    torchrun gives each rank a session of its own, so the process group is not enough: whoever carries the tag of
    `process` in its environment belongs to it.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    mark = f"MINIMIND_TEST_TAG={process.tag}".encode()
    found = True
    while found:  # until nothing is left that could have started another one meanwhile
        found = False
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    found = True
            except OSError:  # gone meanwhile, or not ours
                pass
    process.wait()


def run_script(*args, timeout=120, env=None, nproc=None, cwd=ROOT, stdin="", gpu=False) -> subprocess.CompletedProcess:
    """Run a project script to its end, with one thread per process and without a network.

    Args:
        args: the script (relative to the repository, or absolute) and its arguments.
        timeout: seconds; after that the test fails and shows what the script printed.
        env: variables set on top of the environment; None takes one away.
        nproc: run under torchrun with so many processes.
        cwd: the folder it is started in.
        stdin: what it reads there.
        gpu: let it see the GPU.

    Returns:
        An object with returncode, stdout and stderr (text).
    """
    # Files, not pipes: a process that the script leaves behind would keep a pipe open and the test waiting.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        process = _start(args, env, nproc, cwd, gpu, stdin=given, stdout=out, stderr=err)
        try:
            process.wait(timeout)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_all(process)
        out.seek(0)
        err.seek(0)
        stdout, stderr = (file.read().decode("utf-8", errors="replace") for file in (out, err))
    if timed_out:
        command = " ".join(process.args[1:])
        pytest.fail(f"no end after {timeout} s: {command}\n{stdout[-3000:]}\n--- stderr\n{stderr[-3000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(name="run_script", scope="session")
def _run_script():
    return run_script


@pytest.fixture
def start_script(tmp_path):
    """start_script(*args, env=, nproc=, cwd=, gpu=) -> the running Popen, for tests that signal or kill it.

    Its output, both streams, goes to the file `process.log`. What still runs when the test ends is killed.
    """
    started = []

    def start(*args, env=None, nproc=None, cwd=ROOT, gpu=False) -> subprocess.Popen:
        log = tmp_path / f"script_{len(started)}.log"
        with open(log, "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = _start(args, env, nproc, cwd, gpu, **streams)
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        _kill_all(process)


def on_a_terminal(script: str, *args) -> tuple[int, str]:
    """Exit code of a script, and what it shows on a terminal of 150 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    process = _start([script, *args], None, None, ROOT, False, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # raised when the other end is closed
        while block := os.read(leader, 4096):
            shown += block
    os.close(leader)
    return process.wait(60), shown.decode()


def wait_until(process: subprocess.Popen, condition) -> None:
    """Wait for something that a started script does, and leave it the processor; the script must not end before."""
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            pytest.fail(f"ended with {process.returncode}: {process.log.read_text()}")


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    """Until the only run in the folder `out` has logged so many steps."""
    wait_until(process, lambda: sum(p.read_bytes().count(b"\n") for p in out.glob("*/metrics.jsonl")) >= steps)


# ---------------------------------------------------------------------------------------------------------------------
# Models and data
# ---------------------------------------------------------------------------------------------------------------------


def write_jsonl(path, rows) -> Path:
    """Write rows as JSON, one a line. A str row is written as it is, so that a test can spoil a line."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


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
    """Rows with very unequal masks: answers of one word behind long questions, and the other way round."""
    rows = []
    for n in range(count):
        question, answer = ("what is it " * (1 + 3 * (n % 4)), "yes " * (1 + (n * n) % 17))
        turns = [{"role": "user", "content": f"{n} {question}"}, {"role": "assistant", "content": answer}]
        rows.append({"conversations": turns * (1 + n % 2)})
    return rows


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """train(name, rows, *flags, nproc=) -> the run's folder; the runs of a file share data and cache.

    With count=True the collectives that rank 0 called are counted, in collectives.json of that folder.
    """
    folder = tmp_path_factory.mktemp("job")
    data = {count: write_jsonl(folder / f"{count}.jsonl", conversations(count)) for count in (8, 90)}

    def train(name: str, rows: int, *flags: str, nproc: int | None = None, script="train_full_sft", count=False):
        out = folder / name
        fixed = [*RUN_FLAGS, f"--data_path={data[rows]}", f"--cache_dir={folder / 'cache'}", f"--out_dir={out}"]
        words = [*(["tests/count_collectives.py"] if count else []), f"trainer/{script}.py", *fixed, *flags]
        done = run_script(*words, *(["--ddp"] if nproc else []), nproc=nproc)
        assert done.returncode == 0, done.stdout + done.stderr
        run = next(path for path in out.iterdir() if path.is_dir())
        if count:
            (run / "collectives.json").write_text(re.search("^collectives (.*)", done.stdout, re.MULTILINE)[1])
        return run

    train.folder, train.data = folder, data
    return train


def curve(run: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same_run(run: Path, reference: Path, first: int = 1) -> None:
    """The curve from step `first` on, evaluations and final weights of a run are those of the reference."""
    exact, close = ("tokens", "supervised_tokens", "lr", "epoch"), ("loss", "grad_norm")
    ours, expected = ({line["step"]: line for line in curve(path) if "loss" in line} for path in (run, reference))
    assert [*ours] == [*range(first, max(expected) + 1)]
    for step, line in ours.items():
        assert [line[key] for key in exact] == [expected[step][key] for key in exact]
        assert [line[key] for key in close] == pytest.approx([expected[step][key] for key in close], rel=1e-5), step
        assert line["aux_loss"] == pytest.approx(expected[step]["aux_loss"], rel=1e-4), step
    evaluations = [[line["eval_loss"] for line in curve(path) if "eval_loss" in line] for path in (run, reference)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5) and evaluations[0]
    weights, wanted = (torch.load(f"{path}.pth", weights_only=True) for path in (run, reference))
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32 and (value - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        dcp_to_torch_save(folder, Path(scratch) / "whole.pt")
        return torch.load(Path(scratch) / "whole.pt", weights_only=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data beside the repository; without it the test is skipped, which the summary tells."""
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
    return _dataset_opener(lm_dataset.PretrainDataset, tokenizer, tmp_path)


@pytest.fixture
def tiny_flags() -> list[str]:
    """Flags of every stage script for a model that trains in a moment."""
    flags = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --device cpu --num_workers 0"
    return flags.split()


@pytest.fixture(autouse=True)
def same_every_time():
    """Every test starts with the same random state and computes with one thread, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
