"""Keys of --config files that are not simply flags: each is obeyed or refused with the reason, none
is ignored."""

import argparse
import importlib
import sys

import pytest
from test_config import COMMON

from runtime import launch
from runtime.config import DTYPES, FIXED, Entry, config_to_argv, read_config


@pytest.fixture
def config(tmp_path):
    """config(text) -> path of a YAML file with it."""

    def write(text):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "config.yaml"

    return write


@pytest.fixture
def read(config, monkeypatch):
    """read(text, *argv) -> flags of the SFT script as a --config file with that text makes them."""

    def parse_args(text, *argv):
        monkeypatch.setattr(
            sys, "argv", ["train_full_sft.py", "--config", str(config(text)), *argv]
        )
        return importlib.import_module("trainer.train_full_sft").parse_args()

    return parse_args


def parser(*names: str) -> argparse.ArgumentParser:
    """A parser with flags of these names, texts."""
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(f"--{name}")
    return parser


@pytest.mark.parametrize(
    "text, said",
    [
        ("mixed_precision: fp8", "mixed_precision: fp8: no precision fits"),
        ("mixed_precision: [fp16]", "mixed_precision: ['fp16']: no precision fits"),
        ("fp16: true\nbf16: true", "fp16: true, bf16: true: no precision fits"),
        ("dtype: float16\nfp16: false", "dtype: float16, fp16: false: no precision fits"),
        ("mixed_precision: no\nbf16: true", "mixed_precision: no, bf16: true: no precision fits"),
        (
            "dtype: float16\nmachine: {dtype: float32}",
            "dtype: float16 and dtype: float32 contradict each other",
        ),
        ("bf16: auto", "bf16 must be true or false, found 'auto'"),
        ("dim: 32\ndim: 64", "config.yaml:2: 'dim' stands there twice"),
        ("epochs: yes", "config.yaml:1: epochs must be a whole number, found 'yes'"),
        ("dim: [64]", "config.yaml:1: dim takes one value, found ['64']"),
        ("dim: [[64]]", "config.yaml:1: dim takes one value, found [['64']]"),
        ("dim: 2020-01-01", "config.yaml:1: dim must be a whole number, found '2020-01-01'"),
        ("epochs: &a [*a]", "config.yaml:1: epochs takes one value, found [[{}]]"),
        ("? [dim]\n: 64", "config.yaml:1: a key must be a word, not a list or a section"),
        ("<<: 3", "config.yaml:1: << takes a section, or a list of them"),
        ("seed: 1\n<<: [1]", "config.yaml:2: << takes a section, or a list of them"),
        (
            "a: &a {<<: *a}",
            "config.yaml:1: << takes a section, or a list of them, that it is not in itself",
        ),
        ("dim: " + "[" * 5000, "broken YAML: lists in lists without end"),
        (
            "batch_size: 2\ndataloader: {batch_size: 4}",
            "batch_size: 2 and batch_size: 4 contradict each other",
        ),
        (
            "save_steps: 5\nsave_interval: 6",
            "save_steps: 5 and save_interval: 6 contradict each other; both mean save",
        ),
        (
            "find_unused_parameters: true",
            "find_unused_parameters: true cannot be had: every parameter takes part",
        ),
        (
            "dataloader_pin_memory: false",
            "dataloader_pin_memory: false cannot be had: batches are in pinned memory",
        ),
        (
            "dataloader: {prefetch_factor: 4}",
            "prefetch_factor: 4 cannot be had: each of num_workers processes",
        ),
        (
            "lr_scheduler_type: polynomial",
            "lr_scheduler_type: polynomial cannot be had; it is one of cosine, linear, ",
        ),
        (
            "lr_scheduler_type: [linear]",
            "lr_scheduler_type: ['linear'] cannot be had; it is one of cosine",
        ),
        (
            "lr_scheduler_type: linear\nlr_schedule: wsd",
            "lr_scheduler_type: linear and lr_schedule: wsd contradict",
        ),
        (
            "save_strategy: epoch",
            "save_strategy: epoch cannot be had: checkpoints are saved every save_steps",
        ),
        (
            "fp16_opt_level: O2",
            "fp16_opt_level: O2 cannot be had: float16 is autocast over float32 weights",
        ),
        ("fp16_full_eval: true", "fp16_full_eval: true cannot be had"),
        (
            "distributed_backend: mpi",
            "distributed_backend: mpi cannot be had: GPUs talk by nccl, CPUs by gloo",
        ),
        (
            "distributed_strategy: deepspeed",
            "strategy deepspeed is an engine with a script of its own: start main.py",
        ),
        (
            "deepspeed: {config_path: zero2.json}",
            "deepspeed.config_path is for strategy: deepspeed",
        ),
        ("deepspeed: zero2.json", "deepspeed.config_path is for strategy: deepspeed"),
        ("deepspeed: {stage: 2}", "unknown key 'stage'"),
    ],
)
def test_refused_by_name(read, text, said):
    with pytest.raises(ValueError) as error:
        read(text)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, dtype",
    [
        ("mixed_precision: fp16", "float16"),
        ("mixed_precision: bf16", "bfloat16"),
        ("mixed_precision: no", "float32"),
        ("mixed_precision: 'no'", "float32"),
        ("fp16: true", "float16"),
        ("fp16: false\nbf16: true", "bfloat16"),
        ("fp16: false\nbf16: false", "float32"),
        ("bf16: false", "float32"),  # the default on a GPU would be bfloat16
        ("fp16: false", None),
        ("bf16: true\ndtype: bfloat16\nmixed_precision: bf16", "bfloat16"),
        ("bf16:", None),
    ],
)
def test_precision(read, text, dtype):
    assert read(text).dtype == dtype
    assert set(DTYPES.values()) == set(COMMON["dtype"][1])


