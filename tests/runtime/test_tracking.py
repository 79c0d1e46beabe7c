"""What a run leaves for people to see."""

import json
import sys

import pytest
from running import on_a_terminal

from runtime.process.errors import describe_error
from runtime.tracking import Tracker

TINY = "--dim=32 --n_layers=1 --n_heads=2 --n_kv_heads=1 --max_seq_len=64 --device=cpu --batch_size=2".split()


def a_folder(path):
    path.mkdir()


def a_full_disk(path):
    path.symlink_to("/dev/full")


@pytest.mark.parametrize(
    "name",
    ["training.log", "args.json", "metrics.jsonl", "../.full_sft_32.lock", "../.full_sft_32.pid"],
)
@pytest.mark.parametrize("spoil", [a_folder, a_full_disk])
def test_a_file_that_cannot_be_written_names_itself(tmp_path, name, spoil):
    """Also where the file system's error does not, as that of a full disk."""
    if name == "args.json" and spoil is a_full_disk:
        name = ".tmp-args.json"  # which becomes args.json when it is whole
    run, is_late = tmp_path / "full_sft_32", name == "metrics.jsonl" and spoil is a_full_disk
    run.mkdir()
    if not is_late:
        spoil(run / name)
    with pytest.raises((ValueError, OSError)) as raised:
        tracker = Tracker(
            run, {"report_to": [], "use_wandb": False}, True, run / "checkpoints/step_00000001"
        )
        tracker.start({"step": 0, "tokens": 0}, 9)
        if is_late:  # before that it is read, and this device never ends
            (run / name).unlink()
            spoil(run / name)
            tracker.metrics_file = open(run / name, "a", buffering=1)
        tracker.print("a line")
        tracker.log({"step": 1, "eval_loss": 1.0})
    said = describe_error(raised.value)
    why = "Is a directory" if spoil is a_folder else "No space left on device"
    if name.endswith(".lock") and spoil is a_full_disk:
        why = "Too many levels of symbolic links"  # none is followed there
    assert (
        name.removeprefix("../").removeprefix(".tmp-") in said
        and why in said
        and "Errno" not in said
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_jsonl):
    rows = [
        {"instruction": f"count to {n}", "input": "", "output": "one two three " * n}
        for n in range(1, 30)
    ]
    return write_jsonl(tmp_path_factory.mktemp("tracking") / "data.jsonl", rows)


def flags(data, out) -> list[str]:
    return [
        *TINY,
        f"--data_path={data}",
        f"--out_dir={out}",
        f"--cache_dir={data.parent / 'cache'}",
    ]


@pytest.mark.parametrize("key", [None, "0" * 40], ids=["no login", "login but no server"])
def test_wandb_goes_offline_and_never_asks(data, tmp_path, run_script, key):
    environment = {
        "WANDB_MODE": None,
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": tmp_path,
    }
    job = [*flags(data, tmp_path / "out"), "--max_steps=4", "--log_interval=1"]
    job += ["--use_wandb", "--report_to=tensorboard"]
    done = run_script("trainer/train_full_sft.py", *job, env=environment)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out/full_sft_32"
    assert list(run.glob("wandb/offline-run-*")) and list(run.glob("tensorboard/events.*"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_files_of_a_run(data, tmp_path, run_script):
    job = [
        *flags(data, tmp_path / "out"),
        "--max_steps=7",
        "--log_interval=3",
        "--eval_ratio=0.2",
        "--eval_interval=5",
    ]
    done = run_script("trainer/train_full_sft.py", *job)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out/full_sft_32"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 7]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 7]
    keys = "step epoch loss aux_loss lr grad_norm tokens supervised_tokens total_tokens tokens_per_sec".split()
    assert list(lines[0]) == keys and list(lines[-1]) == ["step", "eval_loss"]
    assert json.loads((run / "args.json").read_text())["max_steps"] == 7
    for text in ("eval_loss", "supervised tok/s left", "grad_norm", "finished"):
        assert text in done.stdout and text in (run / "training.log").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "full_sft_32.pth",
        "full_sft_32.json",
    }
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]


def test_a_terminal_gets_a_progress_bar(data, tmp_path):
    job = [*flags(data, tmp_path / "out"), "--max_steps=3", "--log_interval=1"]
    code, text = on_a_terminal("trainer/train_full_sft.py", *job)
    assert code == 0 and "3/3" in text and "sup_tok/s" in text and "loss=" in text, text


ENGINES = {
    "train_full_sft": None,
    "train_sft_accelerate": "accelerate",
    "train_sft_lightning": "lightning",
}


@pytest.mark.parametrize("script", ENGINES)
def test_a_tracker_never_ends_a_run(data, tmp_path, run_script, script):
    """wandb refuses a misspelt WANDB_MODE; TensorBoard beside it gets every step."""
    if ENGINES[script]:
        pytest.importorskip(ENGINES[script])
    job = [
        *flags(data, tmp_path / "out"),
        "--max_steps=3",
        "--log_interval=1",
        "--report_to",
        "wandb",
        "tensorboard",
    ]
    done = run_script(f"trainer/{script}.py", *job, env={"WANDB_MODE": "ofline"})
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    assert done.stdout.count("warning: wandb failed, the run goes on without it: ") == 1
    run = tmp_path / "out/full_sft_32"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert list((run / "tensorboard").rglob("events.*"))


def test_a_tracker_that_breaks_later_is_left_alone(tmp_path, capsys):
    """Each one is asked no more once it has failed, also not at the end."""
    args = {"report_to": ["tensorboard"], "use_wandb": False}
    tracker = Tracker(tmp_path / "run", args, True, None)
    progress = {"step": 0, "tokens": 0}
    tracker.start(progress, 2)
    calls = []

    def full(*args):
        calls.append(args)
        raise OSError(28, "No space left on device")

    writer = tracker.reporters.active["tensorboard"].writer
    writer.add_scalar = writer.close = full
    for step in (1, 2):
        tracker.log({"step": step, "eval_loss": 1.0})
    tracker.close()
    assert len(calls) == 1 and len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    said = (
        "warning: tensorboard failed, the run goes on without it: OSError: [Errno 28] No space left"
        " on device"
    )
    assert (
        capsys.readouterr().out.count(said) == 1
        and said in (tmp_path / "run/training.log").read_text()
    )


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_before_training(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=f"--report_to {name}: it is not installed; pip install {name}"
    ):
        Tracker(tmp_path / "run", {"report_to": [name], "use_wandb": False}, True, None)
    assert not (tmp_path / "run").exists()
