"""Flags of the stage scripts: what --config files may say, and the frozen list of names, types and
choices."""

import argparse
import importlib
import sys

import pytest
from running import STAGE_SCRIPTS, launched_as, module_of
from stage_flags import LATER_STAGES

from runtime.config import ALIASES, FIXED, KNOWN, config_to_argv
from runtime.launch import check_flags

# Others rely on these: what a script takes changes only together with this list. flag -> (type,
# choices)
ZERO_OR_ONE, SWITCH = ("int", (0, 1)), ("switch", None)
COMMON = {
    "config": ("str", None),
    "data_path": ("str", None),
    "tokenizer_dir": ("str", None),
    "chat_template": ("str", None),
    "cache_dir": ("str", None),
    "max_seq_len": ("int", None),
    "packing": ZERO_OR_ONE,
    "curriculum": ("str", None),
    "drop_last": ZERO_OR_ONE,
    "skip_bad": SWITCH,
    "eval_ratio": ("float", None),
    "num_workers": ("int", None),
    "preview": ("int", None),
    "dim": ("int", None),
    "n_layers": ("int", None),
    "n_heads": ("int", None),
    "n_kv_heads": ("int", None),
    "dropout": ("float", None),
    "use_moe": ZERO_OR_ONE,
    "n_experts": ("int", None),
    "n_experts_per_tok": ("int", None),
    "n_shared_experts": ("int", None),
    "rope_scaling": ("str", None),
    "from_weight": ("str", None),
    "epochs": ("int", None),
    "max_steps": ("int", None),
    "batch_size": ("int", None),
    "accumulation_steps": ("int", None),
    "global_batch_size": ("int", None),
    "learning_rate": ("float", None),
    "warmup_ratio": ("float", None),
    "lr_schedule": ("str", ("cosine", "linear", "constant", "wsd")),
    "lr_scaling": ("str", ("none", "linear", "sqrt")),
    "optimizer": ("str", ("adamw", "muon", "lamb")),
    "weight_decay": ("float", None),
    "grad_clip": ("float", None),
    "seed": ("int", None),
    "device": ("str", None),
    "dtype": ("str", ("float32", "float16", "bfloat16")),
    "ddp": SWITCH,
    "timeout": ("float", None),
    "strategy": ("str", ("auto", "ddp", "zero1", "zero2", "zero3", "dp")),
    "tensor_parallel": ("int", None),
    "context_parallel": ("int", None),
    "offload": ZERO_OR_ONE,
    "bucket_cap_mb": ("int", None),
    "replica_check": ("int", None),
    "compile": ZERO_OR_ONE,
    "gradient_checkpointing": ("int", (0, 1, 2)),
    "out_dir": ("str", None),
    "save_weight": ("str", None),
    "save_interval": ("int", None),
    "save_total_limit": ("int", None),
    "log_interval": ("int", None),
    "eval_interval": ("int", None),
    "resume": ("str", None),
    "resume_with_changes": SWITCH,
    "use_wandb": SWITCH,
    "report_to": ("str, one or more", ("none", "wandb", "tensorboard")),
}
SFT = COMMON | {"loss_on": ("str", ("all", "last"))}
# What the engines do in a way of their own, or cannot.
ENGINES = {
    "train_sft_deepspeed": {
        "without": {"optimizer", "tensor_parallel", "context_parallel", "offload", "compile"},
        "with": {"strategy": ("str", ("auto", "deepspeed")), "deepspeed_config": ("str", None)},
    },
    "train_sft_accelerate": {
        "without": {"optimizer", "tensor_parallel", "context_parallel", "offload"},
        "with": {"strategy": ("str", ("auto", "ddp", "fsdp2", "deepspeed"))},
    },
    "train_sft_lightning": {
        "without": {"optimizer", "tensor_parallel", "context_parallel", "offload"},
        "with": {"strategy": ("str", ("auto", "ddp", "model_parallel"))},
    },
    "train_sft_pipeline": {
        "without": {"strategy", "context_parallel", "offload", "bucket_cap_mb"},
        "with": {
            "pipeline_parallel": ("int", None),
            "pipeline_schedule": ("str", ("gpipe", "1f1b", "interleaved")),
        },
    },
}
FROZEN = {"train_pretrain": COMMON, "train_full_sft": SFT}
for stage, change in ENGINES.items():
    FROZEN[stage] = {
        name: kind for name, kind in SFT.items() if name not in change["without"]
    } | change["with"]
