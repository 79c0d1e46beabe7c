"""Read a file of tensors, as torch.save writes it, with its checksums."""

import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """What a weights file holds, on the CPU: tensors that are the file itself, mapped into memory.

    Raises:
        ValueError: see `load_state_dict`; a value is not finite.
    """
    state = load_state_dict(Path(path), "cpu")
    for name, value in state.items():
        # A sum alone is faster, and may overflow.
        if not value.sum().isfinite() and not value.isfinite().all():
            fault = f"{name} has values that are not finite, so the model in it is broken"
            raise ValueError(f"{path}: {fault}")
    return state


def load_state_dict(path: Path, device: str) -> dict[str, Tensor]:
    """`torch.load` of a state dict, with its checksums compared.

    Args:
        device: "cpu": the file is mapped into memory; "meta": nothing is read.

    Raises:
        ValueError: there is no such file, it is damaged, or no plain state dict of floats.
    """
    if not path.is_file():  # to open a pipe would wait for whoever writes to it
        fault = "no such weights file; train that stage first, or see --from_weight"
        raise ValueError(f"{path}: {'not a file' if path.exists() else fault}")
    mmap = device == "cpu" and zipfile.is_zipfile(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # half a dozen types for a torn or foreign file
        from model.weights_faults import explain_load

        raise ValueError(f"{path}: not a weights file ({explain_load(error)})") from None
    items = state.items() if isinstance(state, dict) else [(None, state)]
    if not all(isinstance(n, str) and isinstance(value, Tensor) for n, value in items):
        raise ValueError(f"{path}: not a plain state dict of tensors")
    check_content(path)
    for name, value in state.items():
        kind = value.dtype if value.layout == torch.strided else value.layout
        if kind not in FLOATS:
            kind = str(kind).removeprefix("torch.")
            raise ValueError(f"{path}: {name} is of type {kind}; floats of 16 to 64 bits are read")
    return state


def check_content(path: Path) -> None:
    """Compare a file of torch.save with its own checksums: it is a ZIP file, with CRC-32s.

    They are in the file, not beside it: a run that is killed between two files cannot part weights
    and checksum.

    Raises:
        ValueError: what is in the file is not what was saved.
    """

    def check(record: zipfile.ZipInfo) -> None:
        if record.CRC:  # 0: torch was told to write none
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass

    if not zipfile.is_zipfile(path):
        fault = "written by a torch.save before 1.6, which cannot be read in parts"
        raise ValueError(f"{path}: {fault}; save the model as safetensors")
    try:
        # zlib lets other threads run.
        with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(4) as pool:
            records = archive.infolist()
            list(pool.map(check, records))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        fault = f"damaged, its content is not what was saved ({error})"
        raise ValueError(f"{path}: {fault}; take another copy") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path}: compressed, which torch.save never does; take another copy")
