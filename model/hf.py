"""Models in Hugging Face's format: a folder with config.json, weights and a tokenizer."""

import re
from collections.abc import Mapping
from pathlib import Path

from model.hf_config import config_from_hf, config_to_hf  # noqa: F401  # the second for others
from model.hf_files import read_folder
from model.lazy_tensors import FileTensor, LazyTensor
from model.lm import LMConfig, MiniMindLM
from model.meta_device import on_meta_device

# Buffers that older checkpoints carry; the model computes them from its configuration.
BUFFERS = re.compile(r".*rotary_emb\.inv_freq|(model\.)?freqs_(cos|sin)")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.pth)")
# What a model's folder needs beside its weights.
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]


def resolve_folder(name: str, flag: str = "--from_weight") -> Path:
    """The folder that a path or a hub name, "org/name", means; from the hub it is downloaded.

    Args:
        flag: what named it, for the error.

    Raises:
        ValueError: there is no such folder, and the hub has none or cannot be reached.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        if Path(name).is_dir():
            return Path(name)
        raise ValueError(f"{flag} {name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "model*.safetensors*"]))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*"])
    except Exception as error:  # of requests, of the hub, of the system: no common class
        reason = type(error).__name__
        fault = f"no such folder, and the Hugging Face hub does not give it ({reason})"
        advice = (
            f"`hf download {name} --local-dir FOLDER` where there is a network, then {flag} FOLDER"
        )
        raise ValueError(f"{flag} {name}: {fault}; {advice}") from None
    return folder


def read_hf_tensors(folder: str | Path, config: LMConfig) -> Mapping[str, LazyTensor]:
    """A folder's tensors under our names, those of the model's state dict; no data is read yet.

    Experts of a mixture, one file tensor each, come stacked as ours are.

    Args:
        config: of `config_from_hf`.

    Raises:
        ValueError: a tensor is missing, too much, of another shape or type; a damaged file.
    """
    folder = Path(folder)
    tensors = read_folder(folder)
    shapes = {name: tuple(v.shape) for name, v in meta_model(config).state_dict().items()}
    rest = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    read = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and config.tie_embeddings and name not in rest:
            continue
        pieces = []
        for source, begins, size in file_names(name, shape, config, rest):
            if source not in rest:
                raise ValueError(f"{folder}: {source} is missing; config.json asks for it")
            tensor = rest.pop(source)
            if tensor.shape not in (size, size[-len(tensor.shape) :]):
                fault = f"{source} is {tensor.shape}, by config.json {size}"
                raise ValueError(f"{tensor.path}: {fault}")
            tensor = FileTensor(tensor.path, source, tensor.dtype, size, tensor.offset)
            places = [(a, a + n) for a, n in zip(begins, size, strict=True)]
            pieces.append((tensor, places))
        read[name] = LazyTensor(shape, pieces)
    for name, tensor in rest.items():
        fault = f"{name} has no place in the model that config.json describes"
        raise ValueError(f"{tensor.path}: {fault}")
    if config.tie_embeddings:
        check_tie(read)
        read["lm_head.weight"] = read["model.embed_tokens.weight"]
    return read


def file_names(
    name: str, shape: tuple[int, ...], config: LMConfig, tensors: Mapping[str, FileTensor]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The tensors of a folder that one of ours is made of: (name, where it begins, shape)."""
    if ".mlp.experts." in name and name not in tensors:
        stem, _, kind = name.rpartition(".")
        kinds = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        rows, columns = shape[1] // len(kinds), shape[2]
        return [
            (f"{stem}.{e}.{part}.weight", (e, i * rows, 0), (1, rows, columns))
            for e in range(shape[0])
            for i, part in enumerate(kinds)
        ]
    if ".mlp.shared_expert." in name:  # ours is one, as wide as all of MiniMind's together
        stem, kind = name.split(".shared_expert.")
        n, (rows, columns) = config.n_shared_experts, shape
        down = kind.startswith("down_proj")
        size = (rows, columns // n) if down else (rows // n, columns)
        return [
            (
                f"{stem}.shared_experts.{i}.{kind}",
                (0, i * size[1]) if down else (i * size[0], 0),
                size,
            )
            for i in range(n)
        ]
    return [(name, (0,) * len(shape), shape)]


def check_tie(tensors: Mapping[str, LazyTensor]) -> None:
    """A tied model's file may hold the matrix twice, but not two matrices."""
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    if head is not None and not head.equal(embedding):
        fault = "lm_head.weight is not the embedding, but config.json has tie_word_embeddings true"
        raise ValueError(f"{head.pieces[0][0].path}: {fault}")


def meta_model(config: LMConfig) -> MiniMindLM:
    """A model on the meta device: names, shapes and ties of its parameters, without memory."""
    with on_meta_device():
        return MiniMindLM(config)
