"""Read a file of tensors, with its checksums."""

import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """What a weights file holds, on the CPU.

    Raises:
        ValueError: there is no such file, it is damaged, or it is not a plain state dict.
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
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a plain state dict of tensors")
    check_content(path)
    for name, value in state.items():
        # A sum alone is faster, and may overflow.
        if not value.sum().isfinite() and not value.isfinite().all():
            fault = f"{name} has values that are not finite, so the model in it is broken"
            raise ValueError(f"{path}: {fault}")
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

    try:
        # zlib lets other threads run.
        with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(4) as pool:
            list(pool.map(check, archive.infolist()))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        fault = f"damaged, its content is not what was saved ({error})"
        raise ValueError(f"{path}: {fault}; take another copy") from None


def what_is_wrong(error: Exception) -> str:
    """Why a file of tensors could not be loaded, in a few words.

    torch's own advise to run what stands in it.
    """
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is code and no data: a file of tensors is wanted"
    reason = text.split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
    return reason.splitlines()[0][:120]
