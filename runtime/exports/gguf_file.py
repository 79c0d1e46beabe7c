"""Write a model as one GGUF file, for llama.cpp and Ollama.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: metadata (shape,
tokenizer, chat template), a table of tensors, their bytes. Which names and keys an architecture has
follows llama.cpp's loader.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.progress import byte_bar
from model.config import LMConfig
from runtime.exports.source import Source
from runtime.saving.store import naming

DTYPES = ("f32", "f16", "bf16", "q8_0")
INSTALL = "pip install gguf"


def import_gguf():
    """The package that knows the format. ValueError: it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"to write a GGUF file takes the package gguf: {INSTALL}") from None
    return gguf


def export_gguf(source: Source, out: Path, dtype: str) -> None:
    """Write weights as a GGUF file, with a Modelfile for Ollama beside it.

    Args:
        out: the file, NAME.gguf; the Modelfile is NAME.Modelfile.
        dtype: of the matrices, one of DTYPES.

    Raises:
        ValueError: another ending, or something that llama.cpp does not compute; names it.
    """
    from runtime.exports.modelfile import write_modelfile

    if out.suffix != ".gguf" or out.is_dir():  # the Modelfile takes the name with another ending
        raise ValueError(f"{out}: must be a .gguf file")
    write_gguf(source.config, source.tensors, source.tokenizer, out, dtype)
    write_modelfile(source.tokenizer, source.config.max_seq_len, out)


def write_gguf(
    config: LMConfig, tensors: Mapping[str, Tensor], tokenizer, path: Path, dtype: str = "f32"
) -> None:
    """Write a model and its tokenizer into one file, tensor by tensor.

    Vectors (norms, biases) and the router of the experts stay float32, whatever the dtype.

    Args:
        tensors: name as in MiniMindLM's state dict -> tensor, which may be read when asked for.
        tokenizer: of transformers, with its chat template.
        dtype: of the matrices, one of DTYPES.

    Raises:
        ValueError: no such dtype, an architecture or a tokenizer that llama.cpp does not know, or
            a value that the dtype does not hold. The file is then not there, or the old one.
        OSError: it could not be written; names the file.
    """
    from runtime.exports.gguf_tokenizer import write_tokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: GGUF files are written as {', '.join(DTYPES)}")
    gguf = import_gguf()
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    writer = gguf.GGUFWriter(temporary, architecture(config))
    write_shape(writer, config, path.stem, dtype)
    write_tokenizer(writer, tokenizer, config.vocab_size)
    if is_llama3(config):
        tensors = {**tensors, ROPE_FACTORS: rope_factors(config)}
    plan = [(entry, type_of(entry, dtype)) for entry in list_entries(config)]
    sizes = [byte_size(entry.shape, kind) for entry, kind in plan]
    for (entry, kind), size in zip(plan, sizes, strict=True):
        writer.add_tensor_info(entry.name, entry.shape, None, size, gguf.GGMLQuantizationType[kind])
    try:
        with naming(path), byte_bar(sum(sizes), "writing weights") as bar:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (entry, kind), size in zip(plan, sizes, strict=True):
                writer.write_tensor_data(encode(entry.read(tensors), kind, entry.source))
                bar.update(size)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            temporary.unlink()


def architecture(config: LMConfig) -> str:
    """llama.cpp's name of what a config describes.

    Raises:
        ValueError: llama.cpp has no architecture that computes this; says what it is.
    """
    fault = None
    if config.qk_norm and config.qkv_bias:
        fault = "qk_norm together with qkv_bias"
    elif config.use_moe and config.n_shared_experts:
        fault = f"shared experts without a gate (n_shared_experts {config.n_shared_experts})"
    elif config.use_moe and not config.norm_topk_prob:
        fault = "experts whose weights do not sum to 1 (norm_topk_prob false)"
    elif config.use_moe and config.qkv_bias:
        fault = "experts together with qkv_bias"
    if fault:
        raise ValueError(f"{fault}: llama.cpp has no such architecture; export with to-hf instead")
    if config.qk_norm:
        return "qwen3moe" if config.use_moe else "qwen3"
    return "qwen2" if config.qkv_bias else "llama"


def write_shape(writer, config: LMConfig, name: str, dtype: str) -> None:
    """The metadata that says what the model computes."""
    from gguf import LlamaFileType

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    hidden = config.hidden_dim
    if config.use_moe:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_hidden_dim)
        if writer.arch == "llama":  # which has one width for both
            hidden = config.moe_hidden_dim
    writer.add_feed_forward_length(hidden)
    if config.rope_scaling:
        write_rope_scaling(writer, config.rope_scaling)


def write_rope_scaling(writer, scaling: dict) -> None:
    """The metadata of a longer context; kind llama3 is a tensor instead, see `rope_factors`.

    Raises:
        ValueError: llama.cpp has no key for one of the settings, or does not read it.
    """
    from gguf import RopeScalingType

    from model.rope import sharper

    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "llama3":
        if writer.arch != "llama":
            fault = f"llama.cpp computes it for Llama alone, and this is a {writer.arch}"
            raise ValueError(f"rope_scaling of kind llama3: {fault}; take yarn or linear")
        return
    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "linear":
        return
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # built into llama.cpp
    for key, value in fixed.items():
        if scaling.get(key) not in (None, value):
            fault = f"llama.cpp computes {value} for this architecture"
            raise ValueError(f"rope_scaling yarn with {key} {scaling[key]}: {fault}")
    attention = scaling.get("attention_factor")
    scales = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if attention is None and all(scales):
        attention = sharper(factor, scales[0]) / sharper(factor, scales[1])
    if attention is not None:  # the key is a factor on top of YaRN's own
        writer.add_rope_scaling_attn_factors(attention / sharper(factor))
    writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, and how it comes from ours."""

    name: str
    shape: tuple[int, ...]
    source: str
    part: tuple[int | None, int | None] = (None, None)  # from, to along the second dimension
    heads: int = 0  # a Llama's queries and keys, see `read`

    @property
    def keeps_float32(self) -> bool:
        return len(self.shape) == 1 or "ffn_gate_inp" in self.name

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, as the file has it but for its dtype."""
        lazy = tensors[self.source]
        value = lazy[:] if len(self.shape) == 1 else lazy[:, slice(*self.part)]
        if self.heads:  # llama.cpp rotates its pairs (x[2i], x[2i + 1]), we (x[i], x[i + D/2])
            value = value.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        assert value.shape == self.shape, (self.name, value.shape, self.shape)
        return value


