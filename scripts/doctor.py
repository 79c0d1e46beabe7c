"""What is wrong with this environment? A line per check: ok, warn or FAIL, what, the remedy.

    python scripts/doctor.py                                     this machine; two processes try to talk to each other
    torchrun --nnodes 2 ... scripts/doctor.py                    all machines of the launch, and the link between them

Exit code 0 without a FAIL, 1 with one. Needs nothing installed; every check has a time limit.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.flags import check_flags, usage_error
from runtime.launcher import die_with_launcher, read_launch
from runtime.machine import meminfo
from runtime.process import exits

REQUIRED = ("torch", "transformers", "numpy", "wandb")
OPTIONAL = ("deepspeed", "accelerate", "lightning", "tensorboard")
COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "FAIL": "\x1b[31m"}
GIB, MIB = 2**30, 2**20

Result = tuple[str, str, str, str]  # ok, warn or FAIL; what was checked; what was found; what to do


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --------------------------------------------------------------------------------------------------
# Checks of one machine
# --------------------------------------------------------------------------------------------------


def check_software(args) -> list[Result]:
    python = ".".join(map(str, sys.version_info[:3]))
    known = (3, 10) <= sys.version_info[:2] <= (3, 12)
    results = [
        ("ok" if known else "warn", "python", python, "" if known else "tested are 3.10 to 3.12")
    ]
    for package in REQUIRED:
        version = version_of(package)
        remedy = "" if version else "pip install -r requirements.txt"
        results.append(("ok" if version else "FAIL", package, version or "not installed", remedy))
    for package in OPTIONAL:
        version = version_of(package)
        results.append(
            (
                "ok",
                package,
                version or "not installed, optional",
                "" if version else f"pip install {package}",
            )
        )
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    what = (
        compiler or "none: no --compile, no deepspeed, and a CPU takes twice as long for everything"
    )
    remedy = (
        "" if compiler else "install g++ and ninja, or set CXX; ds_report shows what deepspeed has"
    )
    results.append(("ok" if compiler else "warn", "C++ compiler", what, remedy))
    for path in sorted((ROOT / "configs" / "deepspeed").glob("*.json")):
        zero = json.loads(path.read_text()).get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            remedy = "set stage3_gather_16bit_weights_on_model_save to true"
            results.append(
                (
                    "warn",
                    path.name,
                    "ZeRO-3 would not put the weights together when it saves",
                    remedy,
                )
            )
    return results


def check_gpus(args) -> list[Result]:
    import torch

    try:
        gpus = driver_gpus()
    except subprocess.TimeoutExpired:
        finding = "nvidia-smi gives no answer in 30 s"
        return [("FAIL", "GPU driver", finding, "restart the machine; see dmesg")]
    seen = torch.cuda.device_count()
    if not gpus and not seen:
        return [("ok", "GPUs", "none: training runs on the CPU, with gloo", "")]
    if not seen:
        return [unseen_gpus(len(gpus), torch.version.cuda)]
    if args.nproc_per_node > seen:
        finding = f"{args.nproc_per_node} processes for {seen}"
        return [
            ("FAIL", "GPUs", finding, f"a process has a GPU of its own: --nproc_per_node {seen}")
        ]
    names = {torch.cuda.get_device_name(n) for n in range(seen)}
    driver = f", driver {gpus[0][1]}" if gpus else ""
    finding = f"{seen} x {' + '.join(sorted(names))}, CUDA {torch.version.cuda}{driver}"
    results = [("ok", "GPUs", finding, "")]
    if len(names) > 1:
        remedy = "a step waits for the slowest: choose equal ones by CUDA_VISIBLE_DEVICES"
        results = [("warn", "GPUs", finding, remedy)]
    if len(gpus) > seen:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        finding = f"{seen} of {len(gpus)}: CUDA_VISIBLE_DEVICES={visible}"
        results.append(("warn", "visible GPUs", finding, "meant so?"))
    return [*results, *busy_gpus(gpus), memory_for_gpus(seen)]


def driver_gpus() -> list[list[str]]:
    """(name, driver, MiB of memory, MiB taken) of each GPU that nvidia-smi knows.

    Raises:
        subprocess.TimeoutExpired: it gives no answer.
    """
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30)
    except FileNotFoundError:
        return []
    lines = answer.stdout.strip().splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == 3]


def unseen_gpus(count: int, built: str | None) -> Result:
    """The driver has GPUs, and torch, built for CUDA `built`, sees none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not built:
        remedy = "install the build of torch with CUDA from pytorch.org"
    elif visible is not None:
        remedy = f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it"
    else:
        remedy = "install torch with CUDA"
    finding = f"the driver has {count}, torch (CUDA {built or 'none'}) sees none"
    return ("FAIL", "GPUs", finding, remedy)


