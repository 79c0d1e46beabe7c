"""The YAML file of `--config` as command-line flags.

Its keys are names of flags or the names that other stacks have for them. Every key is obeyed or
refused with the reason, none is ignored: a key that does nothing would be believed to do something.

Values are the text that stands in the file, and the flag says what it means: YAML alone would make
a number of the name 007, a truth value of the name on, and a text of the number 5e-4.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from runtime.folders import ROOT
from runtime.launcher import read_launch

# The names that configuration files of other projects use for our flags, and for the keys below.
ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "max_grad_norm": "grad_clip",
    "num_train_epochs": "epochs",
    "max_length": "max_seq_len",
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "eval_steps": "eval_interval",
    "resume_from_checkpoint": "resume",
    "lr_scheduler_type": "lr_schedule",
    "experiment_name": "save_weight",
    "distributed": "ddp",
    "distributed_strategy": "strategy",
    "ddp_bucket_cap_mb": "bucket_cap_mb",
    "deepspeed": "deepspeed_config",
    "deepspeed.config_path": "deepspeed_config",
    "dataloader_num_workers": "num_workers",
    "dataloader_drop_last": "drop_last",
    "dataloader_pin_memory": "pin_memory",
    "dataloader_prefetch_factor": "prefetch_factor",
}
# lr_scheduler_type -> our name. All of them come behind the warm-up of warmup_ratio.
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
# Keys without a flag: what is always done, and why. Another value is refused.
FIXED = {
    "ddp_broadcast_buffers": ((True, False), "the model has no buffers"),
    "find_unused_parameters": ((False,), "every parameter takes part in every step"),
    "fp16_full_eval": ((False,), "evaluation computes in the precision of training, see dtype"),
    "fp16_opt_level": (("O1",), "float16 is autocast over float32 weights, which is O1"),
    "pin_memory": ((True,), "batches are in pinned memory wherever there is a GPU"),
    "prefetch_factor": ((2,), "each of num_workers processes prepares 2 batches ahead"),
    "save_strategy": (
        ("steps",),
        "checkpoints are saved every save_steps steps; 0 saves at the end alone",
    ),
}
# These say together what --dtype says alone.
PRECISIONS = ("dtype", "mixed_precision", "fp16", "bf16")
DTYPES = {
    "no": "float32",
    "false": "float32",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
KNOWN = (*FIXED, *PRECISIONS, "distributed_backend", "deepspeed_config")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SWITCH = WORDS | {"1": True, "0": False}
# Text flags that are switches in other stacks.
SWITCHED = {"resume": {True: "auto", False: "none"}}
TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in "null bool int float timestamp str merge value seq map".split()
}


@dataclass(frozen=True)
class Entry:
    """A key of the file with its value.

    Attributes:
        key: as it stands there; with its section where ALIASES has it so.
        value: text, a list of texts, or None for null, which is as if the key did not stand there;
            {} for a section that lies too deep.
        place: `--config FILE:LINE`, for messages.
    """

    key: str
    value: str | list | dict | None
    place: str

    def error(self, said: str) -> ValueError:
        return ValueError(f"{self.place}: {said}")


def config_path(argv: list[str]) -> str | None:
    """The FILE of `--config FILE` or `--config=FILE` in a command line."""
    at = next((n for n, flag in enumerate(argv) if flag.split("=")[0] == "--config"), None)
    return None if at is None else argv[at].partition("=")[2] or "".join(argv[at + 1 : at + 2])


def read_config(path: str) -> list[Entry]:
    """What a YAML file says, in its order, with two levels of sections such as `training:`.

    A file that does not exist where you stand is looked for in configs/, too.

    Raises:
        ValueError: no such file, or broken YAML.
    """
    here, shipped = Path(path), ROOT / "configs" / path
    try:
        if not here.exists() and shipped.is_file():
            here = shipped
        if (
            here.exists()
            and not here.is_file()
            and not here.is_dir()
            and not path.startswith("/dev/fd/")
        ):
            raise ValueError(f"--config {path}: not a file")
        content = yaml.compose(here.read_text(encoding="utf-8"), yaml.SafeLoader)
        if content is None or content.tag == "tag:yaml.org,2002:null":  # nothing, or comments alone
            return []
        if isinstance(content, yaml.MappingNode):
            return list(entries(content, f"--config {path}"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: broken YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"--config {path}: broken YAML: lists in lists without end") from None
    raise ValueError(f"--config {path}: must be a mapping of flags to values")


def entries(
    mapping: yaml.MappingNode, file: str, levels: int = 2, section: str = ""
) -> Iterator[Entry]:
    """The entries of a mapping and of the sections in it. ValueError: see `pairs_of`."""
    for name, (key, node) in pairs_of(mapping, file, {}).items():
        if isinstance(node, yaml.MappingNode) and levels:
            yield from entries(node, file, levels - 1, name)
        else:
            yield Entry(
                f"{section}.{name}" if f"{section}.{name}" in ALIASES else name,
                text_of(node),
                place_of(key, file),
            )


def pairs_of(
    mapping: yaml.MappingNode, file: str, known: dict
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Name -> (key, value) of a mapping; of `<<: *other`, what is in `other` comes first.

    Args:
        known: mapping -> its pairs, of those that were asked for before; None while they are worked
        out.

    Raises:
        ValueError: a key stands there twice, or is no word; `<<` does not name a mapping, or names
        one that it is in.
    """
    if mapping in known:
        return known[mapping]
    known[mapping], merged, own = None, {}, {}
    for key, node in mapping.value:
        place = place_of(key, file)
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{place}: a key must be a word, not a list or a section")
        if key.value in own:
            raise ValueError(f"{place}: {key.value!r} stands there twice")
        own[key.value] = key, node
        if key.tag != "tag:yaml.org,2002:merge":
            continue
        for other in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(other, yaml.MappingNode) or known.get(other, ...) is None:
                raise ValueError(
                    f"{place}: << takes a section, or a list of them, that it is not in itself"
                )
            merged = pairs_of(other, file, known) | merged
    known[mapping] = merged | {
        name: pair for name, pair in own.items() if pair[0].tag != "tag:yaml.org,2002:merge"
    }
    return known[mapping]


