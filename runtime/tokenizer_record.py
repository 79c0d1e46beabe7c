"""Weights know their tokenizer: what a run records of it in NAME.json.

What loads weights opens the tokenizer that is recorded: see `recorded_tokenizer`.
"""

import hashlib
from pathlib import Path

from dataset.tokenizer import LazyTokenizer, own_template

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "model/minimind_tokenizer"


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