def busy_gpus(gpus: list[list[str]]) -> list[Result]:
    """A warning for each GPU of which others take more than a tenth."""
    return [
        (
            "warn",
            f"GPU {number} memory",
            f"{used} of {total} MiB are taken by others",
            f"end that process (nvidia-smi shows it), or leave GPU {number} out by"
            " CUDA_VISIBLE_DEVICES",
        )
        for number, (_, _, total, used) in enumerate(gpus)
        if total.isdigit() and used.isdigit() and int(used) > int(total) / 10
    ]


def memory_for_gpus(seen: int) -> Result:
    import torch

    if not (ram := meminfo("MemTotal")):
        return ("ok", "RAM", "unknown on this system", "")
    memory = sum(torch.cuda.get_device_properties(n).total_memory for n in range(seen))
    finding = f"{ram / GIB:.0f} GiB for {memory / GIB:.0f} GiB of GPU memory"
    if ram >= 2 * memory:
        return ("ok", "RAM", finding, "")
    remedy = "twice the GPUs' memory is advised: no --offload, fewer --num_workers"
    return ("warn", "RAM", finding, remedy)


def check_limits(args) -> list[Result]:
    results = []
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        state = "FAIL" if size < 64 * MIB else "warn" if size < GIB else "ok"
        remedy = (
            ""
            if state == "ok"
            else "docker run --shm-size 8g (or --ipc host); else --num_workers 0"
        )
        results.append((state, "shared memory", f"/dev/shm has {size / GIB:.2f} GiB", remedy))
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = 0 <= soft < 4096
        remedy = f"ulimit -n {hard}" if few else ""
        results.append(("warn" if few else "ok", "open files", f"limit {soft}", remedy))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = args.nproc_per_node
    threads = os.environ.get("OMP_NUM_THREADS", "")
    each = int(threads) if threads.isdigit() else 1 if processes > 1 else cores  # torchrun sets 1
    crowded = each * processes > cores
    finding = f"{cores} cores for {processes} processes x {each} threads"
    remedy = f"export OMP_NUM_THREADS={max(1, cores // processes)}"
    remedy = "fewer processes than cores: --nproc_per_node" if processes > cores else remedy
    results.append(("warn" if crowded else "ok", "CPU threads", finding, remedy if crowded else ""))
    return results


def check_disk(args) -> list[Result]:
    folder = Path(args.out_dir)
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return [
            (
                "FAIL",
                "out_dir",
                f"cannot write to {folder}: {error.strerror}",
                "choose another --out_dir",
            )
        ]
    free = shutil.disk_usage(folder).free
    state = "FAIL" if free < GIB else "warn" if free < 10 * GIB else "ok"
    remedy = (
        ""
        if state == "ok"
        else "make room: a checkpoint takes 12 bytes per parameter; see --save_total_limit"
    )
    return [(state, "disk", f"{free / GIB:.1f} GiB free in {folder}", remedy)]