def place_of(node: yaml.Node, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def text_of(node: yaml.Node, levels: int = 2) -> str | list | dict | None:
    """A scalar as it stands in the file, None for null; lists of them; {} for what lies deeper."""
    if node.tag not in TAGS:
        raise yaml.MarkedYAMLError(
            problem=f"a tag, {node.tag}, is not taken", problem_mark=node.start_mark
        )
    if isinstance(node, yaml.SequenceNode) and levels:
        return [text_of(item, levels - 1) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return {}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def config_to_argv(argv: list[str], parser) -> list[str]:
    """The YAML file of `--config` as flags, to stand before the command line's, which then win.

    Args:
        argv: the command line, with or without `--config FILE`.
        parser: the ArgumentParser that knows the flags.

    Raises:
        ValueError: names file, line and key. As `read_config`; an unknown key, with the nearest
            known one; a value that the flag does not take, or that is not obeyed, with the reason;
            two keys that contradict each other.
    """
    path = config_path(argv)
    if path is None:
        return []
    flags = {
        action.dest: action for action in parser._actions if action.dest not in ("help", "config")
    }
    values = adapt(flag_values(read_config(path), flags), argv)
    return [word for name, entry in values.items() for word in as_words(name, entry.value)]


def flag_values(content: list[Entry], flags: dict) -> dict[str, Entry]:
    """Flag (or distributed_backend, deepspeed_config) -> its entry, the value as the flag takes it.

    Args:
        flags: name -> the parser's action.

    Raises:
        ValueError: as `config_to_argv`.
    """
    values: dict[str, Entry] = {}
    precisions: dict[str, Entry] = {}
    for entry in content:
        name = ALIASES.get(entry.key, entry.key)
        if name not in (*flags, *KNOWN):
            near = difflib.get_close_matches(entry.key, [*flags, *ALIASES, *KNOWN], n=1, cutoff=0.0)
            raise entry.error(f"unknown key {entry.key!r}; the nearest known one is {near[0]!r}")
        if entry.value is None:
            continue
        if name in FIXED:
            check_fixed(entry, *FIXED[name])
            continue
        if entry.key == "lr_scheduler_type":
            if str(entry.value) not in SCHEDULES:
                known = ", ".join(SCHEDULES)
                raise entry.error(
                    f"lr_scheduler_type: {entry.value} cannot be had; it is one of {known}"
                )
            entry = replace(entry, value=SCHEDULES[entry.value])
        if name in PRECISIONS:
            of_name = precisions
        else:
            refuse_deepspeed(name, entry, flags)
            entry, of_name = replace(entry, value=flag_value(name, entry, flags.get(name))), values
        other = of_name.setdefault(name, entry)
        if other.value != entry.value:
            both = "" if name == other.key == entry.key else f"; both mean {name}"
            same = (
                f"{other.key}: {other.value} and {entry.key}: {entry.value} contradict each"
                f" other{both}"
            )
            raise entry.error(same)
    if precisions and (dtype := choose_dtype(precisions)):
        values["dtype"] = replace(next(iter(precisions.values())), value=dtype)
    return values


def flag_value(name: str, entry: Entry, action) -> bool | str | list[str]:
    """The value of a flag: true or false for a switch, texts for a list, else a text it takes.

    Args:
        action: of the parser; None for a key that is no flag.
    """
    if action is not None and action.nargs == 0:
        return truth(entry)
    if action is not None and action.nargs == "+":
        values = entry.value if isinstance(entry.value, list) else [entry.value]
        return [checked(name, entry, value, action) for value in values]
    return checked(name, entry, entry.value, action)


def checked(name: str, entry: Entry, value: object, action) -> str:
    """One value as the text that argparse takes for it; numbers in one form, to compare them."""
    if not isinstance(value, str):
        raise entry.error(
            f"{entry.key} takes one value, found {'a section' if value == {} else value}"
        )
    word, choices = value.lower(), getattr(action, "choices", None) or ()
    if word in WORDS and name in SWITCHED:
        return SWITCHED[name][WORDS[word]]
    if word in WORDS and {0, 1} <= {*choices}:
        return str(int(WORDS[word]))
    kind = getattr(action, "type", None)
    try:
        value = repr(float(value)) if kind is float else str(whole(value)) if kind is int else value
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise entry.error(f"{entry.key} must be {wanted}, found {value!r}") from None
    if choices and (kind or str)(value) not in choices:
        raise entry.error(
            f"{entry.key} must be one of {', '.join(map(str, choices))}, found {value!r}"
        )
    return value


def whole(text: str) -> int:
    """7, and also 7.0 and 1e4. ValueError: no whole number."""
    try:
        return int(text)
    except ValueError:
        if float(text).is_integer():
            return int(float(text))
        raise


def truth(entry: Entry) -> bool:
    word = entry.value.lower() if isinstance(entry.value, str) else None
    if word not in SWITCH:
        raise entry.error(f"{entry.key} must be true or false, found {entry.value!r}")
    return SWITCH[word]


def refuse_deepspeed(name: str, entry: Entry, flags: dict) -> None:
    """Keys for the engine DeepSpeed in a file for a script that has another one."""
    if "deepspeed_config" in flags:
        return
    if name == "strategy" and entry.value == "deepspeed":
        raise entry.error(
            "strategy deepspeed is an engine with a script of its own: start main.py or"
            " scripts/run_distributed.py with this file, or trainer/engines/train_sft_deepspeed.py;"
            " without DeepSpeed: strategy zero1, zero2 or zero3"
        )
    if name == "deepspeed_config":
        raise entry.error(
            "deepspeed.config_path is for strategy: deepspeed, which is not asked for here"
        )


def adapt(values: dict[str, Entry], argv: list[str]) -> dict[str, Entry]:
    """The values for this script as it was started: about launchers, engines and backends."""
    values = dict(values)
    if "ddp" in values and values["ddp"].value and not read_launch().launched:
        print(
            "distributed: true, but no launcher started this script: one process trains alone",
            flush=True,
        )
        del values["ddp"]
    if "strategy" in values and values["strategy"].value == "deepspeed":
        del values["strategy"]
    if "deepspeed_config" in values:
        path = values["deepspeed_config"].value
        if (ROOT / path).is_file() and not Path(path).exists():
            values["deepspeed_config"] = replace(values["deepspeed_config"], value=str(ROOT / path))
    if "distributed_backend" in values:
        device = values["device"].value if "device" in values else None
        on_cpu = {"cpu", "--device=cpu"} & {device, *argv}
        check_backend(
            values.pop("distributed_backend"),
            "nccl" if torch.cuda.is_available() and not on_cpu else "gloo",
        )
    return values


def check_fixed(entry: Entry, obeyed: tuple, why: str) -> None:
    asked = entry.value
    if isinstance(obeyed[0], bool) and isinstance(asked, str):
        asked = SWITCH.get(asked.lower())
    if asked not in (obeyed if isinstance(obeyed[0], bool) else [str(value) for value in obeyed]):
        remedy = (
            f"write {str(obeyed[0]).lower() if isinstance(obeyed[0], bool) else obeyed[0]}, or"
            " leave it out"
        )
        raise entry.error(f"{entry.key}: {entry.value} cannot be had: {why}; {remedy}")


def choose_dtype(given: dict[str, Entry]) -> str | None:
    """The --dtype that is asked for; None where fp16 is false and nothing else: no default is.

    Args:
        given: entries of PRECISIONS.
    """
    left = ["bfloat16", "float32", "float16"]
    for key, entry in given.items():
        if key in ("fp16", "bf16"):
            asked = truth(entry)
            left = [dtype for dtype in left if (dtype == DTYPES[key]) == asked]
        else:
            word = str(entry.value).lower()
            left = [
                dtype for dtype in left if dtype == (word if key == "dtype" else DTYPES.get(word))
            ]
    if not left:
        said = ", ".join(f"{entry.key}: {entry.value}" for entry in given.values())
        raise next(reversed(given.values())).error(
            f"{said}: no precision fits; dtype is float32, float16 or bfloat16, mixed_precision no,"
            " fp16 or bf16, and one of fp16 and bf16 may be true"
        )
    if len(left) == 1:
        return left[0]
    return "float32" if "bf16" in given else None


def check_backend(entry: Entry, ours: str) -> None:
    """It is nccl between GPUs and gloo between CPUs: say so where the file asks for something else."""
    if entry.value == "nccl" and ours == "gloo":
        if read_launch().rank == 0:
            print("distributed_backend: nccl needs a GPU, gloo is used", flush=True)
    elif entry.value != ours:
        remedy = "leave it out, or take --device cpu" if ours == "nccl" else "leave it out"
        reason = f"cannot be had: GPUs talk by nccl, CPUs by gloo; {remedy}"
        raise entry.error(f"distributed_backend: {entry.value} {reason}")


def as_words(name: str, value: bool | str | list[str]) -> list[str]:
    """The words of one flag on a command line."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    if isinstance(value, list):
        return [f"--{name}", *value] if value else []
    return [f"--{name}={value}"]
