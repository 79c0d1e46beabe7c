"""Run a script as on a system that is not Unix: without_unix.py SCRIPT ARGS.

For the project's own code alone, modules that only Unix has cannot be imported, and what only Unix
has in `os`, `signal`, `mmap` and others is not there; Python and packages keep theirs. The names
are those that Python's documentation calls "Availability: Unix" or "not Windows".
"""

import builtins
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = str(ROOT / ".venv")
MODULES = set("fcntl grp posix pty pwd readline resource syslog termios tty".split())
HIDDEN = {
    "os": (
        "O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_SYNC O_DSYNC chown chroot ctermid fchdir"
        " fchmod fchown fdatasync fork forkpty getegid geteuid getgid getgroups getloadavg"
        " getpgid getpgrp getpriority getresuid getsid getuid initgroups killpg lchown lockf"
        " major mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise"
        " posix_fallocate posix_spawn pread preadv pwrite pwritev readv register_at_fork"
        " sched_getaffinity sched_setaffinity sched_yield sendfile setpgid setpriority setsid"
        " setuid splice statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 waitid"
        " WNOHANG writev"
    ),
    "signal": (
        "SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP"
        " SIGTTIN SIGTTOU SIGUSR1 SIGUSR2 SIGWINCH SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm"
        " getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending"
        " sigtimedwait sigwait sigwaitinfo"
    ),
    "mmap": "MADV_DONTNEED MADV_SEQUENTIAL MADV_WILLNEED MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
    "socket": "AF_UNIX SO_REUSEPORT socketpair",
    "time": "clock_getres clock_gettime clock_settime tzset",
    "ctypes": "",
    "subprocess": "",
}


class Windowed(types.ModuleType):
    """A module without some of its names."""

    def __init__(self, module: types.ModuleType, hidden: set[str]):
        super().__init__(module.__name__)
        self.__dict__["whole"], self.__dict__["hidden"] = module, hidden

    def __getattr__(self, name: str):
        if name in self.hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} here")
        return getattr(self.whole, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.whole, name, value)


class Popen(subprocess.Popen):
    def __init__(self, *args, preexec_fn=None, **options):
        if preexec_fn is not None:
            raise ValueError("preexec_fn is not supported on Windows platforms")
        super().__init__(*args, **options)


def is_ours(names: dict | None) -> bool:
    path = os.path.abspath((names or {}).get("__file__") or "")
    return path.startswith(str(ROOT)) and not path.startswith(PACKAGES)


def hide() -> None:
    real, stand_ins = builtins.__import__, {}

    def stand_in(module: types.ModuleType) -> types.ModuleType:
        name = module.__name__
        if name in HIDDEN and name not in stand_ins:
            stand_ins[name] = Windowed(module, set(HIDDEN[name].split()))
            if name == "ctypes":
                stand_ins[name].__dict__["CDLL"] = open_library
            if name == "subprocess":
                stand_ins[name].__dict__["Popen"] = Popen
        return stand_ins.get(name, module)

    def open_library(name, *args, **options):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return sys.modules["ctypes"].CDLL(name, *args, **options)

    def import_as_elsewhere(name, globals=None, locals=None, fromlist=(), level=0):
        if not is_ours(globals):
            return real(name, globals, locals, fromlist, level)
        if level == 0 and name.split(".")[0] in MODULES:
            raise ImportError(f"No module named {name!r} here", name=name)
        return stand_in(real(name, globals, locals, fromlist, level))

    builtins.__import__ = import_as_elsewhere


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    hide()
    runpy.run_path(sys.argv[0], run_name="__main__")
