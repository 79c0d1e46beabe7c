"""Run a script on a made-up Apple GPU: fake_mps.py SCRIPT ARGS, with --device fakemps or auto.

Tensors "there" are wrappers around tensors of the CPU, on a device of their own (PrivateUse1, in
Python). Whatever an Apple GPU lacks is an error:
- float64 and complex128 (torch/csrc: "the MPS framework doesn't support float64");
- an operation that native_functions.yaml, which comes with torchgen, gives no kernel for MPS, nor
  one for any device;
- tensors of two devices in one operation, but for numbers, indices on the CPU and copies;
- copies that are not waited for: from memory that is not pinned they read what is there later
  (pytorch issues 139550, 189690).
In the project's own code the word mps is read as fakemps.
"""

import builtins
import importlib.abc
import importlib.machinery
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

ROOT = Path(__file__).resolve().parents[1]
NAME = "fakemps"
LACKING = (torch.float64, torch.complex128)
KERNELS = {
    "MPS",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
}
# Where tensors of two devices may meet: copies, and indices that torch brings along itself
MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
used: set[str] = set()


def mps_operators() -> set[str]:
    """Names of the operators that have a kernel for MPS, or one for any device."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {}  # name -> (words of its dispatch table, delegate, what is generated of it)
    for text in path.read_text(encoding="utf-8").split("\n- func: ")[1:]:  # yaml takes seconds
        table = re.search(r"\n  dispatch:\n((?:    .*\n?)+)", text)
        keys = [line.split(":")[0].split(",") for line in table[1].splitlines()] if table else []
        delegate = re.search(r"\n  structured_delegate: (\S+)", text)
        made = re.search(r"\n  autogen: (.*)", text)
        names = [word.strip() for word in made[1].split(",")] if made else []
        keys = {key.strip() for words in keys for key in words}
        entries[text.split("(")[0]] = keys, delegate and delegate[1], names

    def is_there(name: str) -> bool:
        keys, delegate, _ = entries[name]
        return is_there(delegate) if delegate else not keys or bool(keys & KERNELS)

    there = {name for name in entries if is_there(name)}
    return there.union(*(entries[name][2] for name in there))


class FakeTensor(torch.Tensor):
    """A tensor on the made-up device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        if held.dtype in LACKING:
            raise TypeError(f"the MPS framework has no {held.dtype}")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __setitem__(self, index, value) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        parts = (torch.tensor(part) if isinstance(part, list) else part for part in parts)
        super().__setitem__(tuple(parts), value)

    def tolist(self) -> list:
        return self.held.tolist()

    def numpy(self):
        raise TypeError("can't convert mps:0 device type tensor to numpy: copy it to the CPU first")

    def __repr__(self) -> str:
        return f"{NAME}({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args: tuple, kwargs: dict):
    """Compute on the CPU what is asked of either device."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, FakeTensor) for x in given)
    target = kwargs.get("device")
    to_there = there if target is None else torch.device(target).type == NAME
    if there or to_there:
        check(func, given, kwargs, to_there)
    held = tree_map_only(FakeTensor, lambda x: x.held, (args, dict(kwargs)))
    if target is not None and to_there:
        held[1]["device"] = torch.device("cpu")
    out = func(*held[0], **held[1])
    if not to_there:
        return out
    name = func._schema.name.removeprefix("aten::")
    if name == "copy_" and not isinstance(args[0], FakeTensor):
        return args[0]
    out = tree_map_only(
        torch.Tensor, lambda x: x if isinstance(x, FakeTensor) else FakeTensor(x), out
    )
    return return_and_correct_aliasing(func, args, kwargs, out)


def check(func, given: list, kwargs: dict, to_there: bool) -> None:
    """RuntimeError: what an Apple GPU cannot do."""
    name = func._schema.name.removeprefix("aten::")
    overload = f"{name}.{func._overloadname}".removesuffix(".default")
    used.add(overload)
    if func.namespace == "aten" and overload not in OPERATORS:
        raise RuntimeError(f"{overload} is not there on MPS")
    crosses = to_there != any(isinstance(x, FakeTensor) for x in given)
    if crosses and kwargs.get("non_blocking"):
        raise RuntimeError(f"{overload} with non_blocking: the source may be gone too early")
    if to_there and kwargs.get("dtype") in LACKING:
        raise TypeError(f"{overload}: the MPS framework has no {kwargs['dtype']}")
    here = [x for x in given if not isinstance(x, FakeTensor) and x.dim()]
    is_mixed = bool(here) and len(here) < len(given)
    indexes_here = "index" in name and not isinstance(given[0], FakeTensor)
    if is_mixed and (name not in MAY_MIX or indexes_here):
        raise RuntimeError(f"{overload}: found at least two devices, mps and cpu")


class Everywhere(TorchDispatchMode):
    """For what makes tensors, and has none to tell the device by."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to import it takes a second and a half

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_available(self) -> bool:
        return (
            False  # to torch.distributed.checkpoint, which asks so for such a device, not for MPS
        )

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        pass

    manual_seed = manual_seed_all

    def _is_in_bad_fork(self) -> bool:
        return False


def renamed(path: str) -> str:
    return re.sub(r"\bmps\b", NAME, Path(path).read_text(encoding="utf-8"))


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str):
        return compile(renamed(self.path), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        ours = spec is not None and (spec.origin or "").startswith(str(ROOT))
        if ours and ".venv" not in spec.origin and spec.origin.endswith(".py"):
            spec.loader = Loader(name, spec.origin)
        return spec if ours else None


def made_here(make):
    """A function that makes a tensor on the CPU, then brings it to its device."""

    def make_and_bring(data, *, device=None, **options):
        if isinstance(data, FakeTensor) or device is None or torch.device(device).type != NAME:
            return make(data, device=device, **options)
        return make(data, **options).to(device)

    return make_and_bring


def install() -> None:
    _setup_privateuseone_for_python_backend(NAME, Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    builtins.kept_library = library
    setattr(torch.backends, NAME, SimpleNamespace(is_available=lambda: True))
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `to` unties what is tied
    real = torch.Generator

    class Generator:
        def __new__(cls, device="cpu"):
            return real("cpu" if torch.device(device).type == NAME else device)

    torch.Generator = Generator
    for name in ("tensor", "as_tensor"):  # they copy where no mode sees it
        setattr(torch, name, made_here(getattr(torch, name)))
    # It asks for the device by its name before it takes a float64.
    path = Path(torch.amp.grad_scaler.__file__)
    scaler = path.read_text(encoding="utf-8").replace('"mps:0"', f'"{NAME}:0"')
    exec(compile(scaler, path, "exec"), torch.amp.grad_scaler.__dict__)
    torch.amp.GradScaler = torch.amp.grad_scaler.GradScaler
    sys.meta_path.insert(0, Finder())


OPERATORS = mps_operators()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    install()
    script = str(Path(sys.argv[0]).resolve())
    sys.path.insert(0, str(Path(script).parent))
    main = sys.modules["__main__"].__dict__
    names = {"__name__": "__main__", "__file__": script, "__builtins__": builtins}
    try:
        with Everywhere():
            exec(compile(renamed(script), script, "exec"), names)
    finally:
        print(f"{len(used)} operators on {NAME}", file=sys.stderr)
