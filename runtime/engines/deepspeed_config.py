"""DeepSpeed's JSON: what it says becomes defaults of our flags, which fill in its "auto".

Nothing in the file is ignored: a key is handed to DeepSpeed, or refused by name. Numbers that stand
in the file and contradict the flags or the number of processes are refused, with the arithmetic.
"""

import difflib
import importlib.util
import inspect
import json
import math
import os
from pathlib import Path

from model.lm import LMConfig
from runtime.device import dtype_of
from runtime.distributed import memory
from runtime.flags import check_flags
from runtime.launcher import read_launch

ROOT = Path(__file__).resolve().parents[2]
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}
OFFLOADS = ("offload_optimizer", "offload_param")
# Keys that DeepSpeed obeys in this script, with those of their sections; None: DeepSpeed itself
# knows the section's.
OBEYED = {
    **dict.fromkeys((*BATCH, "gradient_clipping"), "number"),
    **dict.fromkeys(("zero_optimization", "fp16", "bf16")),
    "optimizer": ("type", "params"),
    "scheduler": ("type", "params"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "flops_profiler": ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed",
                       "output_file"),
    "data_types": ("grad_accum_dtype",),
    "steps_per_print": "number",
    "gradient_predivide_factor": "number",
    "communication_data_type": "name",
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients",
                     "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), "switch"),
}  # fmt: skip
ADAM = ("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode", "torch_adam")
SCHEDULE = ("--learning_rate", "--warmup_ratio", "--lr_schedule", "--lr_scaling")
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
# What leaves the curve as it is, or is said by flags and compared with them.
HARMLESS = {
    *BATCH,
    "gradient_clipping",
    "zero_optimization",
    "aio",
    "flops_profiler",
    "steps_per_print",
}
HARMLESS |= {
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
}
HARMLESS |= {"zero_force_ds_cpu_optimizer"}
KINDS = {"number": (int, float), "name": str, "switch": bool}
# What would train in another way than every other engine, or not at all.
REFUSED = {
    "compute_grad_norm": "the gradient norm is logged at every step",
    "cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "write pin_memory into offload_optimizer or offload_param",
    "zenflow": "it steps with gradients of earlier steps",
    "legacy_stage1": "DeepSpeed has it no more",
    "elastic_checkpoint": "a run goes on with as many processes as it had",
}


def read(path: str) -> dict:
    """The JSON object of a file, which is looked for where you stand, then in configs/deepspeed/.

    Raises:
        ValueError: no such file, broken JSON, a key that stands there twice, or not an object.
    """

    def once(pairs: list) -> dict:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"{twice!r} stands there twice")
        return dict(pairs)

    check_flags({"deepspeed_config": path})  # read before the other flags are known, and checked
    inside = ROOT / "configs/deepspeed" / path
    file = inside if inside.is_file() and not Path(path).exists() else Path(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"--deepspeed_config {path}: not a file")
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=once)
    except OSError as error:
        raise ValueError(f"--deepspeed_config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path}: broken JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed_config {path}: must be a JSON object")
    return config


def defaults(path: str, argv: list[str]) -> dict:
    """What stands below YAML and command line: the file's numbers as flags, itself as `deepspeed`.

    Args:
        argv: the words of the flags that are given.
    """
    config = read(path)
    return flag_defaults(config) | {"deepspeed": without_schedule(config, argv)}


def flag_defaults(config: dict) -> dict:
    """Flag -> the number that the file has for it."""
    params = section(section(config, "optimizer"), "params")
    if "optimizer" in config:  # what DeepSpeed takes where its section says nothing
        params = {"lr": 1e-3, "weight_decay": 0.0} | params
    defaults = {
        "batch_size": config.get("train_micro_batch_size_per_gpu"),
        "accumulation_steps": config.get("gradient_accumulation_steps"),
        "grad_clip": config.get("gradient_clipping"),
        "learning_rate": params.get("lr"),
        "weight_decay": params.get("weight_decay"),
    }
    defaults = {flag: value for flag, value in defaults.items() if is_number(value)}
    enabled = {dtype: section(config, name).get("enabled") for name, dtype in PRECISIONS.items()}
    if dtype := next((dtype for dtype, value in enabled.items() if value is True), None):
        defaults["dtype"] = dtype
    elif enabled["bfloat16"] is False:
        defaults["dtype"] = "float32"
    return defaults


def without_schedule(config: dict, argv: list[str]) -> dict:
    """The file without its scheduler where a flag of SCHEDULE is given: flags win over the file."""
    given = next((word for word in argv if word.split("=")[0] in SCHEDULE), None)
    if given is None or "scheduler" not in config:
        return config
    if read_launch().rank == 0:
        print(
            f"{given.split('=')[0]} is given: the scheduler of --deepspeed_config is not used",
            flush=True,
        )
    return {key: value for key, value in config.items() if key != "scheduler"}


