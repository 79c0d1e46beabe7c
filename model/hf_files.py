"""The weight files of a folder in Hugging Face's format: which they are, and what they hold."""

import json
import math
from pathlib import Path

from model.lazy_tensors import DTYPES, FileTensor, read_torch_file

HEADER_LIMIT = 100_000_000  # bytes of a safetensors file; the limit of its library, too


def weight_files(folder: Path) -> list[Path]:
    """The files with the model's weights: safetensors before pytorch_model.bin.

    Raises:
        ValueError: there are none, one is missing, or which are meant cannot be told.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return indexed_files(index)
        if name == "model.safetensors":
            others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
            if len(others) == 1:
                return others
            if others:
                fault = f"{len(others)} files *.safetensors, but no {index.name} that lists them"
                raise ValueError(f"{folder}: {fault}")
    fault = "no weights in it: a file *.safetensors or pytorch_model.bin is wanted"
    raise ValueError(f"{folder}: {fault}")


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # A name that leaves the folder would read what the user never gave.
        fits = bool(names) and all(Path(name).name == name for name in names)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{index}: not an index of weight files")
    for name in sorted(names):
        if not (index.parent / name).is_file():
            fault = f"missing; {index.name} names it, download it as well"
            raise ValueError(f"{index.parent / name}: {fault}")
    return [index.parent / name for name in sorted(names)]


def read_folder(folder: Path) -> dict[str, FileTensor]:
    """All tensors in a folder's weight files, under the files' own names.

    Raises:
        ValueError: see `weight_files`; a file is damaged, or two of them hold the same tensor.
    """
    tensors: dict[str, FileTensor] = {}
    for path in weight_files(folder):
        read = read_safetensors if path.suffix == ".safetensors" else read_torch_file
        for name, tensor in read(path).items():
            if name in tensors:
                raise ValueError(f"{path}: {name} is in {tensors[name].path.name}, too")
            tensors[name] = tensor
    return tensors


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """What a .safetensors file holds, from its header alone.

    Source: the format as the safetensors library documents it: 8 bytes with the length of a JSON
    header, the header, the tensors without a gap.

    Raises:
        ValueError: it is damaged, or a tensor has a type that no model here has.
    """
    damaged = "damaged, or no safetensors file"
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise ValueError(f"{path}: {damaged} ({size} bytes); take another copy")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (str(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
            places = sorted((begin, end) for *_, begin, end in entries.values())
            ends = [0, *(end for _, end in places)]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{path}: {damaged}: its header makes no sense") from None
    if [begin for begin, _ in places] != ends[:-1]:
        raise ValueError(f"{path}: {damaged}: its tensors overlap or leave gaps")
    if (told := 8 + length + ends[-1]) != size:
        fault = f"{size} bytes, {told} by its header"
        raise ValueError(f"{path}: {damaged}: {fault}; take another copy")
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        kind = DTYPES.get(dtype)
        if kind is None:
            raise ValueError(f"{path}: {name} is of type {dtype}; {' '.join(DTYPES)} can be read")
        if not all(type(n) is int and n >= 0 for n in shape) or end - begin != (
            math.prod(shape) * kind.itemsize
        ):
            raise ValueError(f"{path}: {damaged}: {name} is {shape} in {end - begin} bytes")
        tensors[name] = FileTensor(path, name, kind, shape, 8 + length + begin)
    return tensors
