"""The YAML file of `--config` as command-line flags.

Its keys are names of flags or the names that other stacks have for them. Every key is obeyed or refused with the
reason, none is ignored: a key that does nothing would be believed to do something.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from runtime.launcher import read_launch

ROOT = Path(__file__).resolve().parents[1]

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
# Keys without a flag: what is always done, and why. Another value is refused.
FIXED = {
    "ddp_broadcast_buffers": ((True, False), "the model has no buffers"),
    "find_unused_parameters": ((False,), "every parameter takes part in every step"),
    "fp16_full_eval": ((False,), "evaluation computes in the precision of training, see dtype"),
    "fp16_opt_level": (("O1",), "float16 is autocast over float32 weights, which is O1"),
    "lr_scheduler_type": (("cosine",), "the learning rate follows a cosine after warmup_ratio of the steps"),
    "pin_memory": ((True,), "batches are in pinned memory wherever there is a GPU"),
    "prefetch_factor": ((2,), "each of num_workers processes prepares 2 batches ahead"),
    "save_strategy": (("steps",), "checkpoints are saved every save_steps steps; 0 saves at the end alone"),
}
# These say together what --dtype says alone. YAML reads a bare `no` as false.
PRECISIONS = ("dtype", "mixed_precision", "fp16", "bf16")
DTYPES = {"no": "float32", "False": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
KNOWN = (*FIXED, *PRECISIONS, "distributed_backend", "deepspeed_config")


class Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-5 is a number, and a key that stands twice in a section is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def config_path(argv: list[str]) -> str | None:
    """The FILE of `--config FILE` or `--config=FILE` in a command line."""
    at = next((n for n, flag in enumerate(argv) if flag.split("=")[0] == "--config"), None)
    return None if at is None else argv[at].partition("=")[2] or "".join(argv[at + 1 : at + 2])


def read_config(path: str) -> list[tuple[str, object]]:
    """(key, value) of a YAML file in its order; two levels of sections such as `training:` are looked through.

    A file that does not exist where you stand is looked for in configs/, too.

    Raises:
        ValueError: no such file, or broken YAML.
    """
    here = Path(path)
    try:
        here = here if here.exists() or not (ROOT / "configs" / path).is_file() else ROOT / "configs" / path
        content = yaml.load(here.read_text(encoding="utf-8"), Loader) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config {path}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be a mapping of flags to values")
    return list(entries(content, 2))


def entries(content: dict, levels: int, section: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict) and levels:
            yield from entries(value, levels - 1, key)
        else:
            yield (f"{section}.{key}" if f"{section}.{key}" in ALIASES else key), value


def config_to_argv(argv: list[str], defaults: dict) -> list[str]:
    """The YAML file of `--config` as command-line flags, to stand before the real ones, which then win.

    Args:
        argv: the command line, with or without `--config FILE`.
        defaults: all flags with their defaults, as `vars(parser.parse_args([]))` gives them.

    Raises:
        ValueError: as `read_config`; an unknown key, with the nearest known one; a value that is not obeyed, with the
            reason; two keys that contradict each other.
    """
    path = config_path(argv)
    if path is None:
        return []
    content = read_config(path)
    try:
        values = adapt(flag_values(content, defaults), defaults, argv)
        return [word for name, value in values.items() for word in as_flag(name, value, defaults[name])]
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def flag_values(content: list[tuple[str, object]], defaults: dict) -> dict[str, object]:
    """Flag (or distributed_backend, deepspeed_config) -> value; the rest as `config_to_argv`."""
    keys: dict[str, str] = {}  # flag -> the key that stands for it in the file
    values: dict[str, object] = {}
    precisions: dict[str, object] = {}
    for key, value in content:
        name = ALIASES.get(key, key)
        if name not in (*defaults, *KNOWN) or name == "config":
            near = difflib.get_close_matches(str(key), [*defaults, *ALIASES, *KNOWN], n=1, cutoff=0.0)
            raise ValueError(f"unknown key {key!r}; the nearest known one is {near[0]!r}")
        if value is None:
            continue
        if name in PRECISIONS:
            if precisions.setdefault(key, value) != value:
                raise ValueError(f"{key}: {precisions[key]} and {key}: {value} contradict each other")
        elif name in FIXED:
            check_fixed(key, value, *FIXED[name])
        elif name in values and values[name] != value:
            raise ValueError(f"{keys[name]}: {values[name]} and {key}: {value} contradict each other; both mean {name}")
        elif isinstance(defaults.get(name), bool) and not isinstance(value, bool):  # a switch
            raise ValueError(f"{key} must be true or false, found {value!r}")
        else:
            keys[name], values[name] = key, value
    if precisions and (dtype := choose_dtype(precisions)):
        values["dtype"] = dtype
    return values


def adapt(values: dict[str, object], defaults: dict, argv: list[str]) -> dict[str, object]:
    """The values for this script on this machine, started as it was: what is about launchers, engines and backends."""
    values, here = dict(values), "deepspeed_config" in defaults
    if values.get("ddp") and not read_launch().launched:
        print("distributed: true, but no launcher started this script: one process trains alone", flush=True)
        del values["ddp"]
    if values.get("strategy") == "deepspeed":
        if not here:
            raise ValueError(
                "strategy deepspeed is an engine with a script of its own: start main.py or scripts/run_distributed.py "
                "with this file, or trainer/train_sft_deepspeed.py; without DeepSpeed: strategy zero1, zero2 or zero3"
            )
        del values["strategy"]
    if "deepspeed_config" in values:
        if not here:
            raise ValueError("deepspeed.config_path is for strategy: deepspeed, which is not asked for here")
        path = str(values["deepspeed_config"])
        values["deepspeed_config"] = str(ROOT / path) if (ROOT / path).is_file() and not Path(path).exists() else path
    if "distributed_backend" in values:
        devices = [values.get("device"), *(word for word in argv if word in ("cpu", "--device=cpu"))]
        cuda = torch.cuda.is_available() and not {"cpu", "--device=cpu"} & set(devices)
        check_backend(values.pop("distributed_backend"), "nccl" if cuda else "gloo")
    return values


def check_fixed(key: str, value: object, obeyed: tuple, why: str) -> None:
    if value not in obeyed:
        remedy = f"write {str(obeyed[0]).lower() if isinstance(obeyed[0], bool) else obeyed[0]}, or leave it out"
        raise ValueError(f"{key}: {value} cannot be had: {why}; {remedy}")


def choose_dtype(given: dict[str, object]) -> str | None:
    """The --dtype that is asked for; None where fp16 is false and nothing else is said: no default is float16.

    Args:
        given: keys of PRECISIONS with their values.
    """
    left = ["bfloat16", "float32", "float16"]
    for key, value in given.items():
        if key in ("fp16", "bf16"):
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, found {value!r}")
            left = [dtype for dtype in left if (dtype == DTYPES[key]) == value]
        else:
            asked = value if key == "dtype" else DTYPES.get(str(value))
            left = [dtype for dtype in left if dtype == asked]
    if not left:
        said = ", ".join(f"{key}: {value}" for key, value in given.items())
        raise ValueError(
            f"{said}: no precision fits; dtype is float32, float16 or bfloat16, mixed_precision no, fp16 or bf16, "
            "and one of fp16 and bf16 may be true"
        )
    if len(left) == 1:
        return left[0]
    return "float32" if "bf16" in given else None


def check_backend(asked: object, ours: str) -> None:
    """nccl between GPUs and gloo between CPUs: say so where the file asks for something else."""
    if asked == "nccl" and ours == "gloo":
        if read_launch().rank == 0:
            print("distributed_backend: nccl needs a GPU, gloo is used", flush=True)
    elif asked != ours:
        remedy = "leave it out, or take --device cpu" if ours == "nccl" else "leave it out"
        raise ValueError(f"distributed_backend: {asked} cannot be had: GPUs talk by nccl, CPUs by gloo; {remedy}")


def as_flag(name: str, value: object, default: object) -> list[str]:
    """The words of one flag on a command line."""
    if isinstance(default, bool):
        return [f"--{name}"] if value else []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)] if value else []
    if isinstance(value, bool) or isinstance(value, float) and value.is_integer():  # 0 or 1; 1e9
        value = int(value)
    return [f"--{name}", str(value)]