def list_entries(config: LMConfig) -> Iterator[Entry]:
    """The tensors of the file, in its order."""
    dim, vocab = config.dim, config.vocab_size
    yield Entry("token_embd.weight", (vocab, dim), "model.embed_tokens.weight")
    if is_llama3(config):
        yield Entry("rope_freqs.weight", (config.head_dim // 2,), ROPE_FACTORS)
    for n in range(config.n_layers):
        block, ours = f"blk.{n}", f"model.layers.{n}"
        yield Entry(f"{block}.attn_norm.weight", (dim,), f"{ours}.input_layernorm.weight")
        yield from attention_entries(config, block, f"{ours}.self_attn")
        yield Entry(f"{block}.ffn_norm.weight", (dim,), f"{ours}.post_attention_layernorm.weight")
        yield from mlp_entries(config, block, f"{ours}.mlp")
    yield Entry("output_norm.weight", (dim,), "model.norm.weight")
    if not config.tie_embeddings:
        yield Entry("output.weight", (vocab, dim), "lm_head.weight")


def attention_entries(config: LMConfig, block: str, ours: str) -> Iterator[Entry]:
    D, dim = config.head_dim, config.dim
    rotates_pairs = architecture(config) == "llama"
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
    for name, H in heads.items():
        is_rotated = name != "v"
        order = H if rotates_pairs and is_rotated else 0
        source = f"{ours}.{name}_proj"
        yield Entry(f"{block}.attn_{name}.weight", (H * D, dim), f"{source}.weight", heads=order)
        if config.qkv_bias:
            yield Entry(f"{block}.attn_{name}.bias", (H * D,), f"{source}.bias")
        if config.qk_norm and is_rotated:
            yield Entry(f"{block}.attn_{name}_norm.weight", (D,), f"{ours}.{name}_norm.weight")
    yield Entry(f"{block}.attn_output.weight", (dim, config.n_heads * D), f"{ours}.o_proj.weight")


def mlp_entries(config: LMConfig, block: str, ours: str) -> Iterator[Entry]:
    dim, hidden = config.dim, config.hidden_dim
    if not config.use_moe:
        yield Entry(f"{block}.ffn_gate.weight", (hidden, dim), f"{ours}.gate_proj.weight")
        yield Entry(f"{block}.ffn_up.weight", (hidden, dim), f"{ours}.up_proj.weight")
        yield Entry(f"{block}.ffn_down.weight", (dim, hidden), f"{ours}.down_proj.weight")
        return
    E, hidden, stack = config.n_experts, config.moe_hidden_dim, f"{ours}.experts.gate_up_proj"
    gate, up, shape = (None, hidden), (hidden, None), (E, hidden, dim)
    yield Entry(f"{block}.ffn_gate_inp.weight", (E, dim), f"{ours}.gate.weight")
    yield Entry(f"{block}.ffn_gate_exps.weight", shape, stack, gate)
    yield Entry(f"{block}.ffn_up_exps.weight", shape, stack, up)
    yield Entry(f"{block}.ffn_down_exps.weight", (E, dim, hidden), f"{ours}.experts.down_proj")


ROPE_FACTORS = "rope_factors"  # a tensor that is computed, not read


def is_llama3(config: LMConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3"


def rope_factors(config: LMConfig) -> Tensor:
    """What llama.cpp divides the rotary frequencies by: (head_dim / 2,) float32."""
    from dataclasses import replace

    from model.rope import scaled_frequencies

    plain = replace(config, rope_scaling={"rope_type": "linear", "factor": 1.0})
    frequencies = (scaled_frequencies(c, torch.device("cpu"))[0] for c in (plain, config))
    return next(frequencies) / next(frequencies)


def type_of(entry: Entry, dtype: str) -> str:
    """The type that a tensor has in the file."""
    if entry.keeps_float32:
        return "F32"
    if (
        dtype == "q8_0" and entry.shape[-1] % 32
    ):  # its blocks have 32 values; llama.cpp does so, too
        return "F16"
    return dtype.upper()


def byte_size(shape: tuple[int, ...], kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return torch.Size(shape).numel() // values * size


def encode(value: Tensor, kind: str, name: str):
    """The bytes of a tensor as a numpy array.

    Raises:
        ValueError: a value is beyond float16.
    """
    if kind == "BF16":
        return value.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    value = value.float().contiguous()
    if kind == "F32":
        return value.numpy()
    if kind == "F16":
        if value.abs().amax() > torch.finfo(torch.float16).max:
            raise ValueError(f"{name}: has values beyond float16; export it as bf16 or f32")
        return value.half().numpy()
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(value.numpy(), GGMLQuantizationType[kind])
