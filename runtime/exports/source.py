"""What is exported: weights with their shape and the tokenizer that they were trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config import LMConfig
from model.weights import load_model, newest_weights
from runtime import tokenizer_record


@dataclass(frozen=True)
class Source:
    """Attributes: tensors: of the state dict, float32; tokenizer: a LazyTokenizer."""

    path: Path
    config: LMConfig
    tensors: Mapping
    tokenizer: object


def open_source(
    weights: str | Path,
    tokenizer_dir: str | None = None,
    chat_template: str | None = None,
    lora: str | None = None,
    out_dir: str | Path = "out",
) -> Source:
    """Open weights, a folder in Hugging Face's format, or either with an adapter merged into it.

    Args:
        weights: a path, a run, or a stage: its newest run; lora, an adapter, likewise.
        tokenizer_dir, chat_template: instead of what the weights name.

    Raises:
        ValueError: they are damaged or do not belong together; names the file.
    """
    path = newest_weights(str(weights), out_dir, "WEIGHTS")
    model = load_model(path)
    if lora is not None:
        from model.lora import merge_adapter

        merge_adapter(model, newest_weights(lora, out_dir, "--lora"))
    record = tokenizer_record.find_record(path, model.config.tokenizer)
    tokenizer = tokenizer_record.open_tokenizer(tokenizer_dir, chat_template, path, record)
    tokenizer_record.check_size(tokenizer, model.config.vocab_size, may_be_padded=True)
    return Source(path, model.config, model.state_dict(), tokenizer)
