"""A Python that has imported what a training run imports, and forks.

Starting Python anew takes five times as long. A fork is what `python SCRIPT ARGS` would be, in a
session of its own, with the environment, folder, streams, limits and ignored signals that its
client names; the scripts that it starts by subprocess, as torchrun does its ranks, are forks of it.
None of our own modules is imported here. What a start of Python itself does (its PYTHON variables,
locale, sitecustomize, the imports) needs a real one.

    python -c "import fork_server; fork_server.main(3, 4)"  # a listening socket, and a pipe's end
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import io
import os
import pickle
import random
import resource
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

PRELOADED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch.distributed.launcher.api",
    "torch.profiler._cupti_monitor",
    "transformers.models.auto.tokenization_auto",
)
# Variables that say in /proc whose process this is, with room for what a fork writes over them.
MARKS = {"MINIMIND_TEST_TAG": "-" * 32, "RANK": "-"}
START = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONIOENCODING", "LC_ALL")}
PATH = list(sys.path)
execute_child = subprocess.Popen._execute_child
CHILD = inspect.signature(execute_child)
IGNORABLE = (signal.SIGHUP, signal.SIGTERM)
INHERITED_LIMITS = (resource.RLIMIT_FSIZE,)
TORCHRUN = ["-m", "torch.distributed.run"]
STATUS = struct.Struct("i")


def mark_places() -> dict[str, int]:
    """Where in memory the values of MARKS stand."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    return {name: getenv(name.encode()) for name in MARKS if name in os.environ}


MARK_PLACES = mark_places()


# --------------------------------------------------------------------------------------------------
# The tests' side
# --------------------------------------------------------------------------------------------------


class ForkServer:
    """The server of this process; it starts with the first fork and ends with this process."""

    def __init__(self):
        self.address = ""

    def start(self) -> None:
        folder = tempfile.mkdtemp(prefix="fork_server_")
        self.address = os.path.join(folder, "socket")
        atexit.register(self.remove, folder)
        environment = os.environ | MARKS | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        here = os.path.dirname(os.path.abspath(__file__))
        alive, self.alive = os.pipe()  # the server reads its end when this process has ended
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(64)
            command = (
                f"import sys; sys.path.insert(1, {here!r}); import fork_server;"
                f" fork_server.main({listener.fileno()}, {alive})"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", command],
                env=environment,
                pass_fds=(listener.fileno(), alive),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        os.close(alive)

    def remove(self, folder: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.address)
            os.rmdir(folder)

    def fork(self, words: list[str], variables: dict, cwd, streams: list[int]) -> "Fork":
        """Start `python WORDS`.

        Args:
            words: a script and its arguments, or TORCHRUN and its arguments.
            variables: the whole environment.
            cwd: the folder it is started in.
            streams: descriptors of stdin, stdout and stderr.
        """
        if not self.address:
            self.start()
        request = {
            "words": words,
            "variables": variables,
            "cwd": str(cwd),
            "limits": {name: resource.getrlimit(name) for name in INHERITED_LIMITS},
            "ignored": [
                number for number in IGNORABLE if signal.getsignal(number) is signal.SIG_IGN
            ],
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        message = pickle.dumps(request)
        socket.send_fds(connection, [STATUS.pack(len(message))], streams)
        connection.sendall(message)
        return Fork(connection, [sys.executable, *words])


class Fork:
    """A process of the server, with what tests use of subprocess.Popen."""

    def __init__(self, connection: socket.socket, args: list[str]):
        self.connection, self.args, self.returncode = connection, args, None
        (self.pid,) = STATUS.unpack(receive(connection, STATUS.size))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            (self.returncode,) = STATUS.unpack(receive(self.connection, STATUS.size))
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError("the fork server has ended")
        received += part
    return received


# --------------------------------------------------------------------------------------------------
# The server's side
# --------------------------------------------------------------------------------------------------


def main(listener: int, alive: int) -> None:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    PATH[:] = sys.path
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # another version of torch
            importlib.import_module(name)
    gc.freeze()  # the collector of a fork need not look at what is here, and so have it copied
    request = serve(socket.socket(fileno=listener), alive)
    if request is not None:  # in a fork
        run_and_exit(request["words"])


def serve(listener: socket.socket, alive: int) -> dict | None:
    """Fork for each connection and tell it the process id and, at the end, the exit code.

    Returns:
        In a fork, the request; in the server None, when its client has ended.
    """
    children = {}  # descriptor of a process -> (its id, connection)
    while True:
        ready = select.select([listener, alive, *children], [], [])[0]
        if alive in ready:
            return None
        for handle in set(ready) & children.keys():
            number, connection = children.pop(handle)
            os.close(handle)
            code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
            with contextlib.suppress(OSError):  # nobody waits for it
                connection.sendall(STATUS.pack(code))
            connection.close()
        if listener not in ready:
            continue
        connection = listener.accept()[0]
        head, streams, _, _ = socket.recv_fds(connection, STATUS.size, 3)
        request = pickle.loads(receive(connection, *STATUS.unpack(head)))
        number = os.fork()
        if number == 0:
            for held in (listener, connection, *(other for _, other in children.values())):
                held.close()
            for handle in (alive, *children):
                os.close(handle)
            become(request, streams)
            return request
        for stream in streams:
            os.close(stream)
        children[os.pidfd_open(number)] = (number, connection)
        connection.sendall(STATUS.pack(number))


def become(request: dict, streams: list[int]) -> None:
    """Take on what a process of its own would have been started with."""
    os.setsid()
    for stream, descriptor in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, descriptor)
        os.close(stream)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, open_stream(descriptor, getattr(sys, name)))
    for name, limits in request["limits"].items():
        resource.setrlimit(name, limits)
    for number in IGNORABLE:
        ignored = number in request["ignored"]
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    os.chdir(request["cwd"])
    take_variables(request["variables"])


