"""Reading what others may have written as data: nothing in a run's folder can run code.

A pickle names the functions that build its objects, and may name any. Here it can name those of
DATA, beside tensors and plain data. A hash in a manifest protects from accidents alone: whoever
alters a file can write its hash as well.
"""

import contextlib
import io
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from model.weights_faults import explain_load

# Module -> classes and functions that do nothing but hold data.
DATA = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "torch": {
        "Size",
        "device",
        *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "deepspeed.runtime.fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
}
_load, _Unpickler = torch.load, pickle.Unpickler


class NotData(ValueError):
    """A file holds something else than it should; the message names it."""


class Unpickler(_Unpickler):
    """pickle.Unpickler for plain data and the names in DATA."""

    def find_class(self, module: str, name: str):
        if name not in DATA.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def load(path: str | Path, *keys: str) -> dict:
    """The dict in a file of torch.save, on the CPU.

    Args:
        keys: what it must have.

    Raises:
        NotData: it is something else.
    """
    state = load_tensors(path, map_location="cpu")
    if not isinstance(state, dict):
        raise NotData(f"{path}: it holds a {type(state).__name__} instead of a dict")
    if missing := [key for key in keys if key not in state]:
        raise NotData(f"{path}: it is not of a run, it has no {missing[0]!r}")
    return state


def load_tensors(
    file, map_location=None, pickle_module=None, *, weights_only=None, mmap=None, **options
):
    """torch.load for tensors, plain data and the names in DATA, whatever the caller asks for.

    Raises:
        NotData: the file holds something else.
    """
    names = [
        (module, name) for module, names in DATA.items() if module in sys.modules for name in names
    ]
    known = [
        getattr(sys.modules[module], name)
        for module, name in names
        if hasattr(sys.modules[module], name)
    ]
    try:
        with torch.serialization.safe_globals(
            [value for value in known if not isinstance(value, torch.dtype)]
        ):
            return _load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen types for a torn or foreign file
        raise NotData(f"{name_of(file)}: {explain_load(error)}") from error


def load_pickle(file, **options):
    """pickle.load for plain data and the names in DATA. NotData: it is not that."""
    try:
        return Unpickler(file, **options).load()
    except Exception as error:
        raise NotData(f"{name_of(file)}: {explain_load(error)}") from error


def name_of(file) -> str:
    """The path of an open file, also of a part of one; of one in memory, that it is that."""
    if isinstance(file, str | Path):
        return str(file)
    return str(getattr(getattr(file, "base_stream", file), "name", "a part of a file"))


def reader(checkpoint: Path):
    """A FileSystemReader of torch.distributed.checkpoint, for tensors alone.

    What is none, it would unpickle; instead it raises NotData, which names the file.
    """
    from torch.distributed.checkpoint import FileSystemReader  # here, as it takes a second
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **options):
            path = checkpoint / ".metadata"
            with open(path, "rb") as file:
                metadata = load_pickle(file)
            try:
                entries = metadata.state_dict_metadata.values()
                places = [info.relative_path for info in metadata.storage_data.values()]
                is_valid = all(isinstance(entry, TensorStorageMetadata) for entry in entries)
                is_valid = is_valid and all(Path(place).name == place for place in places)
            except (AttributeError, TypeError):
                is_valid = False
            if not is_valid:
                raise NotData(f"{path}: it does not describe the tensors of a checkpoint")
            return metadata

        def read_data(self, plan, planner):
            files = sorted(
                {self.storage_data[item.storage_index].relative_path for item in plan.items}
            )
            try:
                return super().read_data(plan, planner)
            except OSError:
                raise
            except Exception as error:
                raise NotData(f"{checkpoint / ', '.join(files)}: {explain_load(error)}") from error

    return Reader(checkpoint)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is read: an error of a library becomes one that names the checkpoint.

    Raises:
        NotData: its content is not what was saved.
    """
    try:
        yield
    except (
        NotData,
        OSError,
        MemoryError,
        torch.OutOfMemoryError,
        torch.AcceleratorError,
        dist.DistError,
    ):
        raise
    except BaseException as error:
        failures = getattr(
            error, "failures", {}
        )  # of a CheckpointException, which is no Exception: rank -> its error
        if not isinstance(error, Exception) and not failures:
            raise
        first = next(iter(failures.values()))[0] if failures else error
        if isinstance(first, NotData | OSError):
            raise first from None
        why = f"{type(first).__name__}: {explain_load(first)}"
        raise NotData(
            f"{checkpoint}: cannot be read, it is not what was saved there ({why})"
        ) from error


@contextlib.contextmanager
def restricted(checkpoint: Path) -> Iterator[None]:
    """While another library reads a checkpoint: torch.load and pickle read data alone.

    Raises:
        NotData: a file holds something else, also where the library would go on without it.
    """
    refused = []

    def noting(function):
        def call(*args, **options):
            try:
                return function(*args, **options)
            except NotData as error:
                refused.append(error)
                raise

        return call

    places = [(torch, "load", noting(load_tensors)), (pickle, "Unpickler", Unpickler)]
    places += [(pickle, "load", noting(load_pickle))]
    places += [
        (pickle, "loads", noting(lambda data, **options: load_pickle(io.BytesIO(data), **options)))
    ]
    before, root = [getattr(place, name) for place, name, _ in places], logging.getLogger()
    level = root.level
    root.setLevel(
        logging.ERROR
    )  # torch warns, with a traceback, before it raises what becomes our line
    for place, name, function in places:
        setattr(place, name, function)
    try:
        with reading(checkpoint):
            yield
    finally:
        for (place, name, _), function in zip(places, before, strict=True):
            setattr(place, name, function)
        root.setLevel(level)
        if refused:
            raise refused[0]