def check_network(args) -> list[Result]:
    results, host = [], socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        results.append(("ok", "hostname", f"{host} is {address}", ""))
    except OSError:
        remedy = f"add it to /etc/hosts, or export GLOO_SOCKET_IFNAME ({', '.join(interfaces())})"
        results.append(
            ("warn", "hostname", f"{host} has no address: gloo takes the loopback", remedy)
        )
    master, port = args.master_addr, args.master_port
    try:
        results.append(("ok", "master_addr", f"{master} is {socket.gethostbyname(master)}", ""))
    except OSError:
        results.append(
            (
                "FAIL",
                "master_addr",
                f"{master} has no address",
                "check --master_addr, /etc/hosts, DNS",
            )
        )
    if read_launch().launched:
        return [*results, ("ok", "master_port", f"{port}, of this launch", "")]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            results.append(("ok", "master_port", f"{port} is free", ""))
        except OSError as error:
            with socket.socket() as other:
                other.bind(("", 0))
                remedy = f"--master_port {other.getsockname()[1]}"
            results.append(("FAIL", "master_port", f"{port}: {error.strerror}", remedy))
    return results


def check_variables(args) -> list[Result]:
    """The environment variables that make runs slow, or hang."""
    notes = {
        ("NCCL_P2P_DISABLE", "1"): "GPUs talk through the CPU: unset it unless NCCL fails without",
        ("NCCL_IB_DISABLE", "1"): "machines talk by TCP: unset it unless NCCL fails without",
        ("CUDA_LAUNCH_BLOCKING", "1"): "every kernel is waited for: for debugging only, unset it",
        (
            "TORCH_DISTRIBUTED_DEBUG",
            "DETAIL",
        ): "every collective is checked: for debugging only, unset it",
        ("NCCL_TIMEOUT", None): "neither NCCL nor torch reads it: it changes nothing, unset it",
    }
    results, known = [], set(interfaces())
    for name, value in sorted(os.environ.items()):
        remedy = notes.get((name, value), notes.get((name, None), ""))
        if name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") and not value.startswith("^"):
            asked = value.lstrip("=").split(",")
            exact = name.startswith("GLOO") or value.startswith("=")
            if not all(any(n == a or not exact and n.startswith(a) for n in known) for a in asked):
                results.append(
                    (
                        "FAIL",
                        name,
                        f"{value}: no such interface",
                        f"one of {', '.join(sorted(known))}",
                    )
                )
                continue
        if remedy or name.startswith(("NCCL_", "GLOO_")) or name == "CUDA_VISIBLE_DEVICES":
            results.append(("warn" if remedy else "ok", name, value or "(empty)", remedy))
    return results


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


# --------------------------------------------------------------------------------------------------
# Processes that talk to each other
# --------------------------------------------------------------------------------------------------


def describe_link(backend: str, measured: dict) -> Result:
    finding = (
        f"{measured['ranks']} processes, {measured['bandwidth'] / 1e9:.2f} GB/s,"
        f" {1e6 * measured['latency']:.0f} us"
    )
    if not measured["right"]:
        return (
            "FAIL",
            backend,
            f"{finding}, but wrong sums",
            "bad memory or driver: find the GPU or machine by halves",
        )
    return "ok", backend, finding, ""


def round_trip(backend: str, processes: int, seconds: float) -> Result:
    from runtime.distributed.link import run_processes

    remedy = "NCCL_DEBUG=INFO shows why; try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1"
    remedy = (
        remedy if backend == "nccl" else "a firewall on this machine, or a wrong GLOO_SOCKET_IFNAME"
    )
    command = [sys.executable, __file__, "--probe", backend, "--timeout", str(seconds)]
    try:
        return describe_link(backend, json.loads(run_processes(command, processes, seconds)))
    except (TimeoutError, RuntimeError) as error:
        return "FAIL", backend, f"{processes} processes: {error}", remedy


def check_link(args) -> list[Result]:
    import torch

    results = [round_trip("gloo", 2, args.timeout / 2)]
    if torch.cuda.is_available():
        results.append(round_trip("nccl", min(2, torch.cuda.device_count()), args.timeout / 2))
    return results


# --------------------------------------------------------------------------------------------------
# Running and printing
# --------------------------------------------------------------------------------------------------

LOCAL = (check_software, check_gpus, check_limits, check_disk, check_network, check_variables)


