"""Running the project's scripts as users do, and forking ranks of them where only the result
counts."""

import contextlib
import fcntl
import os
import pty
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
from fork_server import TORCHRUN, Fork, ForkServer

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


FORKS = ForkServer()
AT_START = ("PYTHON", "LANG", "LC_", "LD_")  # what only a real start of Python obeys


def start(
    args, env=None, nproc=None, cwd=ROOT, gpu=False, fresh=False, **streams
) -> subprocess.Popen | Fork:
    """Start a script, as a fork of a Python that has imported torch, or fresh."""
    script, *rest = map(str, args)
    command = []
    if nproc is not None:
        command += [*TORCHRUN, "--standalone", "--nproc_per_node", str(nproc)]
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

    fresh |= gpu or not is_python(script) or subprocess.PIPE in streams.values()
    if fresh or any(name.startswith(AT_START) for name in env or {}):
        command = [sys.executable, *command]
        process = subprocess.Popen(
            command, cwd=cwd, env=variables, start_new_session=True, **streams
        )
    else:
        process = fork_with_streams(command, variables, cwd, **streams)
    process.tag = tag
    return process


def is_python(script: str) -> bool:
    """Whether a file is a Python script, by its name or its first line."""
    if script.endswith(".py"):
        return True
    with open(script, "rb") as file:
        return b"python" in file.readline()


def fork_with_streams(command, variables, cwd, stdin=0, stdout=1, stderr=2) -> Fork:
    """Streams as subprocess.Popen takes them: a file, a descriptor, DEVNULL or STDOUT."""
    with open(os.devnull, "r+b") as nothing:
        stderr = stdout if stderr == subprocess.STDOUT else stderr
        files = [
            nothing if file == subprocess.DEVNULL else file for file in (stdin, stdout, stderr)
        ]
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        return FORKS.fork(command, variables, cwd, numbers)


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
        with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
            os.killpg(process.pid, signal.SIGKILL)
    while left := processes_of(
        process
    ):  # until nothing is left that could have started another one meanwhile
        for number in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
    process.wait()


def run_script(
    *args, timeout=300, env=None, nproc=None, cwd=ROOT, stdin="", gpu=False, fresh=False
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
        fresh: start Python anew, where what it does at its start counts.

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
        streams = {"stdin": given, "stdout": out, "stderr": err}
        process = start(args, env, nproc, cwd, gpu, fresh, **streams)
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(*args, nproc: int | None, folder: Path, cwd=ROOT, env=None) -> list[Fork]:
    """Start a project script as nproc ranks that no launcher watches; rank N prints into the file
    `folder/N`."""
    port, processes = free_port(), []
    for rank in range(nproc or 1):
        variables = {**(launched_as(rank, nproc, port) if nproc else {}), **(env or {})}
        with open(folder / str(rank), "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            processes.append(start(args, variables, None, cwd, False, **streams))
    return processes


def run_ranks(*args, nproc=None, cwd=ROOT, code=0) -> str:
    """Run a project script to its end, as nproc ranks that no launcher watches; returns what they
    printed.

    All of them must end with that exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(*args, nproc=nproc, folder=Path(folder), cwd=cwd)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(300)
        codes = [process.returncode for process in processes]  # None: still there
        for process in processes:
            kill_all(process)
        printed = "".join(
            (Path(folder) / str(rank)).read_text(errors="replace") for rank in range(len(processes))
        )
    assert codes == [code] * len(codes), (
        f"exit codes {codes}: {' '.join(map(str, args))}\n{printed}"
    )
    return printed


def on_a_terminal(script: str, *args) -> tuple[int, str]:
    """Exit code of a script, and what it shows on a terminal of 150 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    process = start([script, *args], fresh=True, stdin=follower, stdout=follower, stderr=follower)
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