for stage, (without, own) in LATER_STAGES.items():
    FROZEN[stage] = {name: kind for name, kind in SFT.items() if name not in without} | own
STAGES = sorted(STAGE_SCRIPTS)


@pytest.fixture
def parse(monkeypatch):
    """parse(stage, *argv) -> Namespace, as the script's own parse_args makes it."""

    def parse_args(stage, *argv):
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, argv)])
        return importlib.import_module(module_of(stage)).parse_args()

    return parse_args


@pytest.fixture
def config(tmp_path):
    """config(text) -> path of a YAML file with it."""

    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def launched(monkeypatch):
    """As if a launcher had started this process."""
    for name, value in launched_as(0, 1).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def parser_of(parse, monkeypatch):
    """parser_of(stage) -> its ArgumentParser."""

    def find(stage):
        parsers, original = [], argparse.ArgumentParser.parse_args

        def remember(self, *args, **kwargs):
            parsers.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
        parse(stage)
        return parsers[0]

    return find


# --------------------------------------------------------------------------------------------------
# The flags
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_flags_are_frozen(parser_of, stage):
    assert stage in FROZEN, f"a new stage: list the flags of {stage} in FROZEN"
    found = {}
    for action in parser_of(stage)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        (option,) = action.option_strings
        kind = "switch" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        kind += ", one or more" if action.nargs == "+" else ""
        found[option.removeprefix("--")] = (kind, tuple(action.choices) if action.choices else None)
    assert found == FROZEN[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_has_a_help_text_that_prints(parser_of, stage):
    parser = parser_of(stage)
    assert all(action.help for action in parser._actions)
    assert all(f"--{name}" in parser.format_help() for name in FROZEN[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_pass_the_checks(parse, stage):
    check_flags(vars(parse(stage)))


def test_every_alias_means_a_flag():
    assert set(ALIASES.values()) <= {*COMMON, *KNOWN}


@pytest.mark.parametrize("stage", STAGES)
def test_no_alias_hides_a_flag(stage):
    assert not set(ALIASES) & set(FROZEN[stage]), "an alias hides a flag of the same name"
    assert not set(FIXED) & set(FROZEN[stage]), (
        "a key with a fixed value hides a flag of the same name"
    )


def test_a_wrong_flag_is_one_line_without_usage(parse, capsys):
    with pytest.raises(
        ValueError, match=r"^unrecognized arguments: --lr 3; --help lists the flags$"
    ):
        parse("train_full_sft", "--lr", 3)
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------
# --config
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_without_config_nothing_changes(parse, stage):
    assert config_to_argv(["--dim", "64"], vars(parse(stage))) == []


@pytest.mark.parametrize("how", [["--config", "{}"], ["--config={}"]])
def test_config_fills_defaults(parse, config, how):
    path = config(
        "dim: 64\nlearning_rate: 1e-4\nweight_decay: 1.0e-2\ndata_path: some file.jsonl\ndtype:"
        " bfloat16\n"
    )
    args = parse("train_full_sft", *[part.format(path) for part in how])
    assert (args.dim, args.learning_rate, args.weight_decay) == (64, 1e-4, 1e-2)
    assert (args.data_path, args.dtype, args.config) == ("some file.jsonl", "bfloat16", str(path))
    assert args.n_layers == parse("train_full_sft").n_layers


@pytest.mark.parametrize("before", [True, False])
def test_command_line_wins(parse, config, before):
    given = ["--dim", 128, "--packing", 0]
    file = ["--config", config("dim: 64\npacking: 1\nepochs: 3\n")]
    args = parse("train_full_sft", *(given + file if before else file + given))
    assert (args.dim, args.packing, args.epochs) == (128, 0, 3)


def test_command_line_wins_over_lists_and_aliases(parse, config):
    path = config("report_to: [wandb, tensorboard]\nper_device_train_batch_size: 4\n")
    assert parse("train_full_sft", "--config", path).report_to == ["wandb", "tensorboard"]
    args = parse("train_full_sft", "--report_to", "none", "--batch_size", 2, "--config", path)
    assert (args.report_to, args.batch_size) == (["none"], 2)


@pytest.mark.parametrize("alias", [alias for alias, name in ALIASES.items() if name in COMMON])
def test_aliases(parse, config, alias, launched):
    values = {
        "resume": ("auto", "auto"),
        "ddp": ("true", True),
        "strategy": ("ddp", "ddp"),
        "grad_clip": ("3", 3.0),
    }
    values |= {
        "save_weight": ("sft_4gpu", "sft_4gpu"),
        "drop_last": ("true", 1),
        "lr_schedule": ("linear", "linear"),
    }
    text, value = values.get(ALIASES[alias], ("3", 3))
    assert (
        getattr(parse("train_full_sft", "--config", config(f"{alias}: {text}\n")), ALIASES[alias])
        == value
    )


def test_sections_are_looked_through(parse, config, launched):
    path = config(
        "model:\n  dim: 64\n  n_layers: 2\ntraining:\n  num_train_epochs: 2\n  distributed:"
        " true\nseed: 1\n"
    )
    args = parse("train_full_sft", "--config", path)
    assert (args.dim, args.n_layers, args.epochs, args.ddp, args.seed) == (64, 2, 2, True, 1)


def test_sections_in_sections_are_looked_through(parse, config):
    path = config(
        "training:\n  dataloader:\n    batch_size: 4\n    num_workers: 2\n    pin_memory: true\n "
        " seed: 1\n"
    )
    args = parse("train_full_sft", "--config", path)
    assert (args.batch_size, args.num_workers, args.seed) == (4, 2, 1)


SWITCHES = [
    ("true", True),
    ("True", True),
    ("yes", True),
    ("on", True),
    ("1", True),
    ("'true'", True),
]
SWITCHES += [
    ("false", False),
    ("FALSE", False),
    ("no", False),
    ("off", False),
    ("0", False),
    ("'false'", False),
]


@pytest.mark.parametrize("text, value", [*SWITCHES, ("", False), ("~", False)])
def test_switches(parse, config, text, value):
    assert parse("train_full_sft", "--config", config(f"skip_bad: {text}\n")).skip_bad is value


@pytest.mark.parametrize("text", ["2", "later", "[true]", "1.0", "y"])
def test_a_switch_takes_only_true_and_false(parse, config, text):
    path = config(f"# a comment\nskip_bad: {text}\n")
    with pytest.raises(
        ValueError, match=f"^--config {path}:2: skip_bad must be true or false, found "
    ):
        parse("train_full_sft", "--config", path)


@pytest.mark.parametrize("text, value", SWITCHES)
@pytest.mark.parametrize("name", ["packing", "compile", "gradient_checkpointing"])
def test_booleans_of_zero_and_one(parse, config, name, text, value):
    assert getattr(parse("train_full_sft", "--config", config(f"{name}: {text}\n")), name) == int(
        value
    )


# As YAML 1.1 these are numbers, truth values, dates and a time of day; a name or a path is what was
# written.
TEXTS = ["007", "010", "0x1F", "1e5", "5e-4", "1_000", "1.0", "yes", "on", "No", "true", "y", "2024-01-01", "12:30:45",
         ".inf", "-1", "+1", "=", "none"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["save_weight", "data_path", "from_weight"])
def test_a_text_is_what_was_written(parse, config, name, text):
    assert getattr(parse("train_full_sft", "--config", config(f"{name}: {text}\n")), name) == text


@pytest.mark.parametrize("text", ["'null'", '"~"', "''"])
def test_quotes_make_a_text_of_null(parse, config, text):
    assert (
        parse("train_full_sft", "--config", config(f"save_weight: {text}\n")).save_weight
        == text[1:-1]
    )


@pytest.mark.parametrize("key", ["resume", "resume_from_checkpoint"])
@pytest.mark.parametrize(
    "text, value", [("true", "auto"), ("Yes", "auto"), ("false", "none"), ("off", "none")]
)
def test_resume_is_a_switch_too_as_in_other_stacks(parse, config, key, text, value):
    assert parse("train_full_sft", "--config", config(f"{key}: {text}\n")).resume == value


@pytest.mark.parametrize(
    "text, value", [("auto", "auto"), ("none", "none"), ("", "none"), ("out/a/007", "out/a/007")]
)
def test_resume_is_a_text(parse, config, text, value):
    assert parse("train_full_sft", "--config", config(f"resume: {text}\n")).resume == value


def test_what_another_section_has_is_merged(parse, config):
    text = "base: &base\n  dim: 64\n  n_layers: 2\nrun:\n  <<: *base\n  dim: 64\n"
    args = parse("train_full_sft", "--config", config(text))
    assert (args.dim, args.n_layers) == (64, 2)


@pytest.mark.parametrize(
    "text, value", [("wandb", ["wandb"]), ("[none]", ["none"]), ("[]", []), ("", [])]
)
def test_lists(parse, config, text, value):
    assert (
        parse("train_full_sft", "--config", config(f"report_to: {text}\nseed: 5\n")).report_to
        == value
    )


def test_no_value_is_the_default(parse, config):
    args = parse("train_full_sft", "--config", config("dim:\nglobal_batch_size: null\n"))
    assert args.dim == parse("train_full_sft").dim and args.global_batch_size is None


def test_empty_file(parse, config):
    args = vars(parse("train_full_sft", "--config", config("# nothing\n")))
    assert args | {"config": None} == vars(parse("train_full_sft"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("batchsize: 1", "unknown key 'batchsize'; the nearest known one is 'batch_size'"),
        (
            "training:\n  leaning_rate: 1",
            "unknown key 'leaning_rate'; the nearest known one is 'learning_rate'",
        ),
        ("num_train_epoch: 1", "the nearest known one is 'num_train_epochs'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("1: 2", "unknown key '1'"),
        ("a: {b: {c: 1}}", "unknown key 'c'"),
        ("a: {b: {c: {dim: 1}}}", "unknown key 'c'"),
        ("training:", "unknown key 'training'"),
        ("- dim", "must be a mapping of flags to values"),
        ("dim", "must be a mapping of flags to values"),
        ("dim: [1", "broken YAML"),
        ("a: b: c", "broken YAML"),
        ("dim: !!python/object/apply:os.getcwd []", "broken YAML"),
        ("seed: 1\ndim: wide", "config.yaml:2: dim must be a whole number, found 'wide'"),
        ("dim: 64.5", "config.yaml:1: dim must be a whole number, found '64.5'"),
        ("dim: true", "dim must be a whole number, found 'true'"),
        ("dim: .inf", "dim must be a whole number, found '.inf'"),
        ("save_steps: 0x10", "save_steps must be a whole number, found '0x10'"),
        (
            "training:\n  max_grad_norm: much",
            "config.yaml:2: max_grad_norm must be a number, found 'much'",
        ),
        ("packing: 2", "packing must be one of 0, 1, found '2'"),
        ("dim: [1, 2]", "config.yaml:1: dim takes one value, found ['1', '2']"),
        ("a: {b: {dim: {c: 1}}}", "config.yaml:1: dim takes one value, found a section"),
        ("save_weight: [a]", "save_weight takes one value, found ['a']"),
        ("report_to: [wandb, [none]]", "report_to takes one value, found ['none']"),
        ("dtype: int8", "dtype: int8: no precision fits; dtype is float32, float16 or bfloat16"),
        (
            "report_to: [wandb, paper]",
            "report_to must be one of none, wandb, tensorboard, found 'paper'",
        ),
    ],
)
def test_mistakes_are_one_line(parse, config, text, said):
    with pytest.raises(ValueError) as error:
        parse("train_full_sft", "--config", config(text))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_mistake_in_a_file_is_not_hidden_by_the_command_line(parse, config):
    with pytest.raises(ValueError, match="dim must be a whole number, found 'wide'"):
        parse("train_full_sft", "--dim", 64, "--config", config("dim: wide"))


@pytest.mark.parametrize("name, said", [("nowhere.yaml", "No such file"), ("", "Is a directory")])
def test_file_that_cannot_be_read(parse, tmp_path, name, said):
    with pytest.raises(ValueError, match=f"--config {tmp_path / name}: {said}"):
        parse("train_full_sft", "--config", tmp_path / name)


def test_latin_1(parse, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("# caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.yaml: broken YAML: .* can't decode byte 0xe9"):
        parse("train_full_sft", "--config", tmp_path / "latin.yaml")


def test_config_without_a_file(parse):
    with pytest.raises(ValueError, match="--config"):
        parse("train_full_sft", "--config")


@pytest.mark.parametrize("name", ["lora", "distillation", "reward", "dpo", "grpo", "ppo"])
def test_the_file_of_a_stage_fits_it(parse, name):
    args = parse(f"train_{name}", "--config", f"{name}.yaml")
    assert args.save_weight == parse(f"train_{name}").save_weight and args.batch_size == 16
