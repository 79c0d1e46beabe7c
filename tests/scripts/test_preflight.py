"""What scripts/run_distributed.py refuses before it starts anything, what it would run, and the
files of configs/."""

import importlib.util
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_launcher
from running import ROOT
from test_launcher import LAUNCHER

import main
from runtime.distributed.fingerprint import fingerprint
from scripts import preflight, run_distributed

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
tiny, work = test_launcher.tiny, test_launcher.work


@pytest.fixture
def launcher(monkeypatch, tiny, work):
    """launcher(words) -> what the launcher would have run: (command, variables)."""

    def call(words):
        commands = []
        monkeypatch.setattr(run_distributed, "run", lambda *command: commands.append(command) or 0)
        monkeypatch.setattr(sys, "argv", [LAUNCHER, *tiny, *words.format(work=work).split()])
        assert run_distributed.main() == 0
        return commands[0]

    return call


REFUSED = {
    "--nproc_per_node 0": "--nproc_per_node 0: must be positive",
    "--nnodes 0": "--nnodes 0: must be positive",
    "--nnodes 2 --node_rank 2 --master_addr 127.0.0.1": (
        "--node_rank 2: 2 nodes (--nnodes) have the numbers 0 to 1"
    ),
    "--node_rank -1": "--node_rank -1: must be 0 or more",
    "--nnodes 2": "--nnodes 2 needs --master_addr, the address of node 0",
    "--master_addr no.such.host.invalid": "--master_addr no.such.host.invalid: ",
    "--master_port 99999": "--master_port 99999: must be at most 65,535",
    "--max_restarts -1": "--max_restarts -1: must be 0 or more",
    "--max_restarts many": "--max_restarts: invalid int value: 'many'",
    "--algorithm tokenizer": "--algorithm: invalid choice: 'tokenizer'",
    "--engine mpi": "--engine: invalid choice: 'mpi'",
    "--engine deepspeed --algorithm pretrain": "engine deepspeed trains sft only, not pretrain",
    "--nproc_per_node 2 --device cuda": "--device cuda: torch",
    "--nproc_per_node 3 --tensor_parallel 2": (
        "1 x 3 processes cannot be split into groups of --tensor_parallel 2 x"
    ),
    "--config nowhere.yaml": "--config nowhere.yaml: No such file",
    "--engine torchrun --config {work}/deepspeed.yaml": (
        "strategy deepspeed is an engine with a script of its own"
    ),
    "--batch 3": "unrecognized arguments: --batch 3",
    "--nproc_per_node 2 -- --batch_size 0": "--batch_size 0: must be positive",
    "--data_path {work}/nowhere.jsonl": "nowhere.jsonl: No such file or directory",
    "--data_path {work}": "Is a directory",
    "--data_path {work}/empty.jsonl": "empty.jsonl: the file is empty",
    "--n_heads 5": "dim 32 is not a multiple of n_heads 5",
    "--tokenizer_dir {work}": "there is no tokenizer.json",
    "--dim 8388608": "--dim 8388608: must be at most",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(launcher, work, words):
    (work / "empty.jsonl").touch()
    with pytest.raises(ValueError) as error:
        launcher(words)
    assert REFUSED[words] in str(error.value) and "\n" not in str(error.value)


def test_no_room_for_a_checkpoint(launcher, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(ValueError, match="1 MB free, one checkpoint needs"):
        launcher("")


def test_busy_port(run_script, tiny):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run_script(LAUNCHER, "--nproc_per_node", 2, "--master_port", port, *tiny)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"error: --master_port {port}: Address already in use on this host; choose another one\n"
    )


def test_more_processes_than_gpus(launcher, monkeypatch):
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError,
        match="^--nproc_per_node 2: torch sees 1 GPUs on this host, each process needs one",
    ):
        launcher("--nproc_per_node 2 --device auto")
    launcher("--nproc_per_node 2 --device cpu")


def test_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^--engine accelerate: it is not installed; pip install accelerate$"
    ):
        preflight.check_engine("accelerate")
    preflight.check_engine("torchrun")


def test_little_room_is_a_warning(launcher, monkeypatch, capsys):
    disk = type("usage", (), {"free": 5 * 10**6})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: disk)
    launcher("--nproc_per_node 2")
    assert "MB free, the checkpoints will need" in capsys.readouterr().err


def test_the_command(launcher, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command, variables = launcher(
        "--nproc_per_node 2 --max_restarts 3 --config sft.yaml -- --seed 7"
    )
    words = "-m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts 3".split()
    assert command[1:8] == words and command[8] == str(ROOT / "trainer/train_full_sft.py")
    assert command[-3:] == ["--seed", "7", "--ddp"] and "--config" in command
    line = capsys.readouterr().out.strip()
    assert subprocess.run(["bash", "-c", f"printf '%s\\n' {line.split(' ', 3)[3]}"], capture_output=True, text=True)\
        .stdout.splitlines() == command  # fmt: skip
    time_to_save = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"}
    expected = {"OMP_NUM_THREADS": "1", **time_to_save, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert variables == expected
    assert line.startswith(" ".join(f"{name}={value}" for name, value in expected.items()))


def test_a_time_to_save_that_the_user_has_set_stays(launcher, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in launcher("--nproc_per_node 2")[1]


# --------------------------------------------------------------------------------------------------
# Files and engines
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(launcher, name):
    """Every file in configs/ is one that its script takes."""
    engine = main.choose_engine(["--config", name])
    assert (engine == "deepspeed") == ("deepspeed" in name)
    stage = {"reward": "rm"}.get(Path(name).stem, Path(name).stem)
    # The others have no --algorithm, or not the flags of `launcher`; tests/runtime/test_config.py
    # reads their files.
    if engine == "torchrun" and stage not in ("distillation", "grpo", "ppo"):
        launcher(f"--config {name} --algorithm {stage if stage in main.ALGORITHMS else 'sft'}")


def test_deepspeed_is_chosen_by_file_and_by_flag(work):
    assert main.choose_engine([f"--config={work}/deepspeed.yaml"]) == "deepspeed"
    assert main.choose_engine(["--deepspeed_config", "zero3.json"]) == "deepspeed"
    assert main.choose_engine(["--config", str(work / "ddp.yaml")]) == "torchrun"


def test_slurm_script_is_shell():
    subprocess.run(["bash", "-n", ROOT / "configs/slurm/sft.sbatch"], check=True)


def test_fingerprint(work, tmp_path):
    args = {"seed": 42, "out_dir": "here", "tokenizer_dir": str(ROOT / "model/minimind_tokenizer")}
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"x" * 300_000)
    first = fingerprint(str(data), args)
    assert set(first) == {"code", "data", "torch", "tokenizer", "--seed"}
    assert fingerprint(str(data), args | {"out_dir": "there"}) == first
    assert fingerprint(str(data), args | {"seed": 1}) == first | {"--seed": "1"}
    data.write_bytes(b"x" * 150_000 + b"y" + b"x" * 149_999)
    changed = fingerprint(str(data), args)
    assert changed["data"] != first["data"] and changed | {"data": first["data"]} == first
    assert "No such file" in fingerprint(str(tmp_path / "nowhere"), args)["data"]
