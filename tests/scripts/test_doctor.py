"""scripts/doctor.py: it finds what is broken, never hangs, and says so in its exit code."""

import resource
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from runtime.distributed.link import free_port, run_processes
from scripts import doctor

SCRIPT = "scripts/doctor.py"


def args(**changed) -> SimpleNamespace:
    values = {
        "out_dir": ".",
        "nproc_per_node": 1,
        "master_addr": "localhost",
        "master_port": 0,
        "timeout": 60.0,
    }
    return SimpleNamespace(**values | changed)


def found(results: list, name: str) -> tuple[str, str, str]:
    """(state, finding, remedy) of the one check of that name."""
    (result,) = [result for result in results if result[1] == name]
    return result[0], *result[2:]


def test_a_report_of_this_machine(run_script, tmp_path):
    result = run_script(SCRIPT, "--out_dir", tmp_path / "out", "--master_port", free_port())
    lines = result.stdout.splitlines()
    assert lines and not result.stderr and "\x1b" not in result.stdout
    states = {line[:4].strip() for line in lines}
    assert states <= {"ok", "warn", "FAIL"} and result.returncode == int("FAIL" in states)
    by_name = {line[6:29].strip(): line for line in lines}
    assert {
        "python",
        "torch",
        "deepspeed",
        "GPUs",
        "disk",
        "open files",
        "master_port",
        "gloo",
    } <= by_name.keys()
    assert by_name["gloo"].startswith("ok") and " GB/s" in by_name["gloo"]


def test_all_machines_of_a_launch(run_script, tmp_path):
    result = run_script(SCRIPT, "--out_dir", tmp_path, nproc=2)
    assert "--- all 2 processes\nok    gloo " in result.stdout, result.stderr
    assert result.stdout.count("python ") == 1, (
        "one report of a machine, whatever the number of its processes"
    )


def test_a_broken_link_is_exit_code_1(run_script, tmp_path):
    port = free_port()
    result = run_script(
        SCRIPT, "--out_dir", tmp_path, "--master_port", port, env={"GLOO_SOCKET_IFNAME": "nowhere7"}
    )
    assert result.returncode == 1 and not result.stderr
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert any(
        "GLOO_SOCKET_IFNAME" in line and "nowhere7: no such interface" in line for line in failed
    )
    assert any(line[6:10] == "gloo" and "  ->  " in line for line in failed)


def test_no_check_hangs_or_breaks_the_others():
    def check_hang(args):
        threading.Event().wait()

    def check_break(args):
        raise OSError("no such thing")

    ((state, name, finding, remedy),) = doctor.limited(check_hang, args(timeout=0.1))
    assert (state, name) == ("FAIL", "hang") and "no answer within 0 s" in finding and remedy
    assert doctor.limited(check_break, args()) == [
        ("FAIL", "break", "OSError: no such thing", "mend that")
    ]


def test_processes_that_hang_or_fail_are_ended():
    hang = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    with pytest.raises(TimeoutError, match="no answer"):
        run_processes(hang, 2, 1.0)
    one_fails = (
        "import os, sys, threading\nos.environ['RANK'] == '1' and"
        " sys.exit('broken')\nthreading.Event().wait()"
    )
    with pytest.raises(RuntimeError, match="broken"):
        run_processes([sys.executable, "-c", one_fails], 2, 60.0)
    assert run_processes([sys.executable, "-c", "print('log'); print('end')"], 2, 60.0) == "end"


def test_a_busy_port_and_a_free_one():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        state, finding, remedy = found(doctor.check_network(args(master_port=port)), "master_port")
        assert state == "FAIL" and str(port) in finding and remedy.startswith("--master_port ")
    assert found(doctor.check_network(args(master_port=port)), "master_port")[0] == "ok"


def test_a_master_without_address():
    results = doctor.check_network(args(master_addr="nowhere.invalid"))
    assert found(results, "master_addr")[0] == "FAIL"


def test_variables_of_the_guide(monkeypatch):
    for name, value in (
        ("NCCL_P2P_DISABLE", "1"),
        ("NCCL_TIMEOUT", "1800"),
        ("NCCL_DEBUG", "INFO"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    results = doctor.check_variables(args())
    states = {name: state for state, name, *_ in results}
    assert (
        states["NCCL_P2P_DISABLE"]
        == states["NCCL_TIMEOUT"]
        == states["CUDA_LAUNCH_BLOCKING"]
        == "warn"
    )
    assert states["NCCL_DEBUG"] == states["NCCL_SOCKET_IFNAME"] == "ok"


def test_gpus_that_torch_cannot_see(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A100, 555.42, 81920, 100'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    state, finding, remedy = found(doctor.check_gpus(args()), "GPUs")
    assert state == "FAIL" and "the driver has 1" in finding and remedy


def test_limits_and_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    state, finding, remedy = found(doctor.check_limits(args()), "CPU threads")
    assert (
        state == "warn"
        and "1000 threads" in finding
        and remedy.startswith("export OMP_NUM_THREADS=")
    )
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 65536))
    assert found(doctor.check_limits(args()), "open files") == (
        "warn",
        "limit 1024",
        "ulimit -n 65536",
    )
    usage = SimpleNamespace(total=2**26, free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert found(doctor.check_limits(args()), "shared memory")[0] == "warn"
    assert found(doctor.check_disk(args(out_dir=tmp_path / "new" / "out")), "disk")[0] == "FAIL"
    (tmp_path / "file").write_text("")
    assert doctor.check_disk(args(out_dir=tmp_path / "file"))[0][:2] == ("FAIL", "out_dir")


def test_software(monkeypatch, tmp_path):
    folder = tmp_path / "configs" / "deepspeed"
    folder.mkdir(parents=True)
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (folder / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    installed = {"torch": "2.13.0", "numpy": "2.4.6", "transformers": "5.23.0"}
    monkeypatch.setattr(doctor, "version_of", installed.get)
    results = doctor.check_software(args())
    assert found(results, "torch") == ("ok", "2.13.0", "")
    assert found(results, "wandb") == ("FAIL", "not installed", "pip install -r requirements.txt")
    assert found(results, "deepspeed") == ("ok", "not installed, optional", "pip install deepspeed")
    assert found(results, "zero3.json")[0] == "warn" and "zero2.json" not in {
        name for _, name, *_ in results
    }
