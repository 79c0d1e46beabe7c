"""The datasets of the stages: `SFTDataset` here, `PretrainDataset` of `pretrain_dataset.py`."""

from dataset.cached_dataset import CachedDataset, describe  # noqa: F401  # for the scripts
from dataset.tokenizer import load_tokenizer  # noqa: F401


class SFTDataset(CachedDataset):
    """Conversations: MiniMind, ShareGPT, Alpaca or OpenAI messages, as JSONL or one JSON array.

    The format is that of the first row. The loss mask covers the assistant turns with their
    end-of-turn tokens, but for those that say not to learn from them (weight, train or loss: 0); a row with
    no supervised token within max_length is dropped and counted.

    Args:
        max_length: longest row in tokens.
        loss_on: 'all' assistant turns, or only the 'last' one.
        data_path, tokenizer, cache_dir, skip_bad, curriculum: see `cached_dataset.CachedDataset`.
    """

    def __init__(
        self,
        data_path,
        tokenizer,
        max_length: int = 512,
        cache_dir=None,
        skip_bad: bool = False,
        loss_on: str = "all",
        curriculum: str = "none",
    ):
        def make_encoder():
            from dataset.sft_encoder import SFTEncoder

            return SFTEncoder(tokenizer, max_length, loss_on)

        options = {"max_length": max_length, "loss_on": loss_on}
        settings = (True, cache_dir, skip_bad, curriculum)
        super().__init__(data_path, tokenizer, options, make_encoder, *settings)


def __getattr__(name: str):
    """`PretrainDataset` is loaded for those who ask for it."""
    if name == "PretrainDataset":
        from dataset.pretrain_dataset import PretrainDataset

        return PretrainDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