def limited(check: Callable, args) -> list[Result]:
    """The results of a check, or a FAIL when it breaks or does not come back in time."""
    name, box = check.__name__.removeprefix("check_").replace("_", " "), []

    def body() -> None:
        try:
            box.append(check(args))
        except Exception as error:  # whatever is broken here is what we are looking for
            box.append(
                [
                    (
                        "FAIL",
                        name,
                        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                        "mend that",
                    )
                ]
            )

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(args.timeout)
    hint = "a dead network disk or name server?"
    return box[0] if box else [("FAIL", name, f"no answer within {args.timeout:.0f} s", hint)]


def show(results: list[Result]) -> None:
    for state, name, finding, remedy in results:
        shown = f"{COLOURS[state]}{state:4}\x1b[0m" if sys.stdout.isatty() else f"{state:4}"
        print(f"{shown}  {name:23}  {finding}{f'  ->  {remedy}' if remedy else ''}", flush=True)


def examine_launch(args) -> int:
    """Under torchrun: checks of every machine, whether they are alike, and the link of all."""

    def give_up() -> None:
        show(
            [
                (
                    "FAIL",
                    "launch",
                    f"not done within {args.timeout:.0f} s",
                    "a firewall, or GLOO_SOCKET_IFNAME?",
                )
            ]
        )
        os._exit(1)

    timer = threading.Timer(args.timeout, give_up)
    timer.daemon = True
    timer.start()
    import torch
    import torch.distributed as dist

    from runtime.distributed.link import measure

    dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    local = read_launch().local_rank
    own_results = (
        [result for check in LOCAL for result in limited(check, args)] if local == 0 else []
    )
    everyone: list = [None] * dist.get_world_size()
    gpus = torch.cuda.device_count() > local
    versions = {package: version_of(package) for package in ("torch", "transformers", "numpy")}
    dist.all_gather_object(everyone, (socket.gethostname(), versions, gpus, own_results))
    together = [describe_link("gloo", measure(torch.device("cpu")))]
    if all(has_gpu for _, _, has_gpu, _ in everyone):
        torch.cuda.set_device(local)
        group = dist.new_group(backend="nccl")
        together.append(describe_link("nccl", measure(torch.device("cuda", local), group)))
    different = {json.dumps(theirs) for _, theirs, _, _ in everyone}
    finding = " and ".join(sorted(different)) if len(different) > 1 else "the same everywhere"
    remedy = "" if len(different) == 1 else "install one version on all machines"
    together.append(("FAIL" if remedy else "ok", "versions", finding, remedy))
    if dist.get_rank() == 0:
        for host, _, _, results in everyone:
            if results:
                print(f"--- {host}")
                show(results)
        print(f"--- all {len(everyone)} processes")
        show(together)
    dist.destroy_process_group()
    timer.cancel()
    return int(
        any(state == "FAIL" for *_, results in [*everyone, (together,)] for state, *_ in results)
    )


def main() -> int:
    die_with_launcher()
    try:
        launch = read_launch()
    except ValueError as error:
        show([("FAIL", "launcher", *str(error).split(": ", 1))])
        return 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out_dir", default=str(ROOT / "out"), help="where runs will write")
    parser.add_argument("--nproc_per_node", type=int, default=launch.local_world_size,
                        help="processes that will run on this machine")  # fmt: skip
    parser.add_argument(
        "--master_addr", default=os.environ.get("MASTER_ADDR", "localhost"), help="host of rank 0"
    )
    parser.add_argument(
        "--master_port", type=int, default=os.environ.get("MASTER_PORT", "29500"), help="its port"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds that a check may take"
    )
    parser.add_argument("--probe", choices=("gloo", "nccl"), help=argparse.SUPPRESS)
    parser.error = usage_error
    args = parser.parse_args()
    check_flags(vars(args))
    exits.end_with_reader()
    if args.probe:
        from runtime.distributed.link import measure_alone

        print(json.dumps(measure_alone(args.probe, args.timeout)), flush=True)
        return 0
    if launch.launched:
        return examine_launch(args)
    failed = False
    for check in (*LOCAL, check_link):
        results = limited(check, args)
        show(results)
        failed = failed or any(state == "FAIL" for state, *_ in results)
    return int(failed)


if __name__ == "__main__":
    exits.run(main)
