"""Train one run in eight layouts, and once more killed and resumed, and draw the loss curves.

The same data, seed and global batch everywhere, float32, one thread a process. Prints the largest
relative difference of a loss to the run on one process, and takes a picture of their report: all
curves on top of each other, with their differences below (Bokeh, Playwright and Chromium). Ends with exit code 0 if no loss differs by more than 1e-5.

    python benchmarks/one_curve.py
    python benchmarks/one_curve.py --only "ddp x2" "zero3 x2" --steps 10 --image ""
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

REFERENCE = "one process, 8 x 1"
KILLED = "kill -9, resumed as zero3 x2"
CHROMIUM = "/usr/bin/chromium"
DISTANCE = "Relative difference to the run on one process"
TITLE = "Training loss of one run in {} ways: same data, seed and global batch"
# In a page's script: wide lines first and thin ones on top of them, so that each can be seen where
# they lie on each other; no running means, and no numbers of a step.
PICTURE = """
for (const [at, {plot, curves}] of figures.entries()) {
  for (const renderer of plot.renderers) renderer.visible = curves.includes(renderer);
  curves.forEach(({glyph}, n) => glyph.setv({line_alpha: 1, line_width: at ? 1 : 1.3 * (curves.length - n)}));
}
document.querySelectorAll("output, .step").forEach((part) => part.remove());
"""
LIMIT = 1e-5  # sums over several processes are rounded otherwise

# name: (processes, flags). A step has 8 rows = data-parallel processes x micro-batches x batch_size.
LAYOUTS = {
    REFERENCE: (1, "--batch_size 8"),
    "one process, 1 x 8": (1, "--batch_size 1 --accumulation_steps 8"),
    "ddp x2": (2, "--strategy ddp --batch_size 4"),
    "zero1 x2": (2, "--strategy zero1 --batch_size 4"),
    "zero2 x2": (2, "--strategy zero2 --batch_size 4"),
    "zero3 x2": (2, "--strategy zero3 --batch_size 4"),
    "tensor parallel 2": (2, "--tensor_parallel 2 --batch_size 8"),
    "context parallel 2": (2, "--context_parallel 2 --batch_size 8"),
}


def start(processes: int, flags: str, folder: Path, out: Path, steps: int) -> subprocess.Popen:
    """Start SFT from random weights on the demo data; what it prints goes to out/output.txt."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "trainer/train_full_sft.py"), *flags.split()]
    command += ["--ddp"] if processes > 1 else []
    command += "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 256".split()
    command += f"--global_batch_size 8 --max_steps {steps} --learning_rate 2e-3".split()
    command += "--from_weight none --device cpu --dtype float32 --log_interval 1".split()
    command += f"--save_interval 5 --cache_dir {folder / 'cache'} --out_dir {out}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out.mkdir(exist_ok=True)
    with open(out / "output.txt", "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def finish(process: subprocess.Popen, out: Path) -> list[float]:
    """Wait for a run, and return the loss of each of its steps."""
    if process.wait(600):
        raise SystemExit(f"{' '.join(process.args)}\n{(out / 'output.txt').read_text()}")
    lines = map(json.loads, (out / "full_sft_64/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def train(name: str, folder: Path, steps: int) -> list[float]:
    """Train in one layout; returns the loss of each step."""
    out = folder / name.replace(" ", "_")
    return finish(start(*LAYOUTS[name], folder, out, steps), out)


def train_killed(folder: Path, steps: int) -> list[float]:
    """Train on one process up to the middle, kill -9, go on with zero3 on two."""
    out = folder / "killed"
    metrics = out / "full_sft_64/metrics.jsonl"
    process = start(*LAYOUTS[REFERENCE], folder, out, steps)
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps // 2:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.01)
    processes, flags = LAYOUTS["zero3 x2"]
    return finish(start(processes, f"{flags} --resume auto", folder, out, steps), out)


def relative_differences(losses: list[float], reference: list[float]) -> list[float]:
    """|loss - reference| / reference of each step."""
    return [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]


def draw(curves: dict[str, list[float]], picture: Path) -> None:
    """Take the picture: a report's figures of the losses and of their distances from the first."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        packages = "pip install -r requirements-report.txt playwright"
        raise SystemExit(f"a browser takes the picture: {packages}") from None

    from runtime.reporting.page import write_page
    from runtime.reporting.run_record import read_run

    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for name, losses in curves.items():
            folder = Path(scratch) / name
            folder.mkdir()
            distances = relative_differences(losses, curves[REFERENCE])
            rows = enumerate(zip(losses, distances, strict=True), 1)
            lines = [{"step": n, "loss": loss, DISTANCE: d} for n, (loss, d) in rows]
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
            runs.append(read_run(folder / "metrics.jsonl"))
        page = Path(scratch) / "report.html"
        write_page(runs, page)
        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 900, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]", state="attached")
            tab.evaluate(PICTURE)
            title = f"(head) => {{ head.textContent = {json.dumps(TITLE.format(len(curves)))} }}"
            tab.locator("h3").first.evaluate(title)
            picture.parent.mkdir(parents=True, exist_ok=True)
            tab.locator(".figures").screenshot(path=picture)
            browser.close()
    print(f"wrote {picture}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of every run")
    parser.add_argument("--image", default="out/one_curve.png", help="PNG to write, or nothing")
    names = [name for name in (*LAYOUTS, KILLED) if name != REFERENCE]
    parser.add_argument("--only", nargs="+", choices=names, metavar="LAYOUT", default=names)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        curves = {REFERENCE: train(REFERENCE, folder, args.steps)}
        first, last = curves[REFERENCE][0], curves[REFERENCE][-1]
        print(f"{REFERENCE:30} loss {first:.4f} -> {last:.4f}, {args.steps} steps of 8 packs")
        largest = 0.0
        for name in args.only:
            losses = (
                train_killed(folder, args.steps)
                if name == KILLED
                else train(name, folder, args.steps)
            )
            curves[name] = losses
            distance = max(relative_differences(losses, curves[REFERENCE]))
            largest = max(largest, distance)
            print(f"{name:30} largest relative difference {distance:.1e}", flush=True)
        print(f"largest relative difference of a loss: {largest:.1e}")
        if args.image:
            draw(curves, Path(args.image))
    return 0 if largest <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