@pytest.mark.parametrize("key", FIXED)
def test_what_is_always_done_may_be_asked_for(read, key):
    for value in FIXED[key][0]:
        assert read(f"{key}: {value}") == read("")


WHOLE = {"1e4": 10_000, "1.0e3": 1000, "64.0": 64, "7": 7, "1_000": 1000, "010": 10}


@pytest.mark.parametrize("text, value", WHOLE.items())
def test_whole_numbers(read, text, value):
    assert read(f"save_steps: {text}").save_interval == value


@pytest.mark.parametrize("text", ["5e-5", "'5e-5'", "5.0e-05", "0.00005", "+5E-5"])
def test_small_numbers(read, text):
    assert read(f"learning_rate: {text}").learning_rate == 5e-5


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("lr_scheduler_type: cosine", "cosine"),
        ("training: {lr_scheduler_type: 'linear'}", "linear"),
        ("lr_scheduler_type: constant", "constant"),
        ("lr_scheduler_type: constant_with_warmup", "constant"),
        ("lr_scheduler_type: warmup_stable_decay\nlr_schedule: wsd", "wsd"),
        ("lr_scheduler_type:", "cosine"),
    ],
)
def test_schedules_of_other_stacks(read, text, schedule):
    assert read(text).lr_schedule == schedule


def test_one_value_under_two_names(read):
    args = read(
        "max_grad_norm: 1e0\ngrad_clip: 1\ntraining: {save_steps: 5}\noutput: {save_interval: 5}\n"
    )
    assert (args.grad_clip, args.save_interval) == (1.0, 5)


@pytest.mark.parametrize("key", ["distributed", "ddp"])
def test_distributed_without_a_launcher_trains_alone(read, capsys, key, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not read(f"{key}: true").ddp
    assert (
        capsys.readouterr().out.count("no launcher started this script: one process trains alone\n")
        == 1
    )


@pytest.mark.parametrize(
    "asked, said", [("nccl", "nccl needs a GPU, gloo is used\n"), ("gloo", "")]
)
def test_backend_on_a_cpu(read, capsys, asked, said):
    read(f"distributed_backend: {asked}", "--device", "cpu")
    assert capsys.readouterr().out == (said and f"distributed_backend: {said}")


def test_deepspeed_script_gets_its_file_and_no_strategy(config):
    path = config(
        "training:\n  strategy: deepspeed\n  deepspeed:\n    config_path: configs/sft.yaml\n"
    )
    assert config_to_argv(["--config", str(path)], parser("strategy", "deepspeed_config")) == [
        "--deepspeed_config=configs/sft.yaml"
    ]


def test_a_name_is_looked_for_in_configs_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "full_sft" in [
        entry.value for entry in read_config("sft.yaml") if entry.key == "save_weight"
    ]
    (tmp_path / "sft.yaml").write_text("save_weight: here")
    assert read_config("sft.yaml") == [Entry("save_weight", "here", "--config sft.yaml:1")]


@pytest.mark.parametrize(
    "given", ["--local_rank 3", "--local_rank=3", "--local-rank 3", "--local-rank=3"]
)
def test_the_rank_that_launchers_add_is_left_out(monkeypatch, given, config):
    path = str(config("dim: 64"))
    monkeypatch.setattr(sys, "argv", ["script", *given.split(), "--config", path, "--seed", "3"])
    assert launch.command_line(parser("dim", "seed")) == [
        "--dim=64",
        "--config",
        path,
        "--seed",
        "3",
    ]
