"""What is read of a run's training.log."""

import json
import math

import pytest

from runtime.reporting import run_log
from runtime.reporting.run_log import Sample, read_log
from runtime.skipped_steps import count_skipped
from runtime.tracking import Tracker


@pytest.fixture
def read(tmp_path):
    def read_lines(*lines: str):
        path = tmp_path / "training.log"
        stamped = (
            line if line.startswith("  ") else f"2026-12-01 10:00:00 {line}" for line in lines
        )
        path.write_text("".join(f"{line}\n" for line in stamped), encoding="utf-8")
        return read_log(path)

    return read_lines


HEADER = "grpo_64: 508,288 parameters on 1 x cpu, no strategy, float32, 18 steps, rollouts of 8 x 8 completions, learning rate 0.0001"


def test_start_and_end(read):
    log = read(HEADER, "epoch 1 step 1/18 loss 3.1", "finished; weights in x.pth")
    assert (log.parameters, log.starts, log.ending) == ("508,288", 1, "finished")
    assert log.header == HEADER.removeprefix("grpo_64: ") and log.started == "2026-12-01 10:00:00"
    assert (
        read(HEADER, "stopped by signal 15 at step 5; weights").ending
        == "stopped by signal 15 at step 5"
    )
    assert read(HEADER, "stopped by signal 15 at step 5; weights", HEADER).ending == ""


def test_a_resume_takes_back_what_came_later(read):
    skips = [f"step {n} skipped: loss nan, gradient norm nan (1 skipped so far)" for n in (4, 9)]
    sampled = ["step 8 reward 0.5", "  reward 0.50: 'q' -> 'a'"]
    log = read(HEADER, *skips, *sampled, HEADER, "resumed from out/a b/step_00000005 behind step 5")
    assert log.resumed == [5] and log.samples == {}
    assert log.skipped == [(4, "loss nan, gradient norm nan")]
    assert read(HEADER, "resumed from out/a/step_00000018 behind step 18").resumed == []


def test_samples_as_a_sampler_writes_them(read):
    texts = ["it's", 'a "quote"', "line\nbreak -> '", "\\", "\ud800", "<script>alert(1)</script>"]
    lines = [f"  reward 1.00: {text!r} -> {text[::-1]!r}" for text in texts]
    log = read("step 20 reward 0.125", *lines, "finished; x", "  reward 1.00: 'no' -> 'sample'")
    samples = log.samples[20]
    assert len(samples) == len(texts)
    readable = [text if text != "\ud800" else "\\ud800" for text in texts]
    assert [sample.prompt for sample in samples] == readable
    assert samples[0] == Sample("1.00", "it's", "s'ti")


def test_samples_that_are_written_otherwise_stay_as_they_are(read):
    log = read("step 1 reward 0", "  reward 0.00: no quotes", "  reward 0.00: 'a' -> '\\x'")
    assert [(s.prompt, s.completion) for s in log.samples[1]] == [
        ("", "no quotes"),
        ("", "'a' -> '\\x'"),
    ]


def test_long_texts_and_many_steps_are_cut(read):
    lines = []
    for step in range(1, 101):
        lines += [f"step {step} reward 0", f"  reward 0.00: 'q' -> {'x' * 9999!r}"]
    log = read(*lines)
    assert log.sampled_steps == 100 and len(log.samples) == run_log.MOST_SAMPLED_STEPS
    assert {1, 100} <= set(log.samples)
    assert len(log.samples[1][0].completion) < run_log.LONGEST_TEXT + 10


def test_no_log_and_a_log_of_bytes(tmp_path):
    assert read_log(tmp_path / "training.log").starts == 0
    (tmp_path / "training.log").write_bytes(bytes(range(256)) * 100)
    assert read_log(tmp_path / "training.log").starts == 0


def test_a_tracker_writes_what_is_read(tmp_path):
    """The tracker's own words: skipped steps, and where the run goes on."""
    flags = {"report_to": [], "use_wandb": False}
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    tracker = Tracker(tmp_path / "run", flags, True, checkpoint)
    progress = {"step": 3, "tokens": 0, "skipped": 0, "skipped_in_a_row": 0}
    tracker.start(progress, 9)
    progress["step"] = 4
    count_skipped(progress, "loss inf, gradient norm nan", tracker.print)
    tracker.log({"step": 4, "eval_loss": math.nan})
    tracker.close()
    tracker.lock.release()
    log = read_log(tmp_path / "run/training.log")
    assert log.resumed == [3] and log.skipped == [(4, "loss inf, gradient norm nan")]
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line == {"step": 4, "eval_loss": None}
