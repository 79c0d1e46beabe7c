"""Write the page of a long run, and open it in Chromium: seconds, size, errors.

The run is made up: GRPO with 50,000 lines of metrics, samples, skipped steps and resumes in its
log. Ends with exit code 0 if the page is written in 5 seconds, has 5 MB at most, and opens without
an error or a request.

    python benchmarks/report_speed.py
    python benchmarks/report_speed.py --lines 500000 --chromium ""
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS, BYTES = 5, 5_000_000  # the limits
NAMES = "loss lr grad_norm kl entropy clipped_low clipped_high ratio reward reward_std".split()
NAMES += "completion_length truncated groups_without_variance reward_exact reward_format".split()


def write_run(folder: Path, lines: int) -> None:
    """Metrics of so many lines, each of 20 numbers in full precision, and a log."""
    generator = random.Random(1)
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        for step in range(1, lines + 1):
            line = {"step": step, "epoch": 1, "tokens": 900, "supervised_tokens": 700}
            line |= {name: generator.gauss(n, 1) for n, name in enumerate(NAMES)}
            line |= {"total_tokens": 900 * step, "tokens_per_sec": generator.gauss(9000, 500)}
            if step % 997 == 0:
                line["loss"] = None
            metrics.write(json.dumps(line) + "\n")
    stamp, long = "2026-12-01 10:00:00", repr("Eine lange Antwort. " * 50)
    with open(folder / "training.log", "w", encoding="utf-8") as log:
        log.write(
            f"{stamp} grpo_512: 26,000,000 parameters on 1 x cpu, {lines} steps, learning rate 1e-05\n"
        )
        for step in range(1, lines + 1):
            log.write(f"{stamp} epoch 1 step {step}/{lines} loss 0.1 lr 1.00e-05 grad_norm 1.0\n")
            if step % 100 == 0:
                log.write(
                    f"{stamp} step {step} reward 0.5\n" + f"  reward 0.50: {long} -> {long}\n" * 3
                )
            if step % 997 == 0:
                log.write(
                    f"{stamp} step {step} skipped: loss nan, gradient norm nan (1 skipped so far)\n"
                )
            if step % 9999 == 0:
                log.write(f"{stamp} resumed from step_{step} behind step {step}\n")


def open_page(page: Path, chromium: str) -> tuple[list[str], float, float]:
    """Open it; returns errors, seconds until all figures are drawn, ms for a move of the pointer."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith("file:") else faults.append(r.url))
        began = time.monotonic()
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
        seconds = time.monotonic() - began
        frame = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
        moves = f"(async () => {{ for (let n = 1; n <= 20; n++) {{ point(n * 100); await {frame}; }} }})()"
        began = time.monotonic()
        tab.evaluate(moves)
        per_move = (time.monotonic() - began) / 20
        browser.close()
    return faults, seconds, 1000 * per_move


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=50_000, help="of metrics.jsonl")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser, or nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "grpo_512"
        write_run(run, args.lines)
        began = time.monotonic()
        subprocess.run([sys.executable, str(ROOT / "scripts/report.py"), str(run)], check=True)
        seconds, size = time.monotonic() - began, (run / "report.html").stat().st_size
        print(f"{args.lines:,} lines of metrics: {seconds:.2f} s, a page of {size / 1e6:.2f} MB")
        is_good = seconds <= SECONDS and size <= BYTES
        if args.chromium:
            faults, opening, move = open_page(run / "report.html", args.chromium)
            print(f"Chromium draws it in {opening:.2f} s, a move of the pointer in {move:.0f} ms")
            print(f"{len(faults)} errors {faults[:3]}")
            is_good = is_good and not faults
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
