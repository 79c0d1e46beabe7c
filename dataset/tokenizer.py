"""The tokenizer of a run: loaded late, and without its control tokens where it encodes text."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer


class LazyTokenizer:
    """The tokenizer in a folder, a `PreTrainedTokenizerFast` that is loaded on first use.

    With a warm cache a run does without: importing transformers takes a second or two.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.size = None  # the vocabulary's, where it is known without loading

    @functools.cached_property
    def loaded(self):
        # AutoTokenizer takes a second longer to import.
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.folder)
        except Exception as error:  # json's and tokenizers' errors share no class
            fault = f"tokenizer.json is damaged: {error}"
            raise ValueError(f"--tokenizer_dir {self.folder}: {fault}") from None

    def __getattr__(self, name: str):
        if name.startswith("__"):  # asked for by whoever copies it
            raise AttributeError(name)
        return getattr(self.loaded, name)

    def __len__(self) -> int:
        return self.size or len(self.loaded)


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> LazyTokenizer:
    """The tokenizer in a folder.

    Args:
        vocab_size: of the model that it is for, where that is there already.

    Raises:
        ValueError: there is none, or it has more entries than the model; on first use: it is
            damaged.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer_dir {folder}: there is no tokenizer.json")
    tokenizer = LazyTokenizer(folder)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        sizes = f"it has {len(tokenizer)} entries, the model {vocab_size}"
        advice = "take the tokenizer that the model was trained with"
        raise ValueError(f"--tokenizer_dir {folder}: {sizes}; {advice}")
    return tokenizer


@dataclass(frozen=True)
class PlainEncoder:
    """Text to ids, never to the id of an added token, whatever the text spells. Can be pickled."""

    backend: Tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def plain_encoder(tokenizer) -> PlainEncoder:
    """Copy a transformers tokenizer without its added tokens.

    Raises:
        ValueError: the tokenizer is not a BPE of the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = spec["model"]
    if model.get("type") != "BPE":
        supported = "only fast BPE tokenizers are supported (Qwen, Llama 3, our own)"
        raise ValueError(f"{type(tokenizer).__name__}: {supported}")
    # A token can be produced by the model only if the model lists it. So an added token that the
    # model lists as well leaves it too, with every merge that makes or uses it: then its id is out
    # of reach by construction.
    added = {token["content"] for token in spec["added_tokens"]}
    added_ids = {token["id"] for token in spec["added_tokens"]}
    vocab = {t: n for t, n in model["vocab"].items() if t not in added and n not in added_ids}
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["vocab"] = vocab
    model["merges"] = [m for m in merges if all(t in vocab for t in (m[0], m[1], m[0] + m[1]))]
    if model.get("unk_token") not in vocab:
        model["unk_token"] = None
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return PlainEncoder(Tokenizer.from_str(json.dumps(spec)))
