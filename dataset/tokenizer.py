"""The tokenizer of a run, loaded late."""

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # all there is to it is tokenizer.json


class LazyTokenizer:
    """The tokenizer in a folder, one of transformers' fast ones, that is loaded on first use.

    With a warm cache a run does without: importing transformers takes a second or two.

    Attributes:
        given_template: a chat template instead of the folder's own; "": none.
        template_place: where the chat template is from, for messages.
        size: the vocabulary's, where it is known without loading.
    """

    def __init__(self, folder: str | Path, given_template: str = "", template_place: str = ""):
        self.folder = Path(folder)
        self.given_template = given_template
        own = self.folder / "chat_template.jinja"
        own = own if own.is_file() else self.folder / "tokenizer_config.json"
        self.template_place = template_place or str(own)
        self.size = None

    @functools.cached_property
    def loaded(self):
        known = read_tokenizer_config(self.folder)
        try:
            tokenizer = self._load(known)
        except Exception as error:  # json's and tokenizers' errors share no class
            reason = " ".join(str(error).split())
            damaged = (
                "tokenizer.json" if is_damaged(self.folder) else "a file beside tokenizer.json"
            )
            fault = f"{damaged} is damaged: {reason}"
            raise ValueError(f"--tokenizer_dir {self.folder}: {fault}") from None
        if self.given_template:
            tokenizer.chat_template = self.given_template
        return tokenizer

    def _load(self, known: dict):
        """As AutoTokenizer loads it, which takes a second longer to import.

        Args:
            known: of tokenizer_config.json.
        """
        if known.get("tokenizer_class", GENERIC[0]) in GENERIC or "auto_map" in known:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(self.folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def __getattr__(self, name: str):
        if name.startswith("__"):  # asked for by whoever copies it
            raise AttributeError(name)
        return getattr(self.loaded, name)

    def __len__(self) -> int:
        return self.size or len(self.loaded)


def load_tokenizer(folder: str | Path, chat_template: str | Path | None = None) -> LazyTokenizer:
    """The tokenizer in a folder.

    Args:
        chat_template: a file with a chat template instead of the tokenizer's own, or its text.

    Raises:
        ValueError: there is none; on first use: it is damaged.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        slow = next(Path(folder).glob("*.model"), None)
        advice = (
            f"; {slow.name} alone is a slow tokenizer: convert it to a fast one" if slow else ""
        )
        raise ValueError(f"--tokenizer_dir {folder}: there is no tokenizer.json{advice}")
    if not chat_template:
        return LazyTokenizer(folder)
    from dataset.given_template import read_template

    return LazyTokenizer(folder, *read_template(chat_template))


def is_damaged(folder: Path) -> bool:
    """Whether a folder's tokenizer.json itself cannot be loaded."""
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises nothing narrower
        return True
    return False


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
    own_template(folder, known)
    return known


def own_template(folder: Path, known: dict | None = None) -> str | None:
    """The chat template of a tokenizer folder, of several the one that is named "default".

    Args:
        known: of tokenizer_config.json, where that is read already.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: it is not UTF-8") from None
    known = read_tokenizer_config(folder) if known is None else known
    template = known.get("chat_template")
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
