"""Unbreakable: kills, signals, torn checkpoints, a full disk, non-finite numbers, all real."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from running import run_script, wait_for_steps

from benchmarks import kill_resume
from runtime import earlier_runs
from runtime.saving import resume, rotation, store, validity

FLAGS = (
    "--dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --device=cpu --max_seq_len=64"
    " --log_interval=1".split()
)
NAME = "full_sft_32"


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_jsonl):
    turns = [[f"say it {n} times", "it it it " * n] for n in range(1, 150)]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in turns]
    return write_jsonl(tmp_path_factory.mktemp("resume") / "data.jsonl", rows)


@pytest.fixture
def flags(data, tmp_path):
    return [
        *FLAGS,
        f"--data_path={data}",
        f"--cache_dir={data.parent / 'cache'}",
        f"--out_dir={tmp_path / 'out'}",
    ]


def metrics(out) -> list[dict]:
    lines = (out / NAME / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_sec"} for line in lines]


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_run_resumes_bit_identically(start_script, monkeypatch, capsys, nproc):
    """At a step, in a save, and between the last checkpoint and the end."""

    kills = {1: ["--kills=2", "--kills_in_save=1"], 2: ["--kills=1", "--kills_in_save=1"]}[nproc]

    def start(out_dir, args):
        words = kill_resume.command(out_dir, args)
        script = next(n for n, word in enumerate(words) if word.endswith(".py"))
        return start_script(*words[script:], nproc=nproc if nproc > 1 else None)

    monkeypatch.setattr(kill_resume, "start", start)
    monkeypatch.setattr(sys, "argv", ["kill_resume", *kills, "--steps=40", f"--nproc={nproc}"])
    code, printed = kill_resume.main(), capsys.readouterr().out
    assert code == 0 and "weights identical, metrics identical" in printed, printed


def test_resume_on_another_number_of_processes(flags, tmp_path, start_script, run_script):
    """1 -> 2 -> 1 processes, killed in between: every row once, and the undisturbed curve."""
    job = [
        *flags,
        "--global_batch_size=4",
        "--batch_size=2",
        "--packing=0",
        "--save_interval=3",
        "--epochs=2",
    ]
    whole = run_script(
        "trainer/train_full_sft.py", *job[:-1], "--epochs=2", f"--out_dir={tmp_path / 'whole'}"
    )
    assert whole.returncode == 0, whole.stderr
    for steps, nproc in ((10, None), (40, 2)):
        switch = ["--ddp"] if nproc else []
        process = start_script(
            "trainer/train_full_sft.py", *job, "--resume=auto", *switch, nproc=nproc
        )
        wait_for_steps(process, tmp_path / "out", steps)
        process.kill()
        process.wait()
    done = run_script("trainer/train_full_sft.py", *job, "--resume=auto")
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    expected = metrics(tmp_path / "whole")
    for ours, reference in zip(metrics(tmp_path / "out"), expected, strict=True):
        assert ours.pop("loss") == pytest.approx(reference.pop("loss"), rel=1e-5)
        assert ours.pop("grad_norm") == pytest.approx(reference.pop("grad_norm"), rel=1e-4)
        assert ours == reference  # step, epoch, lr and the tokens of every window


def test_signals_save_and_exit(flags, tmp_path, start_script, run_script):
    job, out, steps, saved = (
        [*flags, "--batch_size=1", "--save_interval=0", "--resume=auto"],
        tmp_path / "out",
        0,
        [],
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        process = start_script("trainer/train_full_sft.py", *job)
        wait_for_steps(process, out, steps + 3)
        process.send_signal(number)
        assert process.wait(60) == code, process.log.read_text()
        steps = len(metrics(out))
        saved = [f"step_{steps:08d}", *saved][:2]  # --save_total_limit
        assert [c.name for c in rotation.list_checkpoints(out / NAME / "checkpoints")] == saved
        assert f"stopped by signal {number} at step {steps}" in process.log.read_text()
    done = run_script("trainer/train_full_sft.py", *job)
    assert done.returncode == 0 and f"behind step {steps}" in done.stdout
    assert [line["step"] for line in metrics(out)] == [*range(1, metrics(out)[-1]["step"] + 1)]


def test_signal_to_one_rank_stops_all(flags, tmp_path, start_script):
    job = [*flags, "--ddp", "--batch_size=1", "--save_interval=0"]
    process = start_script("trainer/train_full_sft.py", *job, nproc=2)
    wait_for_steps(process, tmp_path / "out", 3)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    subprocess.run(["kill", "-TERM", children[-1]], check=True)
    process.wait(60)
    log = process.log.read_text()
    assert "stopped by signal 15" in log and "Traceback" not in log.split("stopped by")[0]
    assert (
        validity.fault(rotation.list_checkpoints(tmp_path / "out" / NAME / "checkpoints")[0]) == ""
    )


@pytest.fixture(scope="module")
def twelve_steps(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    places = [f"--data_path={data}", f"--cache_dir={data.parent / 'cache'}", f"--out_dir={out}"]
    done = run_script(
        "trainer/train_full_sft.py", *FLAGS, *places, "--max_steps=12", "--save_interval=4"
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def trained(twelve_steps, tmp_path):
    """A run of 12 steps with its checkpoints of steps 8 and 12, a copy for each test."""
    return shutil.copytree(twelve_steps, tmp_path / "out") / NAME / "checkpoints"


def test_torn_checkpoint_is_passed_over(flags, run_script, trained):
    newest, older = rotation.list_checkpoints(trained)
    assert (older.name, newest.name) == ("step_00000008", "step_00000012")
    before = torch.load(trained.parent.with_suffix(".pth"), weights_only=True)
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    (newest / "__0_0.distcp").write_bytes(content)
    done = run_script(
        "trainer/train_full_sft.py", *flags, "--max_steps=12", "--save_interval=4", "--resume=auto"
    )
    assert done.returncode == 0
    assert re.search(
        r"step_00000012 is damaged and passed over: __0_0.distcp was altered", done.stderr
    )
    assert "behind step 8" in done.stdout
    after = torch.load(trained.parent.with_suffix(".pth"), weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line["step"] for line in metrics(trained.parents[1])] == [*range(1, 13)]
    assert validity.fault(newest) == ""


def test_no_valid_checkpoint_is_an_error_not_a_fresh_start(flags, run_script, trained):
    for saved in rotation.list_checkpoints(trained):
        (saved / "manifest.json").unlink()
    done = run_script("trainer/train_full_sft.py", *flags, "--max_steps=12", "--resume=auto")
    assert (
        done.returncode == 2
        and "no valid checkpoint" in done.stderr
        and "manifest.json is missing" in done.stderr
    )


def test_fresh_run_keeps_the_run_before(flags, run_script, trained):
    done = run_script("trainer/train_full_sft.py", *flags, "--max_steps=2")
    assert done.returncode == 0
    assert len(metrics(trained.parents[1])) == 2
    kept = trained.parent.with_name(f"{NAME}.previous")
    assert (kept / "metrics.jsonl").read_text().count("\n") == 12 and len(
        list((kept / "checkpoints").iterdir())
    ) == 2


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder with what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("nproc", [None, 2])
def test_no_start_deletes_what_a_run_wrote(flags, run_script, trained, nproc):
    """Two accidental fresh starts, of which the second fails: the first run is whole."""
    run, out = trained.parent, trained.parents[1]
    first = contents(run) | {
        f"{NAME}{end}": run.with_name(f"{NAME}{end}").read_bytes() for end in (".pth", ".json")
    }
    switch = ["--ddp"] if nproc else []
    done = run_script(
        "trainer/train_full_sft.py", *flags, *switch, "--max_steps=2", "--seed=1", nproc=nproc
    )
    line = f"what an earlier {NAME} left is kept in {run}.previous; to remove all that is kept so: "
    assert done.returncode == 0 and done.stdout.count(f"{line}rm -r {run}.previous*\n") == 1, (
        done.stderr
    )
    second = contents(run) | {f"{NAME}.pth": run.with_name(f"{NAME}.pth").read_bytes()}
    broken = ["--learning_rate=1e30", "--grad_clip=0", "--save_interval=0", "--epochs=3"]
    done = run_script("trainer/train_full_sft.py", *flags, *switch, *broken, nproc=nproc)
    assert done.returncode == 1 and f"is kept in {run}.previous.2; " in done.stdout, done.stdout
    assert run.with_name(f"{NAME}.pth").read_bytes() == second[f"{NAME}.pth"], (
        "it saved nothing: they stay in place"
    )
    done = run_script("trainer/train_full_sft.py", *flags, *switch, "--max_steps=1", nproc=nproc)
    assert done.returncode == 0 and f"is kept in {run}.previous.3; " in done.stdout, done.stderr
    assert contents(out / f"{NAME}.previous") == first
    assert second.items() <= contents(out / f"{NAME}.previous.2").items()
    assert f"{NAME}.pth" not in contents(out / f"{NAME}.previous.3"), "that run saved none"


def test_a_run_that_finds_no_checkpoint_to_go_on_from_deletes_nothing(flags, run_script, trained):
    """--resume auto of a configuration file, and weights or metrics without a checkpoint."""
    shutil.rmtree(trained)
    metrics_before = (trained.parent / "metrics.jsonl").read_bytes()
    weights = trained.parent.with_suffix(".pth").read_bytes()
    done = run_script("trainer/train_full_sft.py", *flags, "--resume=auto", "--max_steps=1")
    assert done.returncode == 0 and len(metrics(trained.parents[1])) == 1
    kept = trained.parent.with_name(f"{NAME}.previous")
    assert (kept / "metrics.jsonl").read_bytes() == metrics_before
    assert (kept / f"{NAME}.pth").read_bytes() == weights


def test_the_numbers_of_kept_runs(tmp_path):
    """Weights without a folder are kept, the same ones once; numbers always go up."""
    run, weights = tmp_path / "a_32", tmp_path / "a_32.pth"
    assert earlier_runs.move_earlier_run(run) is None
    weights.write_text("1")
    assert earlier_runs.move_earlier_run(run) == tmp_path / "a_32.previous"
    assert earlier_runs.move_earlier_run(run) is None
    (tmp_path / "a_32.previous.7").mkdir()
    store.save_file(weights, "2")
    assert earlier_runs.move_earlier_run(run) == tmp_path / "a_32.previous.8"
    texts = [
        (tmp_path / f"a_32.previous{number}" / "a_32.pth").read_text() for number in ("", ".8")
    ]
    assert texts == ["1", "2"] and weights.read_text() == "2"


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(
        earlier_runs.os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "not permitted"))
    )
    (tmp_path / "a_32").mkdir()
    (tmp_path / "a_32.pth").write_text("1")
    kept = earlier_runs.move_earlier_run(tmp_path / "a_32")
    store.save_file(tmp_path / "a_32.pth", "2")
    assert (kept / "a_32.pth").read_text() == "1"


def test_full_disk_loses_nothing_that_was_saved(flags, start_script, run_script, tmp_path, trained):
    """Files of more than 100 kB cannot be written: the next save fails, older ones stay."""
    job = [*flags, "--save_interval=4", "--resume=auto", "--epochs=2", "--resume_with_changes"]
    limits = (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # inherited by the script
    try:
        done = run_script("trainer/train_full_sft.py", *job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(
        r"error: cannot save the checkpoint of step 16 in .*: .*; step_00000012 is intact",
        done.stderr,
    )
    assert [validity.fault(c) for c in rotation.list_checkpoints(trained)] == ["", ""]
    assert not list(trained.glob(".tmp-*"))
    weights = torch.load(trained.parent.with_suffix(".pth"), weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())
    done = run_script("trainer/train_full_sft.py", *job, "--max_steps=20")
    assert done.returncode == 0 and "behind step 12" in done.stdout


def saved(folder, step: int, keep: int):
    """A checkpoint with one file, saved as runtime/checkpoint.py does it."""
    with store.new_checkpoint(folder, step, keep) as building:
        store.save_file(building / "run.pt", {"value": torch.tensor(step)})


def test_rotation_never_removes_the_last_good_one(tmp_path):
    for step in range(1, 6):
        saved(tmp_path, step, keep=2)
    assert [c.name for c in rotation.list_checkpoints(tmp_path)] == [
        "step_00000005",
        "step_00000004",
    ]
    for step in (4, 5):  # damage all there are, then save one more with the smallest limit
        (tmp_path / f"step_{step:08d}" / "run.pt").write_bytes(b"torn")
    saved(tmp_path, 6, keep=1)
    assert resume.find(tmp_path, "auto").name == "step_00000006"


def test_a_save_that_fails_removes_nothing(tmp_path, monkeypatch):
    saved(tmp_path, 1, keep=1)
    monkeypatch.setattr(
        store.os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert (
        validity.fault(tmp_path / "step_00000001") == ""
        and resume.find(tmp_path, "auto").name == "step_00000001"
    )
    saved(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_file_of_another_node_is_missed(tmp_path):
    files = {"__1_0.distcp": {"size": 1, "sha256": ""}}
    with pytest.raises(
        OSError, match="__1_0.distcp of another node is not here: --out_dir must lie on storage"
    ):
        with store.new_checkpoint(tmp_path, 1, 1, files) as building:
            validity.check_seen(building, files)
    assert not list(tmp_path.iterdir())


def test_gradients_that_are_not_finite_stop_the_run_and_spare_the_weights(
    flags, run_script, trained, tmp_path
):
    weights = torch.load(trained.parent.with_suffix(".pth"), weights_only=True)
    weights["model.norm.weight"] *= 1e38  # logits overflow
    torch.save(weights, tmp_path / "huge.pth")
    job = [*flags, f"--from_weight={tmp_path / 'huge.pth'}", "--save_weight=huge"]
    job += ["--batch_size=1", "--save_interval=5"]
    done = run_script("trainer/train_full_sft.py", *job)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 1 skipped: loss " in done.stdout and "(20 skipped so far)" in done.stdout
    assert (
        done.stderr.count("error: ") == 1
        and "20 steps in a row had no finite gradient" in done.stderr
    )
    saved = torch.load(tmp_path / "out/huge_32.pth", weights_only=True)
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_two_runs_cannot_write_to_one_folder(flags, tmp_path, start_script, run_script):
    process = start_script(
        "trainer/train_full_sft.py", *flags, "--batch_size=1", "--epochs=1000", "--save_interval=0"
    )
    wait_for_steps(process, tmp_path / "out", 1)
    done = run_script("trainer/train_full_sft.py", *flags)
    assert done.returncode == 2 and f"process {process.pid} is writing to" in done.stderr
    assert process.poll() is None
