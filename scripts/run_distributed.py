"""Start a training stage on several processes, on one machine or many, after some checks.

    python scripts/run_distributed.py --nproc_per_node 2 --algorithm sft --config config_distributed_example.yaml
    python scripts/run_distributed.py --nproc_per_node 8 --algorithm pretrain -- --max_steps 1000 --strategy zero2

On several machines, the same command on each of them but for its number:

    python scripts/run_distributed.py --nproc_per_node 8 --nnodes 2 --node_rank 0 --master_addr 192.168.1.100 ...

Prints the command that it runs. Flags it does not know, and all behind --, go to the stage script.
Signals reach the training, which saves and stops. --max_restarts N starts all processes again when
one has died; with --resume auto they go on from the last checkpoint. Processes are started by
torchrun also for DeepSpeed: the deepspeed launcher kills processes that are still saving. The
engine is that of the config file unless --engine says so.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from main import ALGORITHMS, choose_engine, stage_script
from runtime import launch
from runtime.distributed.orphans import signal_when_parent_dies
from runtime.launcher import STARTED_BY
from scripts import preflight

PORT = 29500  # where the nodes of a job meet
SAVE_SECONDS = 1800  # what processes have to save behind a signal, before torchrun kills them


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own flags, and those of the stage script."""
    own, rest = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument(
        "--nproc_per_node", type=int, help="processes on each machine (default: its GPUs, or 1)"
    )
    parser.add_argument("--nnodes", type=int, default=1, help="machines")
    parser.add_argument("--node_rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--master_addr", help="address of machine 0, as the others reach it")
    parser.add_argument(
        "--master_port",
        type=int,
        help=f"a free port there (default: any on one machine, else {PORT})",
    )
    parser.add_argument("--config", help="YAML file with the flags of the stage script")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="sft", help="the stage")
    parser.add_argument(
        "--engine", choices=("torchrun", "deepspeed", "accelerate"), help="who shares the work"
    )
    parser.add_argument(
        "--use_torchrun",
        action="store_true",
        help="torchrun, also where `accelerate launch` would do",
    )
    parser.add_argument(
        "--max_restarts", type=int, default=0, help="times that dead processes are started again"
    )
    args, unknown = parser.parse_known_args(own)
    return args, (["--config", args.config] if args.config else []) + unknown + rest


def local_address(master_addr: str) -> str:
    """The address under which other machines reach this one: that of the way to machine 0."""
    # Connecting a datagram socket sends nothing.
    with socket.socket(socket.getaddrinfo(master_addr, PORT)[0][0], socket.SOCK_DGRAM) as probe:
        probe.connect((master_addr, PORT))
        return probe.getsockname()[0]


def torchrun_words(args: argparse.Namespace) -> list[str]:
    """What stands before the stage script; machines meet at a store that one can join again."""
    words = ["--nproc_per_node", args.nproc_per_node, "--max_restarts", args.max_restarts]
    if args.nnodes == 1 and args.master_port is None:
        return ["-m", "torch.distributed.run", "--standalone", *words]
    address = args.master_addr or "127.0.0.1"
    words += ["--nnodes", args.nnodes, "--rdzv_backend", "c10d", "--rdzv_id", args.algorithm]
    words += [
        "--rdzv_endpoint",
        f"{address}:{args.master_port}",
        "--rdzv_conf",
        f"is_host={args.node_rank == 0}",
    ]
    return ["-m", "torch.distributed.run", *words, "--local_addr", local_address(address)]


def accelerate_words(args: argparse.Namespace) -> list[str]:
    words = ["--num_processes", args.nproc_per_node * args.nnodes, "--num_machines", args.nnodes]
    words += [
        "--machine_rank",
        args.node_rank,
        "--max_restarts",
        args.max_restarts,
        "--dynamo_backend",
        "no",
    ]
    words += ["--mixed_precision", "no"]  # the script's --dtype decides
    if args.nproc_per_node * args.nnodes > 1:
        words += ["--multi_gpu", "--main_process_ip", args.master_addr or "127.0.0.1"]
        words += ["--main_process_port", args.master_port or 0]
    return ["-m", "accelerate.commands.launch", *words]


def become_launcher(parent: int) -> None:
    """In a process that turns into a launcher: end with `parent`, tell the ranks its own id."""
    os.environ[STARTED_BY] = str(os.getpid())
    signal_when_parent_dies(signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def run(command: list[str], variables: dict[str, str]) -> int:
    """Run a command in a session of its own, and pass signals on to it; returns the exit code.

    In its own session, so that Ctrl-C does not reach it twice: the second signal would end it
    before it has saved. A SIGHUP that is ignored, as under nohup, stays so. When this process is
    killed, the command is asked to end.
    """
    received, process, pid = [], None, os.getpid()

    def forward(number: int, frame: object) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, *launch.hangup_signals()):
        signal.signal(number, forward)
    os.environ.update(variables)
    options = {}
    if hasattr(os, "fork"):  # not on Windows, which runs nothing in between
        options = {"start_new_session": True, "preexec_fn": lambda: become_launcher(pid)}
    process = subprocess.Popen(command, **options)
    if received:
        process.send_signal(received[0])
    code = process.wait()
    return 128 + received[0] if received and code else 128 - code if code < 0 else code


def main() -> int:
    # 1. Which script, how many processes
    args, argv = parse_args()
    gpus = torch.cuda.device_count()
    if args.nproc_per_node is None:
        args.nproc_per_node = max(1, gpus)
    engine = args.engine or choose_engine(argv)
    script = stage_script(args.algorithm, engine)
    if args.nproc_per_node * args.nnodes > 1 and "--ddp" not in argv:
        argv.append("--ddp")

    # 2. What is wrong before anything has started
    launch.check_flags(vars(args))
    preflight.check_layout(args.nnodes, args.node_rank, args.master_addr)
    if args.nnodes > 1 and args.master_port is None:
        args.master_port = PORT
    if args.master_port is not None and args.node_rank == 0:
        preflight.check_port(args.master_port)
    preflight.check_engine(engine)
    flags = preflight.stage_flags(script, argv)
    preflight.check_devices(flags, args.nproc_per_node, args.nnodes)
    preflight.check_data(flags.data_path)
    if warning := preflight.check_disk(flags):
        print(f"warning: {warning}", file=sys.stderr, flush=True)

    # 3. The command
    cuda = gpus and flags.device != "cpu"
    threads = os.environ.get(
        "OMP_NUM_THREADS", max(1, torch.get_num_threads() // args.nproc_per_node)
    )
    variables = {"OMP_NUM_THREADS": str(threads)}
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
    # Torchrun's own store would hand the addresses of dead processes to their successors.
    if args.max_restarts:
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if (
        hasattr(signal, "SIGHUP") and not launch.hangup_signals()
    ):  # torchrun would listen to it all the same
        variables["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    words = torchrun_words(args)
    # `accelerate launch --cpu` would run one process, without a word.
    if engine == "accelerate" and not cuda:
        variables["ACCELERATE_USE_CPU"] = "true"
    elif engine == "accelerate" and not args.use_torchrun:
        words = accelerate_words(args)
    command = [sys.executable, *map(str, words), str(script), *argv]
    print(
        " ".join(f"{name}={value}" for name, value in variables.items()),
        shlex.join(command),
        flush=True,
    )
    return run(command, variables)


if __name__ == "__main__":
    launch.run(main)
