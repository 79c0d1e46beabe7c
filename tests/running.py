"""Running the project's scripts as users do, and forking ranks of them where only the result
counts."""

import contextlib
import fcntl
import multiprocessing
import os
import pty
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Name of a stage, or of the SFT job in another engine -> its script.
STAGE_SCRIPTS = {
    path.stem: path
    for path in sorted([*ROOT.glob("trainer/engines/train_*.py"), *ROOT.glob("trainer/train_*.py")])
    if path.stem != "train_tokenizer"
    and (path.parent.name == "engines" or "train_sft" not in path.stem)
}


def module_of(stage: str) -> str:
    """The dotted name of a stage's script."""
    return ".".join(STAGE_SCRIPTS[stage].relative_to(ROOT).with_suffix("").parts)


# What torchrun sets, and must not reach a script that a test starts without torchrun.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def launched_as(rank: int, nproc: int, port: int = 29500) -> dict[str, str]:
    """LAUNCHER_VARIABLES as torchrun sets them for a rank, on one machine."""
    values = (rank, rank, nproc, nproc, "127.0.0.1", port)
    return dict(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))


def start(args, env, nproc, cwd, gpu, **streams) -> subprocess.Popen:
    script, *rest = map(str, args)
    command = [sys.executable]
    if nproc is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command += [str(ROOT / script), *rest]

    tag = uuid.uuid4().hex
    variables = {
        name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES
    }
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


def processes_of(process: subprocess.Popen, *variables: str) -> list[int]:
    """Ids of what a script has started and is still there, older ones first; with such variables in
    its environment.

    torchrun gives each rank a session of its own, so the process group is not enough: whoever carries the tag of
    `process` in its environment belongs to it.
    """
    marks, found = {word.encode() for word in (f"MINIMIND_TEST_TAG={process.tag}", *variables)}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours
            if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return sorted(found)


def wait_for_end(process: subprocess.Popen, seconds: float = 240) -> None:
    """Until nothing is left of what a script has started, itself included."""
    while left := processes_of(process):
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(left[0])
            ended = select.select([handle], [], [], seconds)[0]
            os.close(handle)
            assert ended, (
                f"still there: {Path(f'/proc/{left[0]}/cmdline').read_bytes().split(bytes(1))}"
            )


def kill_all(process: subprocess.Popen) -> None:
    """Kill a script and everything it started that still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    while left := processes_of(
        process
    ):  # until nothing is left that could have started another one meanwhile
        for number in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
    process.wait()


def run_script(
    *args, timeout=300, env=None, nproc=None, cwd=ROOT, stdin="", gpu=False
) -> subprocess.CompletedProcess:
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
    # Files, not pipes: a process that the script leaves behind would keep a pipe open and the test
    # waiting.
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode())
        given.seek(0)
        process = start(args, env, nproc, cwd, gpu, stdin=given, stdout=out, stderr=err)
        try:
            process.wait(timeout)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_all(process)
        out.seek(0)
        err.seek(0)
        stdout, stderr = (file.read().decode("utf-8", errors="replace") for file in (out, err))
    if timed_out:
        command = " ".join(process.args[1:])
        pytest.fail(
            f"no end after {timeout} s: {command}\n{stdout[-3000:]}\n--- stderr\n{stderr[-3000:]}"
        )
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


# Starting Python with torch takes five of the six seconds of a tiny run. Runs of which only the
# result counts are forks of a process that has these; what launchers, signals and errors do is
# tested with `run_script`.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint",
     "torch.distributed.pipelining", "transformers.models.auto.tokenization_auto"]
)  # fmt: skip


def _be_script(words: list[str], variables: dict[str, str], output: Path, cwd: Path) -> None:
    """What a fork does."""
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    os.environ.update(variables)
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(*args, nproc: int | None, folder: Path, cwd=ROOT, env=None) -> list:
    """Start a project script as nproc ranks that no launcher watches; rank N prints into the file
    `folder/N`."""
    words = [str(ROOT / args[0]), *map(str, args[1:])]
    variables, port, processes = {"CUDA_VISIBLE_DEVICES": "", **(env or {})}, free_port(), []
    for rank in range(nproc or 1):
        own = launched_as(rank, nproc, port) if nproc else {}
        processes.append(
            FORKS.Process(target=_be_script, args=(words, variables | own, folder / str(rank), cwd))
        )
        processes[-1].start()
    return processes


def run_ranks(*args, nproc=None, cwd=ROOT, code=0) -> str:
    """Run a project script to its end, as nproc ranks that no launcher watches; returns what they
    printed.

    All of them must end with that exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(*args, nproc=nproc, folder=Path(folder), cwd=cwd)
        for process in processes:
            process.join(300)
        codes = [process.exitcode for process in processes]  # None: still there
        for process in processes:
            process.kill()
        outputs = [Path(folder) / str(rank) for rank in range(len(processes))]
        printed = "".join(
            output.read_text(errors="replace") for output in outputs if output.exists()
        )
    assert codes == [code] * len(codes), (
        f"exit codes {codes}: {' '.join(map(str, args))}\n{printed}"
    )
    return printed


def on_a_terminal(script: str, *args) -> tuple[int, str]:
    """Exit code of a script, and what it shows on a terminal of 150 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    process = start(
        [script, *args], None, None, ROOT, False, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # raised when the other end is closed
        while block := os.read(leader, 4096):
            shown += block
    os.close(leader)
    return process.wait(240), shown.decode()


def wait_until(process: subprocess.Popen, condition) -> None:
    """Wait for something that a started script does, and leave it the processor; the script must
    not end before."""
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            pytest.fail(f"ended with {process.returncode}: {process.log.read_text()}")


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    """Until the only run in the folder `out` has logged so many steps."""
    wait_until(
        process,
        lambda: sum(p.read_bytes().count(b"\n") for p in out.glob("*/metrics.jsonl")) >= steps,
    )