def check(config: dict, args, world_size: int) -> int:
    """Refuse what cannot be obeyed, before any data is read; returns the rows of an optimizer step.

    Args:
        config: as `read` gives it.
        args: the flags; `device` is a torch.device, `dtype` may be None (float32 on a CPU, bfloat16
        on a GPU).

    Raises:
        ValueError: names the file, the key and what to do.
    """
    try:
        check_keys(config)
        check_zero(section(config, "zero_optimization"))
        check_batch(config, args, world_size)
        check_precision(config, args)
        check_models(config, args)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {args.deepspeed_config}: {error}") from None
    return batch_sizes(args, world_size)[0]


def check_keys(config: dict) -> None:
    for key, value in config.items():
        if key not in OBEYED:
            near = difflib.get_close_matches(key, OBEYED, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{key!r} is unknown, or has no effect here; the nearest key that has is {near!r}"
            )
        kind = OBEYED[key]
        if kind is None or isinstance(kind, tuple):
            if not isinstance(value, dict):
                raise ValueError(f"{key} must be an object, found {json.dumps(value)}")
            if wrong := [name for name in value if kind and name not in kind]:
                raise ValueError(f"{wrong[0]!r} is unknown in {key}, which has {', '.join(kind)}")
        elif value == "auto" and key in (*BATCH, "gradient_clipping"):
            pass
        elif not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind == "switch"):
            raise ValueError(f"{key} must be a {kind}, found {json.dumps(value)}")
    for key in ("optimizer", "scheduler"):
        if key in config and not isinstance(config[key].get("type"), str):
            raise ValueError(f'{key} needs a "type"')
        if not isinstance(section(config, key).get("params", {}), dict):
            raise ValueError(f"params of {key} must be an object")
    kind, params = (section(config, "optimizer").get(key) for key in ("type", "params"))
    if kind not in (None, "Adam", "AdamW"):
        raise ValueError(
            f"optimizer {kind}: Adam and AdamW can be had; without the section it is AdamW by the"
            " flags"
        )
    if wrong := [name for name in params or () if name not in ADAM]:
        raise ValueError(
            f"{wrong[0]!r} is unknown in params of optimizer, which has {', '.join(ADAM)}"
        )
    kind = section(config, "scheduler").get("type")
    if kind not in (None, *SCHEDULERS):
        raise ValueError(
            f"scheduler {kind}: {', '.join(SCHEDULERS)} can be had; without the section a cosine"
            " follows --warmup_ratio"
        )


def check_zero(zero: dict) -> None:
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise ValueError(
            f"stage of zero_optimization must be 0, 1, 2 or 3, found {json.dumps(stage)}"
        )
    for key, why in REFUSED.items():
        if key in zero:
            raise ValueError(f"{key} of zero_optimization is not obeyed: {why}")
    for key in OFFLOADS:
        offload = zero.get(key)
        if offload is None:
            continue
        device = section(zero, key).get("device")
        if device not in ("none", "cpu", "nvme"):
            raise ValueError(
                f'{key} needs a "device": "cpu", "nvme" or "none", found {json.dumps(device)}'
            )
        least = 3 if key == "offload_param" or device == "nvme" else 1
        if device != "none" and stage < least:
            raise ValueError(f"{key} to {device} needs stage {least} or higher, it is {stage}")
        if device == "nvme":
            check_nvme(key, offload)


def check_nvme(key: str, offload: dict) -> None:
    """The folder can be written, unless it is "auto": below --out_dir."""
    path = offload.get("nvme_path")
    if not isinstance(path, str):
        raise ValueError(
            f'{key} to nvme needs "nvme_path": a folder on a fast disk, or "auto" for one below'
            " --out_dir"
        )
    if path != "auto":
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"nvme_path {path} of {key}: {error.strerror}") from None
        if not os.access(path, os.W_OK):
            raise ValueError(f"nvme_path {path} of {key} cannot be written")


def batch_sizes(args, world_size: int) -> tuple[int, int]:
    """(global batch in rows, micro-batches per optimizer step) that the flags ask for."""
    global_batch = args.global_batch_size or args.batch_size * args.accumulation_steps * world_size
    return global_batch, math.ceil(global_batch / (args.batch_size * world_size))


def check_batch(config: dict, args, world_size: int) -> None:
    """The three batch sizes and the clipping are those of the flags."""
    global_batch, accumulation = batch_sizes(args, world_size)
    asked = dict(zip(BATCH, (global_batch, args.batch_size, accumulation), strict=True))
    flags = {
        "train_micro_batch_size_per_gpu": "--batch_size",
        "gradient_accumulation_steps": "--accumulation_steps",
    }
    for key, flag in flags.items():
        if is_number(config.get(key)) and config[key] != asked[key]:
            raise ValueError(
                f'{key} {config[key]} contradicts {flag} {asked[key]}; write "auto", or the same'
                " number"
            )
    if is_number(config.get(BATCH[0])) and config[BATCH[0]] != global_batch:
        product = (
            f"micro-batch {args.batch_size} x accumulation {accumulation} x {world_size} processes"
        )
        if args.global_batch_size:
            product = "--global_batch_size"
        raise ValueError(
            f'train_batch_size {config[BATCH[0]]} is not {product} = {global_batch}; write "auto",'
            " or make them agree"
        )
    if is_number(config.get("gradient_clipping")) and config["gradient_clipping"] != args.grad_clip:
        raise ValueError(
            f"gradient_clipping {config['gradient_clipping']} contradicts --grad_clip"
            f" {args.grad_clip}"
        )


