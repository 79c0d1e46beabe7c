"""GGUF files in llama.cpp against the same weights here, in float32: token ids and logits of 50
texts, and of 50 chats that hold them.

The texts are paragraphs of the project's own pages, English and Chinese, and pieces of its code.
Without weights of yours the models are random ones, each with a tokenizer of its kind made of the
same pages: ours, a Qwen2 with biases, a Llama 3 with its rotary scaling, a Llama 2 with the
tokenizer of SentencePiece, a Qwen3-MoE, a YaRN. The weights are large enough that logits are far
apart.

    python benchmarks/gguf_parity.py                                   # where llama_cpp is installed
    python benchmarks/gguf_parity.py --python /opt/llama/bin/python    # the Python that has it
    python benchmarks/gguf_parity.py --weights out/full_sft_512.pth ~/SmolLM2-135M-Instruct
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.toy_tokenizers import byte_level, sentencepiece
from model.config import LMConfig
from model.lm import MiniMindLM
from runtime.exports.compare import check_gguf
from runtime.exports.gguf_file import DTYPES, export_gguf
from runtime.exports.source import open_source
from runtime.process import exits

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXT = {"original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, **CONTEXT}
PLAIN = {"qk_norm": False}
# Name: (fields of LMConfig, tokenizer)
MODELS = {
    "ours": ({}, None),
    "ours, yarn": ({"rope_scaling": YARN}, None),
    "Qwen3-MoE": ({"use_moe": True}, ("qwen2", byte_level)),
    "Qwen2": ({**PLAIN, "qkv_bias": True}, ("qwen2", byte_level)),
    "Llama 3": (
        {**PLAIN, "tie_embeddings": False, "rope_scaling": {**LLAMA3, **CONTEXT}},
        ("llama3", byte_level),
    ),
    "SmolLM": ({**PLAIN, "n_heads": 9, "n_kv_heads": 3, "dim": 144}, ("smollm", byte_level)),
    "Llama 2": ({**PLAIN, "tie_embeddings": False}, ("llama2", sentencepiece)),
}


def sample_texts() -> list[str]:
    """50 texts: 20 English, 15 Chinese, 15 of code."""
    kinds = (("docs/en/walk.md", 20), ("docs/zh/walk.md", 15), ("model/lm.py", 15))
    texts = []
    for name, count in kinds:
        pieces = (ROOT / name).read_text(encoding="utf-8").split("\n\n")
        pieces = [piece[:400] for piece in pieces if len(piece) > 40]
        texts += pieces[:: max(1, len(pieces) // count)][:count]
    return texts


def make_weights(name: str, folder: Path) -> tuple[Path, str | None]:
    """A model of random weights, as a .pth file, and the folder of its tokenizer."""
    fields, make_tokenizer = MODELS[name]
    path, tokenizer_dir, vocab_size = folder / "weights.pth", None, 6400
    if make_tokenizer:
        kind, make = make_tokenizer
        tokenizer_dir = str(folder / "tokenizer")
        vocab_size = make(Path(tokenizer_dir), kind, vocab_size=2000) + 24  # padded, as Qwen's are
    shape = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 1024}
    config = LMConfig(**{**shape, "vocab_size": vocab_size, **fields})
    torch.manual_seed(0)
    model = MiniMindLM(config)
    for key, parameter in model.named_parameters():
        centre = 1.0 if "norm" in key else 0.0
        spread = 0.3 if parameter.dim() == 1 else 0.1
        torch.nn.init.normal_(parameter, centre, spread)
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(config.to_json())
    return path, tokenizer_dir


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", nargs="*", help="a .pth or a folder in Hugging Face's format")
    parser.add_argument("--python", default=sys.executable, help="the Python that has llama_cpp")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["f32"])
    args = parser.parse_args()
    texts = sample_texts()
    failed = []
    for name in args.weights or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer_dir, weights = None, Path(name)
            if not args.weights:
                weights, tokenizer_dir = make_weights(name, Path(folder))
            source = open_source(weights, tokenizer_dir)
            for dtype in args.dtype:
                file = Path(folder) / "model.gguf"
                export_gguf(source, file, dtype)
                good, figures = check_gguf(file, source, texts, args.python)
                print(f"{name}, {dtype}: {figures}{'' if good else '  DIFFERS'}", flush=True)
                failed += [] if good else [name]
    return 1 if failed else 0


if __name__ == "__main__":
    exits.run(main)
