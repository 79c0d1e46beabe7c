"""What is exported: weights with their shape and the tokenizer that they were trained with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.progress import byte_bar
from dataset.tokenizer import LazyTokenizer
from model.config import LMConfig
from model.hf import meta_model
from model.lazy_tensors import LazyTensor
from model.lm import MiniMindLM
from model.newest import newest_weights
from model.weights import allocate, load_model, open_weights, read_config
from runtime.recorded_tokenizer import check_size, open_tokenizer


@dataclass(frozen=True)
class Source:
    """Attributes: tensors: of the model's state dict, read in parts where they lie in files."""

    path: Path
    config: LMConfig
    tensors: Mapping[str, LazyTensor | torch.Tensor]
    tokenizer: LazyTokenizer

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of it in float32, a tied head as the embedding itself."""
        state = {}
        with self.read_bar() as bar:
            for name, tensor in self.tensors.items():
                if name == "lm_head.weight" and self.config.tie_embeddings:
                    state[name] = state["model.embed_tokens.weight"]
                else:
                    state[name] = tensor[:].float()
                bar.update(state[name].nbytes)
        return state

    def model(self) -> MiniMindLM:
        """The model on the CPU, float32, in evaluation mode."""
        model = meta_model(self.config)
        allocate(model, "cpu")
        with self.read_bar() as bar:
            for name, p in model.state_dict().items():
                p.copy_(self.tensors[name][:])
                bar.update(p.nbytes)
        return model.eval()

    def read_bar(self) -> tqdm:
        """The progress of reading all of it as float32."""
        values = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        return byte_bar(4 * values, f"reading {self.path.name}")


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
    if lora is None:
        model = meta_model(read_config(path))
        tensors = open_weights(model, path, lazily=True)
    else:
        from model.lora import merge_adapter

        model = load_model(path)
        merge_adapter(model, newest_weights(lora, out_dir, "--lora"))
        tensors = model.state_dict()
    config = model.config  # with an adapter's scaled positions, if it brings some
    tokenizer, _ = open_tokenizer(path, config.tokenizer, tokenizer_dir, chat_template)
    check_size(tokenizer, config.vocab_size, may_be_padded=True)
    return Source(path, config, tensors, tokenizer)
