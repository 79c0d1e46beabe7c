"""Tokenizers that others made: their configuration, and what is wrong with one that is damaged."""

import json
from pathlib import Path

from tokenizers import Tokenizer


def load_public(folder: Path):
    """The tokenizer of a folder as AutoTokenizer loads it, which takes a second longer to import.

    Raises:
        ValueError: tokenizer_config.json is damaged.
    """
    if "auto_map" in read_tokenizer_config(folder):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def explain_damage(folder: Path, error: Exception) -> ValueError:
    """What is wrong with a folder whose tokenizer does not load."""
    try:
        read_tokenizer_config(folder)
    except ValueError as fault:
        return fault
    damaged = "a file beside tokenizer.json"
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises nothing narrower
        damaged = "tokenizer.json"
    reason = " ".join(str(error).split())
    return ValueError(f"--tokenizer_dir {folder}: {damaged} is damaged: {reason}")


def missing(folder: str | Path) -> ValueError:
    """A folder has no tokenizer.json."""
    slow = next(Path(folder).glob("*.model"), None)
    advice = f"; {slow.name} alone is a slow tokenizer: convert it to a fast one" if slow else ""
    return ValueError(f"--tokenizer_dir {folder}: there is no tokenizer.json{advice}")


def read_tokenizer_config(folder: Path) -> dict:
    """tokenizer_config.json, empty where there is none. ValueError: damaged; names file and key."""
    path = folder / "tokenizer_config.json"
    try:
        known = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(known, dict):
        raise ValueError(f"{path}: no JSON object")
    if not isinstance(known.get("tokenizer_class", ""), str | None):
        raise ValueError(f"{path}: tokenizer_class is {known['tokenizer_class']!r}; wanted: a name")
    return known


def config_template(folder: Path) -> str | None:
    """The chat template in tokenizer_config.json, of several the one that is named "default".

    Raises:
        ValueError: it cannot be read; names the file.
    """
    template = read_tokenizer_config(folder).get("chat_template")
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        texts = template.values() if isinstance(template, dict) else [template]
        fits = all(text is None or isinstance(text, str) for text in texts)
    except (KeyError, TypeError):
        fits = False
    if not fits:
        fault = "chat_template must be a text, or a list of templates with name and template"
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {fault}")
    return template.get("default") if isinstance(template, dict) else template
