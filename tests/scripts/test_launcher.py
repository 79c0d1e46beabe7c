"""main.py and scripts/run_distributed.py: every way to start several processes, and how they
end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chat, write_jsonl
from running import ROOT, free_port, processes_of, wait_until

from scripts import run_distributed

LAUNCHER = "scripts/run_distributed.py"
# Three configuration files as people write them for other stacks.
DDP = """
training:
  distributed: true
  distributed_strategy: "ddp"
  dataloader:
    batch_size: 8
    num_workers: 4
    pin_memory: true
  gradient_accumulation_steps: 4
  mixed_precision: "fp16"
  max_grad_norm: 1.0
"""
DEEPSPEED = """
training:
  distributed: true
  distributed_strategy: "deepspeed"
  deepspeed:
    config_path: "configs/deepspeed/zero2.json"
  dataloader:
    batch_size: 4
    num_workers: 4
    pin_memory: true
  gradient_accumulation_steps: 8
"""
DISTRIBUTED = """
training:
  distributed: true
  distributed_backend: "nccl"
  find_unused_parameters: false
  ddp_bucket_cap_mb: 25
  ddp_broadcast_buffers: true
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  fp16: false
  bf16: true
  gradient_checkpointing: true
  dataloader_num_workers: 4
  dataloader_pin_memory: true
  dataloader_drop_last: true
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("launcher")
    write_jsonl(work / "data.jsonl", [chat(f"say {n}", "it " * (n % 7 + 1)) for n in range(150)])
    for name, text in (("ddp", DDP), ("deepspeed", DEEPSPEED), ("distributed", DISTRIBUTED)):
        (work / f"{name}.yaml").write_text(text)
    return work


@pytest.fixture
def tiny(work, tmp_path, tiny_flags):
    """Flags that make any configuration small; the folder of the run is out/NAME_32 below
    tmp_path."""
    places = {
        "data_path": work / "data.jsonl",
        "cache_dir": work / "cache",
        "out_dir": tmp_path / "out",
    }
    places = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    more = (
        "--max_seq_len 64 --packing 0 --max_steps 2 --log_interval 1 --from_weight none"
        " --save_interval 0"
    )
    return [*tiny_flags, *places, *more.split()]


# --------------------------------------------------------------------------------------------------
# Commands, with two processes
# --------------------------------------------------------------------------------------------------

# name -> (script, its arguments, processes that the test starts, precision)
COMMANDS = {
    "launcher": (
        LAUNCHER,
        "--nproc_per_node 2 --config config_distributed_example.yaml --algorithm sft",
        None,
        "bfloat16",
    ),
    "launcher, torchrun": (
        LAUNCHER,
        "--use_torchrun --nproc_per_node 2 --config {work}/ddp.yaml",
        None,
        "float16",
    ),
    "torchrun": (
        "main.py",
        "--mode train --config {work}/distributed.yaml --algorithm sft",
        2,
        "bfloat16",
    ),
    "torch.distributed.launch": (
        "{work}/module.py",
        (
            "--nproc_per_node=2 --master_port={port} main.py --mode train --config {work}/ddp.yaml"
            " --algorithm sft"
        ),
        None,
        "float16",
    ),
}


def rows_of(out) -> list[dict]:
    (path,) = out.glob("*_32/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(run_script, work, tiny, tmp_path, name):
    script, words, nproc, dtype = COMMANDS[name]
    (work / "module.py").write_text(
        "import runpy\nrunpy.run_module('torch.distributed.launch', run_name='__main__')\n"
    )
    words = words.format(work=work, port=free_port()).split()
    done = run_script(script.format(work=work), *words, *tiny, nproc=nproc)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert re.search(rf"on 2 x cpu, ddp, {dtype}, \d steps", done.stdout), done.stdout
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [1, 2]
    assert ("nccl needs a GPU, gloo is used" in done.stdout) == (name in ("launcher", "torchrun"))


def test_the_deepspeed_launcher(run_script, tiny, tmp_path):
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install deepspeed"
    )
    words = "main.py --config config_deepspeed_example.yaml --mode train --algorithm sft".split()
    launcher = [
        Path(sys.executable).with_name("deepspeed"),
        "--num_gpus=2",
        f"--master_port={free_port()}",
    ]
    done = run_script(*launcher, *words, *tiny, timeout=300)
    assert done.returncode == 0 and "on 2 x cpu, DeepSpeed" in done.stdout, (
        done.stdout + done.stderr
    )
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [1, 2]


