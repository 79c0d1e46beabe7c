"""Weights: NAME.pth, a plain state dict with the LMConfig beside it in NAME.json, or a folder.

A folder is one in Hugging Face's format, see model/hf.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.initial import on_meta_device
from model.lm import LMConfig, MiniMindLM
from model.tensor_file import read_tensors


def load_model(path: str | Path) -> MiniMindLM:
    """The model in a weights file or a folder in Hugging Face's format: CPU, float32, for evaluation.

    Raises:
        ValueError: the configuration is missing, or weights or configuration are damaged.
    """
    with on_meta_device():
        model = MiniMindLM(read_config(path))
    tensors = open_weights(model, path)  # first: a wrong size must not ask for its memory
    allocate(model, "cpu")
    copy_tensors(tensors, model)
    return model.eval()


@torch.no_grad()
def load_weights(model: MiniMindLM, path: str | Path, new_head: bool = False) -> None:
    """Load a weights file, or a folder in Hugging Face's format, into the model.

    Args:
        new_head: as for `open_weights`.

    Raises:
        ValueError: see `open_weights`; a value is not finite.
    """
    copy_tensors(open_weights(model, path, new_head), model)


@torch.no_grad()
def copy_tensors(tensors: Mapping, model: MiniMindLM) -> None:
    """Put what `open_weights` found into a model that has memory."""
    for name, p in model.named_parameters():
        if name in tensors:
            if isinstance(tensors[name], Tensor):
                p.copy_(tensors[name])
            else:
                tensors[name].copy_to(p)


def open_weights(
    model: MiniMindLM, path: str | Path, new_head: bool = False, lazily: bool = False
) -> dict:
    """The tensors of a weights file or a folder: every name and shape fits the model.

    Args:
        model: for which they are; may be spread over processes, or have no memory yet, and have
            LoRA's factors beside its weights.
        new_head: a reward model may take the decoder of a language model and keep its own head.
        lazily: nothing is read yet, where a part of each tensor is wanted, or one after the other.

    Returns:
        name -> Tensor, the file itself; of a folder, and lazily, name -> LazyTensor.

    Raises:
        ValueError: the file is not a state dict, or was made for a model of another shape; names
            the first difference.
    """
    path, own = Path(path), model.state_dict()
    own = {name: value for name, value in own.items() if ".lora_" not in name}
    if path.is_dir():
        from model.hf import config_from_hf, read_hf_tensors

        state = dict(read_hf_tensors(path, config_from_hf(path)))
    elif lazily:
        from model.lazy_tensors import open_torch_file

        state = open_torch_file(path)
    else:
        state = read_tensors(path)
    if "score.weight" in state and "score.weight" not in own:
        raise ValueError(f"{path}: a reward model, a language model is wanted here")
    if new_head and "score.weight" in own and "score.weight" not in state:
        state.pop("lm_head.weight", None)
        own.pop("score.weight")
    if model.config.tie_embeddings and "model.embed_tokens.weight" in state:
        embedding = state["model.embed_tokens.weight"]
        head = state.setdefault("lm_head.weight", embedding)
        if head.dtype != embedding.dtype or not head.equal(embedding):
            fault = "lm_head.weight is not the embedding: its model has tie_embeddings false"
            raise ValueError(f"{path}: {fault}")
    for name in [*own, *state]:
        if name not in state or name not in own:
            lacking = "the file" if name not in state else "the model"
            fault = f"made for another model: {lacking} has no {name}"
            raise ValueError(f"{path}: {fault}; check --n_layers, --use_moe")
    for name, value in own.items():
        if value.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} in the file and {tuple(value.shape)} here"
            fault = f"made for a model of another shape: {name} is {shapes}"
            advice = "check --dim, --n_heads, --n_kv_heads and the tokenizer"
            raise ValueError(f"{path}: {fault}; {advice}")
    return state


def allocate(model: MiniMindLM, device: torch.device | str) -> None:
    """Give a model of the meta device memory, without values; a reward model's head begins at zero."""
    new = {id(p): nn.Parameter(torch.empty(p.shape, device=device)) for p in model.parameters()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[id(p)].requires_grad_(p.requires_grad))
    if hasattr(model, "score"):
        nn.init.zeros_(model.score.weight)


def read_config(path: str | Path, reward: bool = False) -> LMConfig:
    """The shape of the language model in a weights file or a folder in Hugging Face's format.

    Args:
        reward: that of a reward model is wanted, too: of its decoder.

    Raises:
        ValueError: the configuration is missing or damaged, or not that of a language model.
    """
    path = Path(path)
    if path.is_dir():
        from model.hf import config_from_hf

        return config_from_hf(path)
    config_path = path.with_suffix(".json")
    if not config_path.is_file():
        fault = f"missing; it holds the shape of the model in {path.name}, keep them together"
        raise ValueError(f"{config_path}: {fault}")
    text = config_path.read_text(encoding="utf-8", errors="replace")
    if '"lora": {' in text:
        advice = "name its base model here, and the adapter with --lora, or merge the two"
        raise ValueError(f"{path}: an adapter: {advice}")
    is_reward = '"head": "score"' in text
    if is_reward and not reward:
        fault = "a reward model, which scores texts but writes none; name a language model"
        raise ValueError(f"{path}: {fault}")
    return LMConfig.from_json(config_path, leave_out="head" if is_reward else "")