def open_stream(descriptor: int, before: io.TextIOWrapper) -> io.TextIOWrapper:
    """A standard stream as Python opens it under PYTHONUNBUFFERED: `before` knows another file."""
    if descriptor == 0:
        file = open(0, "rb", closefd=False)
    else:
        file = open(descriptor, "wb", buffering=0, closefd=False)
    terminal = os.isatty(descriptor)
    stream = io.TextIOWrapper(
        file, before.encoding, before.errors, line_buffering=terminal, write_through=descriptor > 0
    )
    stream.mode = "w" if descriptor else "r"
    return stream


def take_variables(variables: dict[str, str]) -> None:
    for name in MARKS:
        mark(name, variables.get(name, ""))
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # is found anew, in the new environment
    random.seed()


def mark(name: str, value: str) -> None:
    """Write a variable over the one that this process started with; /proc/ID/environ shows it."""
    place = MARK_PLACES[name]
    ctypes.memmove(place, value.encode().ljust(len(MARKS[name]), b"-"), len(MARKS[name]))


def run(words: list[str]) -> None:
    """What `python WORDS` does."""
    subprocess.Popen._execute_child = fork_child
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[0] = os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def run_and_exit(words: list[str]) -> None:
    """End as Python does, but for taking modules and objects apart, which takes longer than a tiny
    run."""
    code = 1
    try:
        run(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(code)


def fork_child(process: subprocess.Popen, *given) -> None:
    """In place of Popen's way to start a program: fork where that is Python with a script."""
    options = CHILD.bind(process, *given).arguments
    words = options["args"]
    words = [] if isinstance(words, str | bytes) else [os.fsdecode(word) for word in words]
    scripts = [word for word in words[1:] if word != "-u"]
    variables = options["env"] or dict(os.environ)
    special = options["shell"] or options["pass_fds"]
    special = special or any(variables.get(name) != START[name] for name in START)
    if special or words[:1] != [sys.executable] or not is_script(scripts):
        execute_child(process, *given)
        return
    began, begins = os.pipe()
    sys.stdout.flush()
    process.pid = os.fork()
    if process.pid == 0:
        if options["start_new_session"]:
            os.setsid()
        for stream, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if options[name] >= 0:
                os.dup2(options[name], stream)
        os.closerange(3, begins)
        if options["cwd"]:
            os.chdir(options["cwd"])
        if options["preexec_fn"]:
            options["preexec_fn"]()
        forget_parent()
        take_variables(options["env"] or dict(os.environ))
        os.closerange(begins, 4096)  # what the parent waits for
        run_and_exit(scripts)
    process._child_created = True
    os.close(begins)
    os.read(began, 1)  # the child has a session of its own, and takes signals
    os.close(began)
    for theirs, ours in (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread")):
        if options[theirs] >= 0 and options[ours] >= 0:
            os.close(options[theirs])


def is_script(words: list[str]) -> bool:
    """Whether Python is to run a file or a module, without flags of its own before it."""
    return bool(words) and (words[0] == "-m" or not words[0].startswith("-"))


def forget_parent() -> None:
    """Signal handlers, modules of ours and what was to be done at exit."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    sys.path[:] = PATH
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        installed = path.startswith((sys.prefix, sys.base_prefix))
        if path and not installed and name not in ("__main__", __name__):
            del sys.modules[name]
