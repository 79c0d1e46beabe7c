"""Read a file of tensors, as torch.save writes it, with its checksums."""

import re
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
        ValueError: there is no such file, it is damaged, or it is not a plain state dict of finite
            floats.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # to open a pipe would wait for whoever writes to it
        raise ValueError(f"{path}: not a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        advice = "train that stage first, or see --from_weight"
        raise ValueError(f"{path}: no such weights file; {advice}") from None
    except Exception as error:  # half a dozen types for a torn or foreign file
        raise ValueError(f"{path}: not a weights file ({what_is_wrong(error)})") from None
    if not is_state_dict(state):
        raise ValueError(f"{path}: not a plain state dict of tensors")
    check_content(path)
    for name, value in state.items():
        if value.dtype not in FLOATS or value.layout != torch.strided:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} is of type {kind}; floats of 16 to 64 bits are read")
        # A sum alone is faster, and may overflow.
        if not value.sum().isfinite() and not value.isfinite().all():
            fault = f"{name} has values that are not finite, so the model in it is broken"
            raise ValueError(f"{path}: {fault}")
    return state


def is_state_dict(content: object) -> bool:
    """Whether it is a plain one: names and tensors, nothing else."""
    if not isinstance(content, dict):
        return False
    return all(isinstance(n, str) and isinstance(v, Tensor) for n, v in content.items())


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


def what_is_wrong(error: Exception) -> str:
    """Why a file of tensors could not be loaded, in a few words.

    torch's own advise to run what stands in it.
    """
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is code and no data: a file of tensors is wanted"
    reason = text.split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
    return reason.splitlines()[0][:120]
