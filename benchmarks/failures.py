"""Let something fail in every stage and engine, with processes that read data beside it, and time
how all of it ends.

Each case is a run that a user could start: one process, or two under torchrun; in it rank 0 or 1
raises as out of memory does, at one of its phases. It passes where nothing is left 10 seconds after
the error was shown, and the exit code is not 0.

    python benchmarks/failures.py                            every stage and engine, in its third step
    python benchmarks/failures.py --phases all --stages full_sft
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --device cpu --max_seq_len 64 --from_weight"
    " none"
)
TINY += " --batch_size 2 --max_steps 6 --log_interval 1"
READ = "--num_workers {workers} --cache_dir {cache}"
TRY = "--max_new_tokens 8"
STAGES = {
    "pretrain": READ,
    "full_sft": READ,
    "lora": READ,
    "reward": READ,
    "dpo": READ,
    "distillation": f"{READ} --teacher_weight {{teacher}}",
    "grpo": f"{TRY} --group_size 2",
    "ppo": TRY,
    "sft_deepspeed": READ,
    "sft_accelerate": READ,
    "sft_lightning": READ,
    "sft_pipeline": f"{READ} --pipeline_parallel 2",
}
PHASES = ["data", "forward", "step", "evaluation", "save", "end", "reader", "killed"]
LIMIT = 10  # seconds between the error and the end of everything


def left_of(tag: str) -> list[int]:
    """Ids of the processes that carry a tag in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FAILURES_TAG={tag}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def fail(
    stage: str, phase: str, processes: int, workers: int, work: Path
) -> tuple[float | None, int | None, str]:
    """Seconds from the error to the end of all processes (None: they did not end), exit code, what
    was printed."""
    script = ROOT / f"trainer/train_{stage}.py"
    flags = STAGES[stage].format(
        workers=workers, cache=work / "cache", teacher=work / "teacher.pth"
    )
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        if processes == 2
        else []
    )
    command = [
        sys.executable,
        *launch,
        ROOT / "tests/sabotage.py",
        phase,
        str(processes - 1),
        script,
    ]
    command += [
        *TINY.split(),
        *flags.split(),
        "--out_dir",
        work / "out",
        *(["--ddp"] if processes == 2 else []),
    ]
    if phase == "evaluation":
        command += ["--eval_ratio", "0.1", "--eval_interval", "2"]
    tag = f"{stage}-{phase}-{processes}-{workers}-{os.getpid()}"
    variables = {
        "FAILURES_TAG": tag,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
    log, shown_at = work / f"{tag}.log", None
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | variables
        )
    started = time.monotonic()
    while process.poll() is None or left_of(tag):
        now = time.monotonic()
        if shown_at is None and re.search(
            "sabotage in|reads data ended|error: ", log.read_text(errors="replace")
        ):
            shown_at = now
        if now - started > 300 or shown_at is not None and now - shown_at > 60:
            for number in left_of(tag):
                with contextlib.suppress(OSError):
                    os.kill(number, signal.SIGKILL)
            return None, process.wait(), log.read_text(errors="replace")
        time.sleep(0.1)
    return (
        time.monotonic() - (shown_at or time.monotonic()),
        process.wait(),
        log.read_text(errors="replace"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=[*STAGES], help="stages and engines"
    )
    parser.add_argument(
        "--phases", nargs="+", choices=[*PHASES, "rollout", "all"], default=["step"], help="where"
    )
    parser.add_argument(
        "--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="one, or two ranks"
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[2], help="values of --num_workers"
    )
    args = parser.parse_args()
    phases = PHASES if args.phases == ["all"] else args.phases
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "distillation" in args.stages:
            make_teacher(work)
        for stage in args.stages:
            for phase in phases:
                for processes in [2] if stage == "sft_pipeline" else args.processes:
                    for workers in args.workers if "num_workers" in STAGES[stage] else [0]:
                        failed += not check(stage, phase, processes, workers, work)
    print(f"{failed} failed")
    return int(failed > 0)


def check(stage: str, phase: str, processes: int, workers: int, work: Path) -> bool:
    """Run a case and print how it went."""
    seconds, code, printed = fail(stage, phase, processes, workers, work)
    shown = "sabotage in" in printed or "reads data ended" in printed
    good = seconds is not None and seconds < LIMIT and code != 0 and shown
    ended = "still there" if seconds is None else f"all gone after {seconds:.1f} s"
    case = f"{stage}, {phase}, {processes} processes, {workers} workers"
    print(f"{'ok  ' if good else 'FAIL'} {case}: {ended}, exit code {code}", flush=True)
    if not good:
        print(printed[-1000:], flush=True)
    return good


def make_teacher(work: Path) -> None:
    """Weights of a model that has learned nothing."""
    words = (
        f"{ROOT / 'trainer/train_pretrain.py'} {TINY} --cache_dir {work / 'cache'} --out_dir {work}"
        " --max_steps 1"
    )
    subprocess.run(
        [sys.executable, *words.split(), "--save_weight", "teacher"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (work / "teacher_32.pth").rename(work / "teacher.pth")
    (work / "teacher_32.json").rename(work / "teacher.json")


if __name__ == "__main__":
    sys.exit(main())
