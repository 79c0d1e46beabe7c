"""Start-up on a big data file: time to the first step, cold and warm, and the memory that the size
of the data costs.

Writes a JSONL of conversations, trains a tiny model on it for two steps, twice, and once on a file
of 1 MB for comparison. It must reach: less than 1 GB of memory above the small file's run, and step
1 of the second start in less than 10 s. Exit code 1 where it does not.

    python benchmarks/big_data.py
    python benchmarks/big_data.py --gb 0.1 --dir somewhere --keep
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_ADDED_MB, MAX_WARM_SECONDS = 1000, 10
FLAGS = "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_steps 2 --device cpu --from_weight none".split()


def make_sentences(rng: random.Random, count: int) -> list[str]:
    """Sentences of invented words, some of them Chinese, that can stand inside a JSON string as
    they are."""
    syllables = [
        a + b + c
        for a in "bcdfghklmnprstvwz"
        for b in "aeiou"
        for c in ("", "n", "r", "s", "t", "ng")
    ]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(40_000)]
    weights = list(
        itertools.accumulate(1 / (rank + 10) for rank in range(len(words)))
    )  # frequent and rare words
    han = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]
    sentences = []
    for n in range(count):
        if n % 5 == 0:
            sentences.append("".join(rng.choices(han, k=rng.randint(5, 40))) + "\u3002")
        else:
            text = " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(4, 24)))
            sentences.append(
                text.capitalize() + rng.choice((". ", "? ", "! ", ", ", ": ", " 12. ", " 345.\\n"))
            )
    return sentences


def write_data(path: Path, size: int) -> int:
    """Write about `size` bytes of conversations of mixed lengths, the same in every run; returns
    the rows."""
    rng, written, rows = random.Random(0), 0, 0
    sentences = make_sentences(rng, 20_000)
    with open(path, "wb") as file:
        while written < size:
            turns = []
            for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
                for role, longest in (("user", 4), ("assistant", 12)):
                    content = "".join(rng.choices(sentences, k=rng.randint(1, longest)))
                    turns.append(f'{{"role": "{role}", "content": "{content}"}}')
            written += file.write(f'{{"conversations": [{", ".join(turns)}]}}\n'.encode())
            rows += 1
    return rows


def train(data: Path, work: Path) -> tuple[float, float]:
    """Run the SFT script for two steps: seconds from the start to step 1, and its peak memory in
    MB."""
    command = [
        sys.executable,
        str(ROOT / "trainer/train_full_sft.py"),
        *FLAGS,
        "--data_path",
        str(data),
    ]
    command += ["--out_dir", str(work / "out"), "--cache_dir", str(work / "cache")]
    begin, first_step, printed = time.perf_counter(), None, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        printed.append(line)
        if first_step is None and " step 1/" in line:
            first_step = time.perf_counter() - begin
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or first_step is None:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{''.join(printed)}")
    return first_step, usage.ru_maxrss / 1024  # ru_maxrss is in KB on Linux


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gb", type=float, default=2.0, help="size of the data file, in GB of 1e9 bytes"
    )
    parser.add_argument("--dir", help="folder for data and caches (default: a temporary one)")
    parser.add_argument(
        "--keep", action="store_true", help="leave the data file and the cache in --dir"
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="big_data_", dir=args.dir))
    try:
        small, big = work / "small.jsonl", work / "big.jsonl"
        write_data(small, 1_000_000)
        rows = write_data(big, int(args.gb * 1e9))
        data_mb = big.stat().st_size / 1e6
        print(f"data           {data_mb:,.0f} MB, {rows:,} rows")

        small_start, small_peak = train(small, work)
        shutil.rmtree(work / "cache")
        print(f"1 MB file      step 1 after {small_start:.1f} s, peak {small_peak:,.0f} MB")
        cold, cold_peak = train(big, work)
        rate = data_mb / max(0.1, cold - small_start)
        print(
            f"first start    step 1 after {cold:,.1f} s ({rate:.1f} MB/s), peak {cold_peak:,.0f} MB"
        )
        warm, warm_peak = train(big, work)
        print(f"second start   step 1 after {warm:.1f} s, peak {warm_peak:,.0f} MB")
        cache_mb = (
            sum(file.stat().st_size for file in (work / "cache").rglob("*") if file.is_file()) / 1e6
        )
        added = max(cold_peak, warm_peak) - small_peak
        print(f"cache          {cache_mb:,.0f} MB on disk")
        print(f"added memory   {added:,.0f} MB, must be below {MAX_ADDED_MB:,}")
        print(f"second start   {warm:.1f} s, must be below {MAX_WARM_SECONDS}")
        result = {
            "gb": args.gb,
            "cold_s": cold,
            "warm_s": warm,
            "added_mb": added,
            "mb_per_s": rate,
        }
        print(json.dumps({name: round(value, 2) for name, value in result.items()}))
        return 0 if added < MAX_ADDED_MB and warm < MAX_WARM_SECONDS else 1
    finally:
        if args.keep:
            print(f"kept           {work}")
        else:
            shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
