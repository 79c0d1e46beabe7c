"""One HTML page of a run, or of several beside each other: curves, a summary, flags, samples.

    python scripts/report.py full_sft
    python scripts/report.py full_sft_512 full_sft_512.previous --out out/compared.html
    python scripts/report.py full_sft --watch 10

A run is named by its stage (its newest run), its name, folder, weights, or metrics.jsonl. The page is
one file that needs nothing else: it can be sent to someone. Bokeh draws it (pip install bokeh).
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.flags import check_flags, usage_error
from runtime.process import exits
from runtime.reporting.page import write_page
from runtime.reporting.run_record import RunRecord, find_run, name_apart, read_run


def parse_args() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.error = usage_error
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="stage, name, folder, weights or metrics.jsonl")
    add("--out", metavar="FILE", help="the page (default: report.html in the run's folder)")
    add("--out_dir", default=str(ROOT / "out"), help="where runs are looked for by name")
    add(
        "--watch", type=float, metavar="SECONDS", help="write it again and again while a run trains"
    )
    args = parser.parse_args()
    check_flags(vars(args))
    return args


def read_runs(paths: list[Path]) -> list[RunRecord]:
    runs = [read_run(path) for path in paths]
    name_apart(runs)
    return runs


def watch(paths: list[Path], out: Path, seconds: float) -> None:
    """Write the page whenever a run has written something, until none runs any more."""
    written = None
    while True:
        runs = read_runs(paths)
        is_running = any(run.is_running and not run.log.ending for run in runs)
        seen = [(run.state, run.path.stat().st_size) for run in runs]
        if seen != written:
            write_page(runs, out, refresh=seconds if is_running else 0)
            print(f"wrote {out}: " + ", ".join(f"{run.name} step {run.steps:,}" for run in runs))
            written = seen
        if not is_running:
            return
        time.sleep(seconds)


def main() -> int:
    args = parse_args()
    paths = [find_run(name, Path(args.out_dir)) for name in args.runs]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise ValueError(f"{args.runs[number]}: named twice: {path}")
    if len(paths) > 1 and not args.out:
        raise ValueError("several runs are compared in one page: name its file with --out")
    out = Path(args.out) if args.out else paths[0].parent / "report.html"
    if args.watch is not None:
        watch(paths, out, args.watch)
    else:
        write_page(read_runs(paths), out)
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    exits.run(main)
