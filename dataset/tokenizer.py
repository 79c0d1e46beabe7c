"""The tokenizer of a run, loaded late."""

import functools
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "model/minimind_tokenizer"
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
        own_template(self.folder)  # refuses one that cannot be read
        config = self.folder / "tokenizer_config.json"
        try:
            known = json.loads(config.read_bytes()) if config.is_file() else {}
            if known.get("tokenizer_class", GENERIC[0]) in GENERIC:
                from transformers import PreTrainedTokenizerFast

                tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
            else:
                from dataset.public_tokenizer import load_public

                tokenizer = load_public(self.folder)
        except Exception as error:  # json's and tokenizers' errors share no class
            from dataset.public_tokenizer import explain_damage

            raise explain_damage(self.folder, error) from None
        if self.given_template:
            tokenizer.chat_template = self.given_template
        return tokenizer

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
        from dataset.public_tokenizer import missing

        raise missing(folder)
    if not chat_template:
        return LazyTokenizer(folder)
    from dataset.given_template import read_template

    return LazyTokenizer(folder, *read_template(chat_template))


def own_template(folder: Path) -> str | None:
    """The chat template of a tokenizer folder, of several the one that is named "default".

    Raises:
        ValueError: it cannot be read; names the file.
    """
    path = folder / "chat_template.jinja"
    if not path.is_file():
        from dataset.public_tokenizer import config_template

        return config_template(folder)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: it is not UTF-8") from None


def record_of(tokenizer: LazyTokenizer) -> dict:
    """What NAME.json says of the tokenizer that weights were trained with.

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
