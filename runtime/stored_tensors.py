"""The tensors of weights, one at a time: for a model that nothing here is to hold whole."""

from collections.abc import Mapping
from pathlib import Path

import torch

from model.lazy_tensors import LazyTensor
from model.lm import LMConfig, MiniMindLM


def empty_model(config: LMConfig) -> MiniMindLM:
    """A model without values, on the meta device; tied as it should be."""
    with torch.device("meta"):
        return MiniMindLM(config).eval()


def open_tensors(path: Path, config: LMConfig) -> Mapping[str, torch.Tensor | LazyTensor]:
    """Name as in the model's state dict -> what is read when it is asked for a slice: `value[:]`.

    Args:
        path: a .pth file, or a folder in Hugging Face's format.
        config: of `read_config(path)`.

    Raises:
        ValueError: they are damaged, or a tensor is missing or of another shape; names the file.
    """
    if path.is_dir():
        from model.hf import read_hf_tensors

        return read_hf_tensors(path, config)
    from model.tensor_file import read_tensors

    tensors = read_tensors(path)
    for name, value in empty_model(config).state_dict().items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != tuple(value.shape):
            fault = f"{name} is {found}, by {path.stem}.json {tuple(value.shape)}"
            raise ValueError(f"{path}: {fault}; keep the two files together")
    return tensors
