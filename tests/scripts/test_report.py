"""scripts/report.py as a command: how runs are named, what it refuses, --watch."""

import json
import os
import signal

import pytest
from running import ROOT, run_script, wait_until

from runtime.tracking import Tracker

pytest.importorskip("bokeh", reason="Bokeh draws the page")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with three runs, two of them of one stage."""
    folder = tmp_path_factory.mktemp("out")
    for name in ("pretrain_64", "full_sft_64", "full_sft_128_moe"):
        (folder / name).mkdir()
        lines = [json.dumps({"step": n, "loss": 5 / n}) for n in range(1, 30)]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.pth").write_bytes(b"weights")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    "name",
    ["pretrain", "pretrain_64", "{out}/pretrain_64", "{out}/pretrain_64/metrics.jsonl",
     "{out}/pretrain_64.pth"],
)  # fmt: skip
def test_names_of_a_run(out, name):
    page = out / "pretrain_64/report.html"
    page.unlink(missing_ok=True)
    done = run_script("scripts/report.py", name.format(out=out), f"--out_dir={out}")
    assert done.returncode == 0 and done.stdout == f"wrote {page}\n", done.stderr
    assert "<title>pretrain_64</title>" in page.read_text(encoding="utf-8")


def test_a_stage_is_its_newest_run(out):
    os.utime(out / "full_sft_64/metrics.jsonl", (0, 0))
    done = run_script("scripts/report.py", "full_sft", f"--out_dir={out}")
    assert done.stdout == f"wrote {out}/full_sft_128_moe/report.html\n", done.stderr


def test_a_comparison(out, tmp_path):
    runs = ("full_sft_64", "full_sft_128_moe", "pretrain")
    page = tmp_path / "compared.html"
    done = run_script("scripts/report.py", *runs, f"--out_dir={out}", f"--out={page}")
    assert done.returncode == 0, done.stderr
    assert "3 runs compared" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words, said",
    [
        (["nothing"], "nothing: no run of this name in {out} (those there: full_sft_128_moe, full_"),
        (["{out}/empty"], "/empty: there is no metrics.jsonl in it: name the folder of a run"),
        (["pretrain", "full_sft_64"], "several runs are compared in one page: name its file with --out"),
        (["pretrain", "pretrain_64", "--out=x"], "pretrain_64: named twice: "),
        (["pretrain", "--watch=0"], "--watch 0.0: must be positive"),
        (["pretrain", "--watch=nan"], "--watch nan: must be a finite number"),
        (["pretrain", "--out={out}/no/x.html"], "{out}/no/x.html: No such file or directory"),
        (["pretrain", "--out={out}/empty"], "{out}/empty: Is a directory"),
        ([], "the following arguments are required: RUN"),
    ],
)  # fmt: skip
def test_what_is_refused(out, words, said):
    done = run_script("scripts/report.py", *(w.format(out=out) for w in words), f"--out_dir={out}")
    assert done.returncode == 2 and said.format(out=out) in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_without_bokeh(out, tmp_path):
    (tmp_path / "bokeh.py").write_text("raise ImportError")
    done = run_script(
        "scripts/report.py", "pretrain", f"--out_dir={out}", env={"PYTHONPATH": tmp_path}
    )
    assert (
        done.returncode == 2 and "pip install bokeh" in done.stderr and done.stderr.count("\n") == 1
    )


def test_watching_a_run_until_it_ends(tmp_path, start_script):
    """The page is written again when the run has written; it ends with the run."""
    tracker = Tracker(tmp_path / "sft_64", {"report_to": [], "use_wandb": False}, True, None)
    tracker.start({"step": 0, "tokens": 0}, 9)
    page = tmp_path / "sft_64/report.html"
    watching = start_script("scripts/report.py", tmp_path / "sft_64", "--watch=0.1")
    wait_until(watching, page.exists)
    assert '"refresh": 0.1' in page.read_text(encoding="utf-8")
    tracker.log({"step": 7, "eval_loss": 1.0})
    wait_until(watching, lambda: "sft_64 step 7" in watching.log.read_text())
    tracker.print("finished; weights in x")
    assert watching.wait(60) == 0
    assert '"refresh": 0' in page.read_text(encoding="utf-8").split('"steps"')[0][-20:]
    tracker.close()
    tracker.lock.release()


def test_watching_ends_by_ctrl_c(tmp_path, start_script):
    tracker = Tracker(tmp_path / "sft_64", {"report_to": [], "use_wandb": False}, True, None)
    tracker.start({"step": 0, "tokens": 0}, 9)
    watching = start_script(ROOT / "scripts/report.py", tmp_path / "sft_64", "--watch=60")
    wait_until(watching, (tmp_path / "sft_64/report.html").exists)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(60) == 130 and "Traceback" not in watching.log.read_text()
    tracker.close()
    tracker.lock.release()
