"""What is wrong with weights that cannot be used, in a line."""

import re
from collections.abc import Mapping
from pathlib import Path


def explain_load(error: Exception) -> str:
    """Why torch.load failed, in a few words: its own advise to run what stands in the file."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is code and no data: a file of tensors is wanted"
    reason = text.split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
    return reason.splitlines()[0][:120]


def explain_difference(file: Mapping[str, tuple], model: Mapping[str, tuple]) -> str:
    """The first tensor that a weights file and a model do not have in common.

    Args:
        file, model: name -> shape.
    """
    for name in [*model, *file]:
        if name not in file or name not in model:
            lacking = "the file" if name not in file else "the model"
            fault = f"made for another model: {lacking} has no {name}"
            return f"{fault}; check --n_layers, --use_moe"
    name = next(name for name, shape in model.items() if shape != file[name])
    shapes = f"{tuple(file[name])} in the file and {tuple(model[name])} here"
    fault = f"made for a model of another shape: {name} is {shapes}"
    return f"{fault}; check --dim, --n_heads, --n_kv_heads and the tokenizer"


def explain_config(path: Path, error: Exception) -> str:
    """Why the configuration beside a weights file is not that of a language model.

    Args:
        error: of `weights.config_from_json`.
    """
    config_path = path.with_suffix(".json")
    if isinstance(error, FileNotFoundError):
        fault = f"missing; it holds the shape of the model in {path.name}, keep them together"
        return f"{config_path}: {fault}"
    text = config_path.read_text(encoding="utf-8", errors="replace")
    if '"lora": {' in text:
        advice = "name its base model here, and the adapter with --lora, or merge the two"
        return f"{path}: an adapter: {advice}"
    if '"head": "score"' in text:
        advice = "which scores texts but writes none; name a language model"
        return f"{path}: a reward model, {advice}"
    return str(error)
