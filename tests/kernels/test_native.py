"""How C++ is compiled and called: misfits are errors, a failed compilation is not silent."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT

import kernels
from kernels import native
from model.lm import LMConfig, MiniMindLM
from runtime import compilation, kernel_loader
from runtime.distributed.fingerprint import kernels_in_use

CPU = torch.device("cpu")
SOURCES = ["ops.cpp", "attention.cpp", "linear.cpp", "cpu_decoder.cpp"]
has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")


def load(source: str, dtype: torch.dtype) -> native.Library | None:
    shape = {"LANES": 8, "DIM": 16, "KV": 2, "GROUP": 2} if source == "cpu_decoder.cpp" else {}
    return native.library(source, dtype, **shape)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_where_there_is_a_compiler_every_kernel_builds(source, dtype):
    if source == "linear.cpp" and dtype == torch.float32:
        pytest.skip("linear.cpp is for bfloat16")
    assert load(source, dtype) is not None, native.failures


@pytest.mark.parametrize("source", SOURCES)
def test_every_exported_function_declares_the_size_of_every_pointer(source):
    text = (native.FOLDER / source).read_text()
    functions = native.parse_prototypes(text, torch.bfloat16)
    exported = text[text.index('extern "C"') :]
    assert set(functions) == set(re.findall(r"^\w+ (\w+)\(", exported, re.MULTILINE))
    for name, arguments in functions.items():
        assert name == "has_products" or any(argument.dtype for argument in arguments), name
        assert all(argument.scalar or argument.size != "0" for argument in arguments), name


WRONG = {
    "another dtype": (
        lambda t: t | {"up": t["up"].bfloat16()},
        "up must be 12 numbers of torch.float32",
    ),
    "too short": (lambda t: t | {"out": t["out"][:3]}, "out must be 12 numbers"),
    "not contiguous": (lambda t: t | {"gate": t["gate"].view(3, 4).T}, "it is not contiguous"),
    "another device": (lambda t: t | {"gate": t["gate"].to("meta")}, "on meta"),
    "missing": (lambda t: t | {"up": None}, "up must be 12 numbers .* it is None"),
    "no number": (lambda t: t | {"n": 12.0}, "n must be of type int, it is 12.0"),
}


@needs_compiler
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_an_error_that_names_it(case):
    change, message = WRONG[case]
    arguments = {name: torch.zeros(12) for name in ("gate", "up", "out")} | {"n": 12}
    with pytest.raises(TypeError, match=f"swiglu: {message}|swiglu: .*{message}"):
        native.library("ops.cpp", torch.float32).swiglu(*change(arguments).values())


@needs_compiler
def test_swapped_and_missing_arguments_are_errors():
    functions = native.library("ops.cpp", torch.bfloat16)
    x, gain, scales = torch.zeros(3, 8), torch.ones(8), torch.zeros(3)
    out = torch.zeros(3, 8, dtype=torch.bfloat16)
    functions.add_norm_float(x, None, x, gain, out, scales, 3, 8, 1e-6)
    for wrong in (
        (x, None, x, scales, out, gain, 3, 8, 1e-6),
        (out, None, x, gain, x, scales, 3, 8, 1e-6),
        (x, None, x, gain, out, scales, 8, 3, 1e-6),
        (x, None, x, gain, out, scales, 3, 8),
    ):
        with pytest.raises(TypeError, match="add_norm_float"):
            functions.add_norm_float(*wrong)
    with pytest.raises(IndexError, match="vocabulary of 5"):
        kernels.cross_entropy.cross_entropy(torch.zeros(2, 5), torch.tensor([1, 5]))


@needs_compiler
def test_kernels_are_compiled_once(tmp_path, monkeypatch):
    build = native.library.__wrapped__
    monkeypatch.setattr(native, "CACHE", tmp_path / "folder")
    first = build("ops.cpp", torch.float32)
    assert [*(tmp_path / "folder").iterdir()] == [first.path]
    monkeypatch.setattr(native.subprocess, "run", None)
    assert build("ops.cpp", torch.float32).path == first.path
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "CACHE", tmp_path / "file" / "folder")  # cannot be written to
    assert build("ops.cpp", torch.float32) is not None


@pytest.fixture
def anew(monkeypatch):
    """Libraries are looked for anew, here and for the tests that follow."""
    native.library.cache_clear()
    monkeypatch.setattr(native, "failures", {})
    yield
    native.library.cache_clear()


@needs_compiler
def test_a_failure_to_compile_is_shown_in_the_words_of_the_compiler(anew, monkeypatch, capfd):
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    for _ in range(2):
        found = kernels.apply(MiniMindLM(LMConfig(dim=32, n_heads=4)), CPU, torch.float32)
    # Command and answer, for two files, once.
    assert capfd.readouterr().err.count("-no-such-flag") == 4
    assert (
        found["norm"] == "ops.cpp does not compile"
        and found["attention"] == "attention.cpp does not compile"
    )
    assert "without norm, rope" in kernels.summary(found)


def test_the_switch(anew, monkeypatch):
    def apply(mode: str, dtype: str = "float32") -> MiniMindLM:
        monkeypatch.setenv("MINIMIND_KERNELS", mode)
        model = MiniMindLM(LMConfig(dim=32, n_heads=4))
        kernel_loader.apply_kernels(model, CPU, dtype)
        return model

    plain = apply("off")
    assert kernel_loader.report() == "kernels: none (MINIMIND_KERNELS=off)"
    assert kernels_in_use(CPU, "float32") == "off"
    fast = apply("auto")
    assert type(plain.lm_head) is not type(fast.lm_head)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    with pytest.raises(ValueError, match="MINIMIND_KERNELS=sometimes: must be auto, off, require"):
        apply("sometimes")
    with pytest.raises(ValueError, match="require: none; without norm.*no C\\+\\+ for float16"):
        apply("require", "float16")
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    apply("auto")
    assert "no C++ compiler: no-such-compiler is not installed" in kernel_loader.report()
    assert kernels_in_use(CPU, "float32") == "none in C++"
    with pytest.raises(ValueError, match="require: .*no-such-compiler"):
        apply("require")
    monkeypatch.setattr(kernel_loader, "FOLDER", ROOT / "no-such-folder")
    apply("auto")
    assert kernel_loader.report() == "kernels: none (the folder is missing)"
    with pytest.raises(ValueError, match="the folder kernels/ is missing"):
        apply("require")
    with pytest.raises(ValueError, match="--compile 1 needs kernels/"):
        monkeypatch.setenv("MINIMIND_KERNELS", "auto")
        compilation.compiling()


def test_kernels_import_without_a_compiler_for_cuda_and_quickly():
    """What only a GPU or torch.compile needs is not loaded on a CPU."""
    code = (
        "import sys, kernels; print([m for m in ('torch._dynamo', 'kernels.decode_graph') if m in"
        " sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_compiled_code_that_others_can_have_written_is_not_run(tmp_path, monkeypatch, capfd):
    """Neither from a folder that everybody may write to, nor such a file."""
    folder, loaded = tmp_path / "cache", []
    monkeypatch.setattr(native, "CACHE", folder)
    monkeypatch.setattr(native.subprocess, "run", lambda words, **options: Path(words[-1]).touch())
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: loaded.append(path) or path)
    native.library.cache_clear(), native.is_private.cache_clear()
    try:
        native.library("ops.cpp", torch.float32)
        (library,) = folder.glob("*.so")
        for mode in (0o777, 0o755):
            folder.chmod(mode)
            native.library.cache_clear(), native.is_private.cache_clear()
            native.library("ops.cpp", torch.float32)
            assert (loaded[-1] == str(library)) == (mode == 0o755)
        library.chmod(0o666)
        native.library.cache_clear()
        native.library("ops.cpp", torch.float32)
        assert loaded[-1] == str(library) and library.stat().st_mode & 0o777 != 0o666, (
            "compiled anew in its place"
        )
    finally:
        native.library.cache_clear(), native.is_private.cache_clear()
    assert capfd.readouterr().err.count("can be written by others") == 1
