"""Weights know their tokenizer: recorded in NAME.json, found and checked by whatever loads them."""

import hashlib
from pathlib import Path

from dataset.tokenizer import LazyTokenizer, load_tokenizer, own_template
from runtime.folders import ROOT

KEYS = ("folder", "sha256", "chat_template")
OURS = ROOT / "model/minimind_tokenizer"


def open_tokenizer(
    folder: str | None, chat_template: str | None, weights: Path | None, record: dict | None
) -> LazyTokenizer:
    """The tokenizer of --tokenizer_dir; without the flag that of the weights, else our own.

    Args:
        folder, chat_template: the flags.
        weights: a file or a folder, None for random ones.
        record: of `find_record`.

    Raises:
        ValueError: it is not there, or another one than that of the weights.
    """
    if not record:
        own = weights if weights is not None and weights.is_dir() else OURS
        return load_tokenizer(folder or own, chat_template)
    own = ROOT / record["folder"]  # an absolute one stays as it is
    place = Path(folder or own)
    if not (place / "tokenizer.json").is_file() or file_hash(place) != record["sha256"]:
        from runtime.tokenizer_faults import refuse_other

        refuse_other(place, own, weights, is_given=bool(folder))
    template = chat_template or record["chat_template"]
    return load_tokenizer(place, None if template == own_template(place) else template)


def find_record(weights: Path | None, recorded: dict | None) -> dict | None:
    """The record of the tokenizer that weights were trained with; None: they have none.

    Args:
        recorded: `LMConfig.tokenizer` of the weights. A folder in Hugging Face's format has none,
            but may hold the tokenizer itself.

    Raises:
        ValueError: what is recorded is no record.
    """
    if not recorded and weights is not None and (weights / "tokenizer.json").is_file():
        return {"folder": str(weights), "sha256": file_hash(weights), "chat_template": None}
    if recorded and not (isinstance(recorded, dict) and {*KEYS} <= recorded.keys()):
        fault = f'"tokenizer" must have {", ".join(KEYS)}'
        raise ValueError(f"the configuration of {weights}: {fault}; take another copy")
    return recorded


def check_size(tokenizer: LazyTokenizer, vocab_size: int, may_be_padded: bool) -> None:
    """ValueError: the model's vocabulary is not as large as the tokenizer, or padded beyond it."""
    entries = len(tokenizer)
    if entries > vocab_size or entries < vocab_size and not may_be_padded:
        sizes = f"it has {entries} entries, the model {vocab_size}"
        advice = "take the tokenizer that the model was trained with"
        raise ValueError(f"--tokenizer_dir {tokenizer.folder}: {sizes}; {advice}")


def record_of(tokenizer: LazyTokenizer) -> dict:
    """What NAME.json says of a tokenizer.

    `folder` is relative to the repository where it lies inside; `sha256` is that of its
    tokenizer.json; `chat_template` the text of the template that counts, None where there is none.
    """
    folder = Path(tokenizer.folder).resolve()
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    template = tokenizer.given_template or own_template(folder)
    return {"folder": str(place), "sha256": file_hash(folder), "chat_template": template}


def file_hash(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.json: all that text and ids depend on."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
