"""Whether a launcher started a process: all that one sets together says so; what is left behind of
it says nothing."""

import pytest
from conftest import chat, write_jsonl
from running import LAUNCHER_VARIABLES, launched_as

from runtime.launcher import Launch, read_launch
from runtime.process.faults import is_quiet

SFT = "trainer/train_full_sft.py"


@pytest.fixture
def environment(monkeypatch):
    """environment(variables): the only ones of a launcher's that are set."""

    def put(variables):
        for name in LAUNCHER_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_what_a_launcher_says(environment):
    environment(launched_as(1, 4))
    assert read_launch("--ddp") == read_launch() == Launch(True, 1, 1, 4, 4) and is_quiet()
    environment(
        {name: value for name, value in launched_as(1, 4).items() if not name.startswith("LOCAL")}
    )
    assert read_launch() == Launch(True, 1, 0, 4, 1) and not is_quiet()


@pytest.mark.parametrize("name", LAUNCHER_VARIABLES)
def test_one_variable_alone_is_no_launcher(environment, name):
    environment({name: launched_as(1, 4)[name]})
    assert read_launch() == Launch() and not is_quiet()


def test_more_processes_here_than_there_are(environment):
    environment(launched_as(1, 4) | {"LOCAL_WORLD_SIZE": "5"})
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE 5 and WORLD_SIZE 4 in the environment"):
        read_launch()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_all_but_one_variable_is_no_launcher(environment, name):
    environment({other: value for other, value in launched_as(1, 4).items() if other != name})
    assert read_launch() == Launch() and not is_quiet()
    with pytest.raises(
        ValueError, match=rf"^--ddp needs a launcher: torchrun .* there is .*, but no {name}$"
    ):
        read_launch("--ddp")


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", " 1", "\u0661"])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("others", [True, False])
def test_an_odd_value_is_named(environment, name, value, others):
    environment((launched_as(1, 4) if others else {}) | {name: value})
    with pytest.raises(
        ValueError, match=f"^{name} is '{value}' in the environment, which is no whole number from "
    ):
        read_launch()
    assert not is_quiet()


@pytest.mark.parametrize(
    "name, value",
    [("RANK", "4"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "65536"), ("LOCAL_RANK", "4")],
)
def test_numbers_that_cannot_be(environment, name, value):
    environment(launched_as(1, 4) | {name: value})
    with pytest.raises(ValueError, match=f"^{name} is .* in the environment"):
        read_launch()


# (script, flags, what was left behind, how the one line begins)
MISTAKES = {
    "a rank alone": (
        "eval_model.py",
        ["--weight=nothere"],
        {"LOCAL_RANK": "1"},
        "no nothere weights in ",
    ),
    "all but the master": (
        "eval_model.py",
        ["--weight=nothere"],
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        "no nothere weights in ",
    ),
    "empty": (SFT, [], {"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
    "no number": (SFT, [], {"RANK": "x"}, "RANK is 'x' in the environment"),
    "half a launch": (
        SFT,
        ["--ddp", "--device=cpu"],
        {"RANK": "1", "LOCAL_RANK": "1"},
        "--ddp needs a launcher: torchrun ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_scripts_answer_in_one_line(run_script, name):
    script, flags, variables, said = MISTAKES[name]
    done = run_script(script, *flags, env=variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("engine", ["", "accelerate", "deepspeed", "lightning"])
def test_what_is_left_behind_does_not_keep_a_process_from_training_alone(
    run_script, tmp_path, tiny_flags, engine
):
    """Accelerate, DeepSpeed and Lightning each read it, too, and would believe it."""
    script = f"trainer/train_sft_{engine}.py" if engine else "main.py"
    if engine:
        pytest.importorskip(engine)
    data = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")] * 4)
    places = [f"--data_path={data}", f"--cache_dir={tmp_path / 'cache'}", f"--out_dir={tmp_path}"]
    flags = [*tiny_flags, *places, "--max_steps=1", "--max_seq_len=64", "--from_weight=none"]
    left_behind = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = run_script(script, *flags, env=left_behind)
    assert done.returncode == 0 and "on 1 x cpu" in done.stdout, done.stderr


def test_the_doctor_names_an_odd_value(run_script):
    done = run_script("scripts/doctor.py", env={"RANK": ""})
    assert (
        done.returncode == 1
        and done.stdout.startswith("FAIL  launcher")
        and "RANK is ''" in done.stdout
    )
