"""Weights: NAME.pth, a plain state dict with the LMConfig beside it in NAME.json, or a folder.

A folder is one in Hugging Face's format, see model/hf.py.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from model.lm import LMConfig, MiniMindLM
from model.meta_device import on_meta_device
from model.tensor_file import read_tensors


def is_path(name: str) -> bool:
    """Whether it names a file or a folder, not a stage or a run."""
    return name.endswith(".pth") or "/" in name or (Path(name) / "config.json").is_file()


def load_model(path: str | Path) -> MiniMindLM:
    """The model in a weights file or a folder in Hugging Face's format: CPU, float32, for evaluation.

    Raises:
        ValueError: the configuration is missing, or weights or configuration are damaged.
    """
    with on_meta_device():
        model = MiniMindLM(read_config(path))
    load_weights(model, path)
    return model.eval()


@torch.no_grad()
def load_weights(
    model: MiniMindLM,
    path: str | Path,
    new_head: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Load a weights file, or a folder in Hugging Face's format, into the model.

    Args:
        new_head: as for `open_weights`.
        device: where a model of the meta device gets its memory.

    Raises:
        ValueError: see `open_weights`; a value is not finite.
    """
    tensors = open_weights(model, path, new_head)
    if model.model.embed_tokens.weight.is_meta:  # not before: a wrong size asks for no memory
        allocate(model, device)
    for name, p in model.named_parameters():
        if isinstance(tensors.get(name), Tensor):
            p.copy_(tensors[name])
        elif name in tensors:
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
    shapes, own_shapes = ({n: v.shape for n, v in part.items()} for part in (state, own))
    if shapes != own_shapes:
        from model.weights_faults import explain_difference

        raise ValueError(f"{path}: {explain_difference(shapes, own_shapes)}")
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
    try:
        return config_from_json(path.with_suffix(".json"), leave_out="head" if reward else "")
    except (FileNotFoundError, ValueError) as error:
        from model.weights_faults import explain_config

        raise ValueError(explain_config(path, error)) from None


def config_from_json(path: str | Path, leave_out: str = "") -> LMConfig:
    """Read the JSON beside a weights file, a key apart. ValueError: it is not one of ours."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return LMConfig(**{name: value for name, value in values.items() if name != leave_out})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a model configuration ({error})") from None
