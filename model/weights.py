"""Weights files: a plain state dict (NAME.pth) with the LMConfig beside it (NAME.json)."""

import hashlib
import os
import re
import stat
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from model.lm import LMConfig, MiniMindLM


def start_weights(
    model: MiniMindLM, from_weight: str | None, default: str, out_dir: str | Path, suffix: str
) -> str:
    """Load the weights that `--from_weight` means into the model; returns a line that says what
    happened.

    Args:
        from_weight: a stage name (`pretrain` is `{out_dir}/pretrain{suffix}.pth`), a path, 'none',
        or None for the
            stage `default` if its file is there.
        suffix: what the model's shape adds to a name, e.g. `_512` or `_512_moe`.

    Raises:
        ValueError: the file does not exist or does not fit.
    """
    if from_weight == "none":
        return "starting from random weights"
    name = from_weight or default
    path = (
        Path(name)
        if name.endswith(".pth") or "/" in name
        else Path(out_dir) / f"{name}{suffix}.pth"
    )
    if from_weight is None and not path.is_file():
        return f"starting from random weights: there is no {path}"
    load_weights(model, path, new_head=True)
    return f"starting from {path}"


def load_weights(model: MiniMindLM, path: str | Path, new_head: bool = False) -> None:
    """Load a weights file into the model; every name and shape must fit.

    Args:
        new_head: a reward model may take the decoder of a language model, its own head stays as it
        is.

    Raises:
        ValueError: the file is not a state dict, or was made for a model of another shape; names
        the first difference.
    """
    state, own = read_tensors(path), model.state_dict()
    if "score.weight" in state and "score.weight" not in own:
        raise ValueError(f"{path}: a reward model, a language model is wanted here")
    if new_head and "score.weight" in own and "score.weight" not in state:
        state["score.weight"] = own["score.weight"]
        state.pop("lm_head.weight", None)
    if model.config.tie_embeddings and "model.embed_tokens.weight" in state:
        embedding = state["model.embed_tokens.weight"]
        if not torch.equal(embedding, state.setdefault("lm_head.weight", embedding)):
            raise ValueError(
                f"{path}: lm_head.weight is not the embedding: its model has tie_embeddings false"
            )
    for name in [*own, *state]:
        if name not in state or name not in own:
            where = "the file" if name not in state else "the model"
            raise ValueError(
                f"{path}: made for another model: {where} has no {name}; check --n_layers,"
                " --use_moe"
            )
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{path}: made for a model of another shape: {name} is {tuple(state[name].shape)}"
                f" in the file and {tuple(value.shape)} here; check --dim, --n_heads, --n_kv_heads"
                " and the tokenizer"
            )
    model.load_state_dict(state)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """What a weights file holds, on the CPU. ValueError: there is none, or it is not a plain state
    dict."""
    if (
        Path(path).exists() and not Path(path).is_file()
    ):  # to open a pipe would wait for whoever writes to it
        raise ValueError(f"{path}: not a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such weights file; train that stage first, or see --from_weight"
        ) from None
    except (
        Exception
    ) as error:  # torch raises half a dozen types for a torn or foreign file, some without a text
        raise ValueError(f"{path}: not a weights file ({what_is_wrong(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a plain state dict of tensors")
    check_content(path)
    for name, value in state.items():
        if (
            not value.sum().isfinite() and not value.isfinite().all()
        ):  # a sum alone is faster, and may overflow
            raise ValueError(
                f"{path}: {name} has values that are not finite, so the model in it is broken"
            )
    return state


def check_content(path: str | Path) -> None:
    """Compare a weights file with the checksums in it: torch.save writes a ZIP file, which has a
    CRC-32 of each tensor.

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
        with (
            zipfile.ZipFile(path) as archive,
            ThreadPoolExecutor(4) as pool,
        ):  # zlib lets other threads run
            list(pool.map(check, archive.infolist()))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"{path}: damaged, its content is not what was saved ({error}); take another copy"
        ) from None


def what_is_wrong(error: Exception) -> str:
    """Why a file of tensors could not be loaded, in a few words; torch's own advise to run what
    stands in it."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is code and no data: a file of tensors is wanted"
    reason = text.split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
    return reason.splitlines()[0][:120]


def hash_weights(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 of names and bits of float32 weights, wherever they are: which weights these are."""
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def newest_weights(weight: str, out_dir: str | Path, flag: str = "--weight") -> Path:
    """The weights that a name means where the model's shape is not known: for chat, scoring and
    serving.

    Args:
        weight: a path, a run (`full_sft_512`), or a stage (`full_sft`), of which the newest run is
        taken. flag: what named them, for the error.

    Raises:
        ValueError: there are none; says what to run.
    """
    is_path = weight.endswith(".pth") or "/" in weight
    path = Path(weight) if is_path else Path(out_dir) / f"{weight}.pth"
    if path.is_file():
        return path
    if is_path:
        raise ValueError(f"{flag} {weight}: no such file")
    found = [other for other in Path(out_dir).glob("*.pth") if other.name.startswith(f"{weight}_")]
    if not found:
        remedy = f"run `python trainer/train_{weight}.py` first or name others with {flag}"
        raise ValueError(f"no {weight} weights in {out_dir}: {remedy}")
    return max(found, key=lambda other: other.stat().st_mtime)


def load_model(path: Path) -> MiniMindLM:
    """The model in a weights file, on the CPU, float32, in evaluation mode.

    Raises:
        ValueError: the configuration beside the file is missing, or one of the two is damaged.
    """
    config_path = path.with_suffix(".json")
    if not config_path.is_file():
        raise ValueError(
            f"{config_path}: missing; it holds the shape of the model in {path.name}, keep them"
            " together"
        )
    text = config_path.read_text(encoding="utf-8", errors="replace")
    if '"head": "score"' in text:
        raise ValueError(
            f"{path}: a reward model, which scores texts but writes none; name a language model"
        )
    if '"lora": {' in text:
        raise ValueError(
            f"{path}: an adapter: name its base model here, and the adapter with --lora"
        )
    model = MiniMindLM(LMConfig.from_json(config_path))
    load_weights(model, path)
    return model.eval()


def open_to_others(path: Path) -> bool:
    """Whether somebody else can have put code there, which must not be run.

    That is so where neither we, root nor the owner of this file own it, or where more may write to
    it than its owner and our own group.
    """
    found = path.stat()
    loose = stat.S_IWOTH if found.st_gid == os.getgid() else stat.S_IWOTH | stat.S_IWGRP
    return found.st_uid not in (0, os.getuid(), os.stat(__file__).st_uid) or bool(
        found.st_mode & loose
    )
