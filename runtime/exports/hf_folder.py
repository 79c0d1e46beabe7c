"""Write a model as a folder in Hugging Face's format, for transformers, vLLM and other trainers.

The folder gets config.json, the weights as safetensors, the tokenizer with its chat template, and
generation_config.json, which says where a reply ends.
"""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.progress import byte_bar
from model.config import LMConfig
from model.hf import config_to_hf, file_names, meta_model
from model.lazy_tensors import CHUNK_BYTES, DTYPES, LazyTensor
from runtime.exports.ends import end_of_reply
from runtime.saving.store import naming

SHARD_SIZE = 5_000_000_000  # bytes; what the hub's own tools write
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Entry:
    """A tensor of the folder: a part of one of ours, whose name in the state dict `source` is."""

    name: str
    source: str
    part: tuple[slice, ...]
    shape: tuple[int, ...]

    def read(self, tensors: Mapping, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of it."""
        first, *rest = self.part[-len(self.shape) :]
        rows = slice(first.start + begin, first.start + end)
        index = (*self.part[: -len(self.shape)], rows, *rest)
        return tensors[self.source][index].reshape(end - begin, *self.shape[1:])


def export_hf(
    config: LMConfig,
    tensors: Mapping[str, torch.Tensor] | Mapping[str, LazyTensor],
    tokenizer,
    folder: Path,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write the folder, tensor by tensor; it appears when all of it is written.

    Args:
        tensors: of the model's state dict, read in parts when they are written.
        tokenizer: with `folder`, whose files are copied.
        folder: must not exist, or be empty.
        dtype: of the weights, float32, bfloat16 or float16.
        shard_size: bytes of one file at most, but a tensor stays whole.

    Raises:
        ValueError: the folder holds something; no architecture computes this model; a value that
            the dtype does not hold.
        OSError: it could not be written; names the file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; name another folder, or remove it")
    ids = special_ids(tokenizer)
    described = config_to_hf(config, dtype=dtype, torch_dtype=dtype, **ids)
    building = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        write_json(building / "config.json", described)
        write_json(building / "generation_config.json", generation_config(tokenizer, ids))
        copy_tokenizer(tokenizer, building)
        write_weights(building, list_entries(config), tensors, dtype, shard_size)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def list_entries(config: LMConfig) -> list[Entry]:
    """The tensors of the folder: experts one by one, a tied head not at all."""
    entries = []
    for source, value in meta_model(config).state_dict().items():
        if source == "lm_head.weight" and config.tie_embeddings:
            continue
        for name, begins, size in file_names(source, tuple(value.shape), config, {}):
            part = tuple(slice(a, a + n) for a, n in zip(begins, size, strict=True))
            shape = size[1:] if ".experts." in source else size
            entries.append(Entry(name, source, part, shape))
    return entries


def write_weights(
    folder: Path, entries: list[Entry], tensors: Mapping, dtype: str, shard_size: int
) -> None:
    """Write the weights as one file, or as several with an index."""
    kind = getattr(torch, dtype)
    sizes = {entry.name: torch.Size(entry.shape).numel() * kind.itemsize for entry in entries}
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + sizes[entry.name] > shard_size:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += sizes[entry.name]
    names = ["model.safetensors"]
    if len(shards) > 1:
        n = len(shards)
        names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        files = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(folder / "model.safetensors.index.json", index)
    with byte_bar(sum(sizes.values()), "writing weights") as bar:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard, tensors, kind, bar)


def write_safetensors(
    path: Path, entries: list[Entry], tensors: Mapping, dtype: torch.dtype, bar: tqdm
) -> None:
    """Write one file, a chunk of a tensor at a time; see `hf_files.read_safetensors`."""
    kind = next(name for name, value in DTYPES.items() if value == dtype)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        size = torch.Size(entry.shape).numel() * dtype.itemsize
        shape = list(entry.shape)
        header[entry.name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with naming(path), open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            rows = max(1, CHUNK_BYTES // max(1, 4 * torch.Size(entry.shape[1:]).numel()))
            for begin in range(0, entry.shape[0], rows):
                value = entry.read(tensors, begin, min(begin + rows, entry.shape[0]))
                data = value.to(dtype).contiguous()
                if not data.isfinite().all():
                    fault = f"{entry.name} has values that {kind} does not hold"
                    raise ValueError(f"--dtype: {fault}; take bfloat16 or float32")
                file.write(data.view(torch.uint8).numpy().data)
                bar.update(data.nbytes)
        file.flush()
        os.fsync(file.fileno())


def special_ids(tokenizer) -> dict:
    """The ids that generation asks for: where a reply begins and ends, and what pads.

    A tokenizer without a padding token pads with the end of a text, as transformers would.
    """
    end = end_of_reply(tokenizer)
    pad = tokenizer.pad_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end}
    return {**ids, "pad_token_id": end if pad is None else pad}


def generation_config(tokenizer, ids: dict) -> dict:
    """What the tokenizer's folder says of generation, ended by its ends and ours."""
    known = {}
    path = Path(tokenizer.folder) / "generation_config.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {key: value for key, value in known.items() if not key.startswith("_")}
    ends = known.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([ids["eos_token_id"], *ends]))
    return {**known, **ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def copy_tokenizer(tokenizer, folder: Path) -> None:
    """The tokenizer's files, with the chat template that counts."""
    source = Path(tokenizer.folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    template, path = tokenizer.chat_template, folder / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if described.get("tokenizer_class") == "TokenizersBackend":  # older programs do not know that
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        described.pop("chat_template", None)  # one place alone says it
    elif template:  # several, by name
        described["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    write_json(path, described)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