def check_precision(config: dict, args) -> None:
    dtype = dtype_of(args.dtype, args.device)
    for name, its_dtype in PRECISIONS.items():
        enabled = section(config, name).get("enabled", "auto")
        if enabled not in (True, False, "auto"):
            raise ValueError(
                f'enabled of {name} must be true, false or "auto", found {json.dumps(enabled)}'
            )
        if enabled is True and its_dtype == "float16" and args.device.type == "cpu":
            raise ValueError(
                'fp16 is enabled, which DeepSpeed cannot do on a CPU: write "auto", or take a GPU'
                " or bf16"
            )
        if enabled != "auto" and enabled != (dtype == its_dtype):
            said = "enabled" if enabled else "disabled"
            raise ValueError(
                f'{name} is {said}, which contradicts --dtype {dtype}; write "auto", or make them'
                " agree"
            )
    if dtype == "float16" and args.device.type == "cpu":
        raise ValueError(
            "--dtype float16: DeepSpeed cannot do it on a CPU; take bfloat16 or float32"
        )
    if not section(config, "zero_optimization").get("stage") and dtype != "float32":
        raise ValueError(
            f"stage 0 is for float32 here: in {dtype} take stage 1, the same curve with less memory"
        )


def check_models(config: dict, args) -> None:
    """The sections that DeepSpeed can check: its own words about the first mistake."""
    if importlib.util.find_spec("deepspeed") is None:
        return  # `deepspeed_engine.prepare` says so
    os.environ["DS_ACCELERATOR"] = args.device.type  # it would take a GPU where there is one
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for name, model in models.items():
        try:
            model(**section(config, name))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([name, *map(str, first["loc"])])
            message = "unknown" if first["type"] == "extra_forbidden" else first["msg"]
            raise ValueError(
                f"{key}: {message}, found {json.dumps(first['input'], default=str)}"
            ) from None
    if "scheduler" in config:
        known = inspect.signature(getattr(lr_schedules, config["scheduler"]["type"])).parameters
        if wrong := [name for name in section(config["scheduler"], "params") if name not in known]:
            raise ValueError(
                f"{wrong[0]!r} is unknown in params of scheduler, which has"
                f" {', '.join(list(known)[1:])}"
            )


def fill(config: dict, args, model: LMConfig, world_size: int, run_dir: Path) -> dict:
    """The object that DeepSpeed gets: every "auto" of ours is a number.

    Args:
        config: checked by `check`.
        args: the flags, with `total_steps`.
        run_dir: the run's folder; NVMe offload to "auto" goes beside it, to `{run_dir}.nvme`.
    """
    largest = max(shape.numel() for shape in memory.parameter_shapes(model).values())
    bucket = args.bucket_cap_mb * 2**20 // 4  # elements of float32
    _, accumulation = batch_sizes(args, world_size)
    auto = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": (
            10 * args.dim
        ),  # norms stay whole: gathering them is all latency
        "nvme_path": f"{run_dir}.nvme",
        "buffer_size": largest,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": args.learning_rate,
        "warmup_num_steps": max(1, int(args.warmup_ratio * args.total_steps)),
        "total_num_steps": args.total_steps,
    }

    def put_in(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: put_in(inner, name) for name, inner in value.items()}
        return auto[key] if value == "auto" and key in auto else value

    filled = put_in(config)
    filled["train_batch_size"] = args.batch_size * accumulation * world_size
    filled["train_micro_batch_size_per_gpu"] = args.batch_size
    filled["gradient_accumulation_steps"] = accumulation
    filled["gradient_clipping"] = float(args.grad_clip)
    for name, dtype in PRECISIONS.items():
        filled[name] = {
            **section(config, name),
            "enabled": dtype_of(args.dtype, args.device) == dtype,
        }
    if "optimizer" in filled:  # the flags win over the file, whose numbers are their defaults
        params = filled["optimizer"].setdefault("params", {})
        params |= {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        offloaded = "offload_optimizer" in section(filled, "zero_optimization")
        if args.device.type == "cpu" and not offloaded and "bias_correction" not in params:
            params.setdefault(
                "torch_adam", True
            )  # the same AdamW, without the minutes of building another one
    return filled


def curve_settings(config: dict) -> dict:
    """What the file alone says about the curve: all but the HARMLESS, and what flags say."""
    settings = {}
    for key, value in config.items():
        if key in PRECISIONS:
            value = {name: setting for name, setting in value.items() if name != "enabled"}
        if key == "optimizer":
            params = section(value, "params")
            kept = {
                name: setting
                for name, setting in params.items()
                if name not in ("lr", "weight_decay")
            }
            value = {**value, "params": kept}
        if key not in HARMLESS and value:
            settings[key] = value
    return settings


def section(config: dict, name: str) -> dict:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