def test_one_process(run_script, work, tiny, tmp_path):
    """What runs on two processes runs on one; it says so."""
    done = run_script(
        "main.py", "--config", work / "ddp.yaml", "--mode", "train", "--algorithm", "sft", *tiny
    )
    assert done.returncode == 0, done.stderr
    assert "no launcher started this script: one process trains alone" in done.stdout
    assert len(rows_of(tmp_path / "out")) == 2


def test_two_nodes(start_script, work, tiny, tmp_path):
    """Two launchers with a process each, as on two machines; the command that is printed is the one
    that runs."""
    where = (
        f"--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {free_port()}".split()
    )
    nodes = [start_script(LAUNCHER, *where, "--node_rank", node, "--", *tiny) for node in (0, 1)]
    for node, process in enumerate(nodes):
        assert process.wait(120) == 0, process.log.read_text()
        assert f"--rdzv_conf is_host={node == 0} --local_addr 127.0.0.1" in process.log.read_text()
    assert "on 2 x cpu" in "".join(process.log.read_text() for process in nodes)
    assert len(rows_of(tmp_path / "out")) == 2


def wait_for(process, text: str, times: int = 1) -> None:
    """Until the job has printed a text so often; it must not end before."""
    wait_until(process, lambda: process.log.read_text().count(text) >= times)


def test_a_rank_dies_and_a_signal_comes(start_script, work, tiny, tmp_path):
    """All start again and go on from the last checkpoint; the signal lets them finish their step,
    save and leave."""
    more = "--max_steps 0 --epochs 1000 --num_workers 1 --save_interval 2 --resume auto".split()
    process = start_script(LAUNCHER, "--nproc_per_node", 2, "--max_restarts", 1, *tiny, *more)
    wait_for(process, " step 5/")
    os.kill(processes_of(process, "RANK=1")[0], signal.SIGKILL)  # its data process comes after it
    wait_for(process, "resumed from ")
    wait_for(process, " step ", process.log.read_text().count(" step ") + 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129, process.log.read_text()
    (step,) = re.findall(r"stopped by signal 1 at step (\d+)", process.log.read_text())
    assert (tmp_path / f"out/full_sft_32/checkpoints/step_{int(step):08d}").is_dir()
    assert [row["step"] for row in rows_of(tmp_path / "out")] == list(range(1, int(step) + 1))
    assert not processes_of(process, "RANK=0") and not processes_of(process, "RANK=1")


RUN = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts import run_distributed
sys.exit(run_distributed.run([sys.executable, "-c", sys.argv[1]], {{}}))"""
CHILD = """import signal, sys
def end(number, frame):
    print("got", number, flush=True)
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
print("ready", flush=True)
while True:
    signal.pause()"""


@pytest.mark.parametrize(
    "number, seen, code",
    [(signal.SIGINT, 2, 130), (signal.SIGHUP, 1, 129), (signal.SIGKILL, 15, -9)],
)
def test_ctrl_c_and_kill(number, seen, code):
    """Ctrl-C, which goes to all processes of a terminal, reaches the job by the launcher alone;
    kill -9 ends both."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    assert process.stdout.read() == f"got {seen}\n" and process.wait(60) == code


def test_exit_code_of_a_run_that_fails(run_script, work, tiny):
    rows = write_jsonl(work / "bad.jsonl", [chat("a", "b"), "{"])
    done = run_script(LAUNCHER, "--nproc_per_node", 2, *tiny, "--data_path", rows)
    assert done.returncode == 1 and f"error: {rows}:2: broken JSON" in done.stderr


@pytest.fixture
def handlers():
    """Signal handlers as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "ending, code", [("sys.exit(7)", 7), ("sys.exit()", 0), ("os.kill(os.getpid(), 9)", 137)]
)
def test_exit_codes_are_passed_on(handlers, ending, code):
    assert run_distributed.run([sys.executable, "-c", f"import os, sys; {ending}"], {}) == code
