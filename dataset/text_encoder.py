"""Text to ids in which no text can spell a control token.

A tokenizer turns the spelling of a control token into its id wherever it stands, also in what a
user wrote. Here every control token has a random name of its own instead: whoever writes control
text asks for it with `rename`, and other text cannot know it. Everything else about the tokenizer
stays, so the ids of a text that spells no control token are those that the tokenizer itself gives.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

TAG = re.compile(r"\s*[<\[].*[>\]]\s*", re.DOTALL)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer whose control tokens have random names. Can be pickled.

    backend: the tokenizer. names: control token -> its name. ids: control token -> its id.
    tokens: finds control tokens in a text.
    """

    backend: Tokenizer
    names: dict[str, str]
    ids: dict[str, int]
    tokens: re.Pattern

    def __call__(self, text: str) -> list[int]:
        """Ids of a text; what spells a control token in it stays text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def rename(self, text: str) -> str:
        """Control text with the names of its control tokens, which encode to their ids."""
        return self.tokens.sub(lambda match: self.names[match[0]], text)


def text_encoder(tokenizer) -> TextEncoder:
    """The encoder of a transformers tokenizer.

    Raises:
        ValueError: the tokenizer is not a BPE of the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model, added = spec["model"], spec.get("added_tokens", [])
    if model.get("type") != "BPE":
        kind = model.get("type") or "slow"
        supported = "only fast BPE tokenizers are supported (Qwen, Llama, SmolLM2, our own)"
        raise ValueError(f"{type(tokenizer).__name__} is a {kind} tokenizer: {supported}")
    control = [token for token in added if is_control(token)]
    nonce = secrets.token_hex(8)
    names = {token["content"]: f"{nonce}{n:05}" for n, token in enumerate(control)}
    ids = {token["content"]: token["id"] for token in control}
    longest_first = sorted(control, key=lambda token: -len(token["content"]))
    pattern = re.compile("|".join(map(_pattern, longest_first)) or "(?!)")
    # Every added token is an entry of the model under its id, so that none gets another. What the
    # model knew under the old name, and the merges that make it, leave it.
    taken = {token["id"] for token in added}
    vocab = {t: n for t, n in model["vocab"].items() if t not in names and n not in taken}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
        vocab[token["content"]] = token["id"]
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [m for m in merges if all(t in vocab for t in (m[0], m[1], m[0] + m[1]))]
    unknown = names.get(model.get("unk_token"), model.get("unk_token"))
    model["vocab"], model["unk_token"] = vocab, unknown if unknown in vocab else None
    spec.update(post_processor=None, truncation=None, padding=None)
    return TextEncoder(Tokenizer.from_str(json.dumps(spec)), names, ids, pattern)


def is_control(token: dict) -> bool:
    """Whether an added token is control, not text: it is special, or looks like a tag.

    Text are words that someone added, and the runs of blanks of GPT-NeoX and Gemma.
    """
    return token["special"] or bool(TAG.fullmatch(token["content"]))


def _pattern(token: dict) -> str:
    pattern = re.escape(token["content"])
    return rf"(?<!\w){pattern}(?!\w)" if token["single_word"] else pattern
