"""The tokenizer of given weights: what their NAME.json records, or what lies in their folder."""

from pathlib import Path

from dataset.tokenizer import OURS, ROOT, LazyTokenizer, file_hash, load_tokenizer, own_template

KEYS = ("folder", "sha256", "chat_template")


def open_tokenizer(
    weights: Path, recorded: dict | None, folder: str | None, chat_template: str | None
) -> tuple[LazyTokenizer, bool]:
    """The tokenizer of --tokenizer_dir; without the flag that of the weights.

    Args:
        weights: a file or a folder.
        recorded: see `find_record`.
        folder, chat_template: the flags.

    Returns:
        The tokenizer, and whether the vocabulary of the weights may be padded beyond it: not in
        weights of ours that do not say what tokenizer they were trained with.

    Raises:
        ValueError: it is not there, or another one than that of the weights.
    """
    record = find_record(weights, recorded)
    if not record:
        own = weights if weights.is_dir() else OURS
        return load_tokenizer(folder or own, chat_template), weights.is_dir()
    own = ROOT / record["folder"]  # an absolute one stays as it is
    place = Path(folder or own)
    if not (place / "tokenizer.json").is_file() or file_hash(place) != record["sha256"]:
        from runtime.tokenizer_faults import refuse_other

        refuse_other(place, own, weights, is_given=bool(folder))
    template = chat_template or record["chat_template"]
    return load_tokenizer(place, None if template == own_template(place) else template), True


def find_record(weights: Path, recorded: dict | None) -> dict | None:
    """The record of the tokenizer that weights were trained with; None: they have none.

    Args:
        recorded: `LMConfig.tokenizer` of the weights. A folder in Hugging Face's format has none,
            but may hold the tokenizer itself.

    Raises:
        ValueError: what is recorded is no record.
    """
    if not recorded and (weights / "tokenizer.json").is_file():
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
