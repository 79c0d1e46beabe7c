"""Tensors that stay in their files until they are asked for, whole or in part.

A plain read into memory that is there already: a memory map would count every page that it touches
on top of the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.tensor_file import load_state_dict

CHUNK_BYTES = 1 << 24  # read and converted at once

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

Range = tuple[int, int]  # begin and end along one dimension


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file: row-major, from a byte on."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def copy_to(self, out: Tensor, region: list[Range]) -> None:
        """Read a part into memory that is there, a chunk of rows at a time.

        Args:
            out: of the region's shape, any float dtype and device.
            region: a range along each dimension.

        Raises:
            ValueError: the file ends too early, or a value is not finite.
        """
        begin, end = region[0]
        row = math.prod(self.shape[1:]) * self.dtype.itemsize  # bytes
        if len(self.shape) > 2:
            for i in range(begin, end):
                part = replace(self, shape=self.shape[1:], offset=self.offset + i * row)
                part.copy_to(out[i - begin], region[1:])
            return
        step = max(1, CHUNK_BYTES // max(1, row))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + begin * row)
            for first in range(begin, end, step):
                rows = min(step, end - first)
                self.read_rows(file, out[first - begin : first - begin + rows], region[1:])

    def read_rows(self, file, out: Tensor, columns: list[Range]) -> None:
        whole = not columns or columns[0] == (0, self.shape[1])
        if whole and out.is_cpu and out.is_contiguous() and out.dtype == self.dtype:
            self.fill(file, out)
        else:
            rows = torch.empty(len(out), *self.shape[1:], dtype=self.dtype)
            self.fill(file, rows)
            out.copy_(rows if whole else rows[:, slice(*columns[0])])
        # A sum alone is faster, and may overflow.
        if not out.sum().isfinite() and not out.isfinite().all():
            fault = f"{self.name} has values that are not finite, so the model in it is broken"
            raise ValueError(f"{self.path}: {fault}")

    def fill(self, file, rows: Tensor) -> None:
        view = memoryview(rows.view(torch.uint8).numpy()).cast("B") if rows.numel() else b""
        done = 0
        while done < len(view):
            n = file.readinto(view[done:])
            if not n:
                raise ValueError(f"{self.path}: ends inside of {self.name}; take another copy")
            done += n


class LazyTensor:
    """A tensor put together of tensors of files: `tensor[a:b]`, `tensor[:, a:b]` read a part.

    Attributes:
        shape: of the whole.
        dtype: of what is read.
    """

    def __init__(self, shape: tuple[int, ...], pieces: list[tuple[FileTensor, list[Range]]]):
        """Args: pieces: tensors, each with as many dimensions, and the range that it fills."""
        self.shape, self.pieces = shape, pieces
        self.dtype = pieces[0][0].dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """A part, on the CPU, in the file's dtype; slices without a step only."""
        region = self.region(index)
        out = torch.empty([end - begin for begin, end in region], dtype=self.dtype)
        self.copy_to(out, index)
        return out

    def region(self, index: slice | tuple[slice, ...]) -> list[Range]:
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        ranges = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in ranges), index
        return [(begin, max(begin, end)) for begin, end, _ in ranges]

    @torch.no_grad()
    def copy_to(self, out: Tensor, index: slice | tuple[slice, ...] = ()) -> None:
        """Read the whole, or a part, into memory that is there: any float dtype and device.

        Raises:
            ValueError: see `FileTensor.copy_to`; the file is named.
        """
        region = self.region(index)
        for source, place in self.pieces:
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, place, strict=True)]
            if all(begin < end for begin, end in both):
                target = out
                for dim, ((begin, end), (start, _)) in enumerate(zip(both, region, strict=True)):
                    target = target.narrow(dim, begin - start, end - begin)
                inside = [(a - c, b - c) for (a, b), (c, _) in zip(both, place, strict=True)]
                source.copy_to(target, inside)

    def equal(self, other: "LazyTensor") -> bool:
        """Whether both have the same bits, compared in parts where they are not the same in a file."""
        (one, _), (two, _) = self.pieces[0], other.pieces[0]
        if (one.path, one.offset) == (two.path, two.offset):
            return True
        if self.shape != other.shape or self.dtype != other.dtype:
            return False
        return all(torch.equal(a, b) for a, b in zip(self.chunks(), other.chunks(), strict=True))

    def chunks(self) -> Iterator[Tensor]:
        """The whole in parts along dimension 0, each of about CHUNK_BYTES."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, row))
        for begin in range(0, self.shape[0], step):
            yield self[begin : begin + step]


def open_torch_file(path: Path) -> dict[str, LazyTensor]:
    """A weights file of ours, to be read in parts. ValueError: see `read_torch_file`."""
    tensors = read_torch_file(path)
    return {n: LazyTensor(t.shape, [(t, [(0, m) for m in t.shape])]) for n, t in tensors.items()}


def read_torch_file(path: Path) -> dict[str, FileTensor]:
    """What a file of torch.save holds, without its data, after a look at its checksums.

    Raises:
        ValueError: see `load_state_dict`; a tensor is not stored row by row.
    """
    tensors = {}
    for name, value in load_state_dict(path, "meta").items():
        # Where a storage begins in the file is set by torch.load onto the meta device alone.
        begin = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if begin is None or not value.is_contiguous():
            fault = f"{name} is stored in a form that cannot be read in parts"
            raise ValueError(f"{path}: {fault}; save the model as safetensors")
        offset = begin + value.storage_offset() * value.dtype.itemsize
        tensors[name] = FileTensor(path, name, value.dtype, tuple(value.shape), offset)
    return tensors
