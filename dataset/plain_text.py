"""Text to ids with the tokenizer as it is, as long as no text spells one of its added tokens.

A tokenizer turns the spelling of a control token into its id wherever it stands, also in what a
user wrote. Hardly any text spells one. Where one does, `text_encoder.py` keeps it text.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer


class PlainText:
    """Encodes the texts of a data file.

    Attributes:
        ids: added token -> its id; control tokens are among them.
        added: finds added tokens in a text; None: the tokenizer is one for `text_encoder.py`.

    Raises:
        ValueError: the tokenizer is no fast BPE.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.added = tokenizer, None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        spec = json.loads(backend.to_str()) if backend is not None else {"model": {}}
        tokens = spec.get("added_tokens", [])
        self.ids = {token["content"]: token["id"] for token in tokens}
        # A normalizer, or a word beside it, may decide whether such a tokenizer sees a token.
        is_odd = spec.get("normalizer") or any(token["single_word"] for token in tokens)
        if spec["model"].get("type") != "BPE" or is_odd or not tokens:
            self.encoder.names  # noqa: B018  # says what is wrong with it before a row is read
            return
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, longest_first)))
        spec.update(post_processor=None, truncation=None, padding=None)
        self.backend = Tokenizer.from_str(json.dumps(spec))

    @cached_property
    def encoder(self):
        """The `TextEncoder` for any text."""
        from dataset.text_encoder import text_encoder

        return text_encoder(self.tokenizer)

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts; what spells a control token in them stays text."""
        if self.added is None or any(map(self.added.search, texts)):
            return self.encoder.batch(texts)
        return self.encode(texts)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts whose added tokens are meant: on all cores, as `TextEncoder.batch`."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
