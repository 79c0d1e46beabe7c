"""A model's shape as Hugging Face's config.json says it, and back.

A key that changes what the model computes is obeyed or refused by name. So every key of the file is
accounted for: taken over, one of those that change nothing, or refused.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from model import rope
from model.config import LMConfig
from model.hf_files import read_folder

# model_type -> architecture, and what sets it apart from a Qwen3
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"use_moe": True}),
    "qwen2": ("Qwen2ForCausalLM", {"qk_norm": False, "qkv_bias": True}),
    "llama": ("LlamaForCausalLM", {"qk_norm": False}),
    "mistral": ("MistralForCausalLM", {"qk_norm": False}),
    "minimind": ("MiniMindForCausalLM", {}),
}
ARCHITECTURES = {architecture: kind for kind, (architecture, _) in FAMILIES.items()}

# Keys that change nothing in what the model computes here: about files, other programs, training or
# generation.
HARMLESS = set(
    """
    architectures attn_implementation auto_map chunk_size_feed_forward dtype flash_attn id2label
    initializer_range max_sequence_length use_flash_attn
    is_llama_config keys_to_ignore_at_inference label2id max_window_layers model_type
    output_attentions output_hidden_states output_router_logits pretraining_tp problem_type
    return_dict seq_aux tokenizer_class torch_dtype torchscript transformers_version
    transformers.js_config unsloth_fixed unsloth_version use_bfloat16 use_cache
    do_sample length_penalty max_length max_new_tokens min_length num_beams num_beam_groups
    num_return_sequences diversity_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size
    repetition_penalty temperature top_k top_p typical_p tie_encoder_decoder
    """.split()
)
# Keys whose only value that we compute is this one: what is meant by another.
ONLY = {
    "hidden_act": ("silu", "its MLP has another activation"),
    "attention_bias": (False, "it has biases on o_proj, too"),
    "mlp_bias": (False, "it has biases in its MLPs"),
    "attention_dropout": (0, "attention without dropout is what runs here: 0 trains without it"),
    "rope_interleaved": (False, "it rotates other pairs"),
    "scoring_func": ("softmax", "its router works in another way"),
    "decoder_sparse_step": (1, "it mixes dense layers and mixtures of experts"),
    "mlp_only_layers": ([], "it mixes dense layers and mixtures of experts"),
    "partial_rotary_factor": (1, "it rotates a part of each head"),
    "quantization_config": (None, "its weights are quantised: take those that are not"),
    "attn_logit_softcapping": (None, "it caps its attention scores"),
    "final_logit_softcapping": (None, "it caps its logits"),
    "is_encoder_decoder": (False, "no decoder alone"),
    "add_cross_attention": (False, "no decoder alone"),
}
ROPE_KEYS = {"default": set(), **{kind: set.union(*keys) for kind, keys in rope.KEYS.items()}}
# What MiniMind means by inference_rope_scaling.
MINIMIND_ROPE = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "attention_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


class Keys:
    """The keys of a config.json, each to be accounted for."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():  # a pipe would be waited for
            fault = "there is no config.json, so it is no model in Hugging Face's format"
            raise ValueError(f"{path.parent}: {fault}")
        try:
            self.values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no valid JSON ({error})") from None
        if not isinstance(self.values, dict):
            raise ValueError(f"{path}: no JSON object")

    def refuse(self, key: str, reason: str) -> ValueError:
        value = json.dumps(self.values.get(key))
        value = value if len(value) < 80 else value[:76] + " ..."
        return ValueError(f"{self.path}: {key} {value} is not supported: {reason}")

    def take(self, key: str, kind: Callable, default=None):
        """The value of a key, which then is accounted for. ValueError: missing; another type."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path}: {key} is missing")
        fits = {int: type(value) is int, bool: type(value) is bool}
        if not fits.get(kind, type(value) in (int, float)):
            raise ValueError(f"{self.path}: {key} is {value!r}; wanted: {type(kind()).__name__}")
        self.values.pop(key, None)
        return kind(value)

    def finish(self) -> None:
        """Refuse what nobody took and may change the computation."""
        for key, (value, reason) in ONLY.items():
            if self.values.get(key) not in (None, value):
                raise self.refuse(key, reason)
        for key, value in self.values.items():
            known = key in HARMLESS or key in ONLY
            known = known or key.startswith("_") or key.endswith("_token_id")
            if not known and value not in (None, False, 0, "", [], {}):
                fault = "not a key that is known here; take it out if the model computes the same"
                raise self.refuse(key, f"{fault} without it")


def config_from_hf(folder: str | Path) -> LMConfig:
    """The shape of the model in a folder in Hugging Face's format.

    `max_seq_len` is what the file calls max_position_embeddings; `tokenizer` stays None.

    Raises:
        ValueError: the file is missing or damaged, or the model is one that we do not compute;
            names file, key and value.
    """
    keys = Keys(Path(folder) / "config.json")
    kind = family(keys)
    heads = keys.take("num_attention_heads", int)
    may_lack = kind in ("llama", "minimind") or "num_key_value_heads" in keys.values
    shape = {
        **FAMILIES[kind][1],
        "dim": keys.take("hidden_size", int),
        "n_layers": keys.take("num_hidden_layers", int),
        "n_heads": heads,
        "n_kv_heads": keys.take("num_key_value_heads", int, heads if may_lack else None),
        "vocab_size": keys.take("vocab_size", int),
        "max_seq_len": keys.take("max_position_embeddings", int),
        "norm_eps": keys.take("rms_norm_eps", float, 1e-6),
        "tie_embeddings": keys.take("tie_word_embeddings", bool, kind == "minimind"),
    }
    if kind == "qwen3" or keys.values.get("head_dim") is not None:
        shape["head_dim"] = keys.take("head_dim", int, 128)  # Qwen3's, whatever its hidden_size is
    if kind == "minimind":
        shape |= minimind_shape(keys, Path(folder), shape["dim"])
    else:
        shape["hidden_dim"] = keys.take("intermediate_size", int)
    if kind == "qwen3_moe":
        shape |= moe_shape(keys)
    refuse_windows(keys, kind, shape)
    shape["rope_theta"], shape["rope_scaling"] = read_rope(keys, kind, shape["max_seq_len"])
    keys.finish()
    try:
        return LMConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{keys.path}: {error}") from None


def family(keys: Keys) -> str:
    """The model_type, which `architectures` must agree with."""
    kind, named = keys.values.get("model_type"), keys.values.get("architectures")
    known = f"supported are {' '.join(ARCHITECTURES)}"
    if named is None:
        if kind not in FAMILIES:
            raise keys.refuse("model_type", known)
        return kind
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise keys.refuse("architectures", known)
    if kind not in (None, ARCHITECTURES[architecture]):
        raise keys.refuse("architectures", f"model_type is {kind!r}")
    return ARCHITECTURES[architecture]


def moe_shape(keys: Keys) -> dict:
    number = "num_local_experts" if "num_local_experts" in keys.values else "num_experts"
    return {
        "n_experts": keys.take(number, int),
        "n_experts_per_tok": keys.take("num_experts_per_tok", int),
        "moe_hidden_dim": keys.take("moe_intermediate_size", int),
        "norm_topk_prob": keys.take("norm_topk_prob", bool, False),
        "aux_loss_alpha": keys.take("router_aux_loss_coef", float, 0.001),
    }


def minimind_shape(keys: Keys, folder: Path, dim: int) -> dict:
    """What MiniMind's own checkpoints have beyond the rest: two generations of them.

    MiniMind2 has no QK-norm, which no key says: the tensors do. Its experts are as wide as its
    dense MLP and some of them are shared.
    """
    is_older = "n_routed_experts" in keys.values
    width = int(dim * 8 / 3) if is_older else dim * math.pi
    hidden = keys.take("intermediate_size", int, 64 * math.ceil(width / 64))
    shape = {
        "hidden_dim": hidden,
        "dropout": keys.take("dropout", float, 0.0),
        "use_moe": keys.take("use_moe", bool, False),
        "qk_norm": "model.layers.0.self_attn.q_norm.weight" in read_folder(folder),
    }
    experts = {"n_experts_per_tok": keys.take("num_experts_per_tok", int, 2 if is_older else 1)}
    if is_older:
        experts["n_experts"] = keys.take("n_routed_experts", int)
        experts["n_shared_experts"] = keys.take("n_shared_experts", int, 1)
        experts["moe_hidden_dim"] = hidden
        experts["aux_loss_alpha"] = keys.take("aux_loss_alpha", float, 0.01)
    else:
        experts["n_experts"] = keys.take("num_experts", int, 4)
        experts["moe_hidden_dim"] = keys.take("moe_intermediate_size", int, hidden)
        experts["aux_loss_alpha"] = keys.take("router_aux_loss_coef", float, 5e-4)
    norm = keys.take("norm_topk_prob", bool, True)
    # MiniMind2 leaves the weight of a single expert as it is.
    experts["norm_topk_prob"] = norm and not (is_older and experts["n_experts_per_tok"] == 1)
    return shape | experts if shape["use_moe"] else shape


def refuse_windows(keys: Keys, kind: str, shape: dict) -> None:
    """Refuse a sliding window that cuts anything off; one as wide as the context is none."""
    layers = keys.values.pop("layer_types", None)
    full = isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    if layers is not None and not full:
        keys.values["layer_types"] = layers
        raise keys.refuse("layer_types", "full attention in every layer is what runs here")
    window = keys.values.get("sliding_window")
    if kind == "mistral":  # a missing one is 4096
        is_active = window is not None or "sliding_window" not in keys.values
        window = window or 4096
    elif kind.startswith("qwen"):
        is_active = keys.values.get("use_sliding_window") is True and window is not None
        first = keys.values.get("max_window_layers") if kind != "qwen3_moe" else 0
        is_active = is_active and not (
            isinstance(first, int) and first >= shape["n_layers"] and layers is None
        )
    else:
        is_active = window is not None
    if is_active and not (isinstance(window, int) and window >= shape["max_seq_len"]):
        keys.values["sliding_window"] = window
        reason = f"attention sees the whole context of {shape['max_seq_len']} tokens here"
        raise keys.refuse("sliding_window", reason)
    keys.values.pop("sliding_window", None)
    keys.values.pop("use_sliding_window", None)


def read_rope(keys: Keys, kind: str, max_seq_len: int) -> tuple[float, dict | None]:
    """RoPE's base and scaling, of transformers 5's `rope_parameters` or the older two keys."""
    key = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    parameters = keys.values.get(key) or {}
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise keys.refuse(key, "one kind of rotary positions for all layers is what runs here")
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None)
    default = 1e6 if kind == "minimind" else 1e4
    theta = keys.take("rope_theta", float, default if theta is None else theta)
    if kind == "minimind" and not keys.take("inference_rope_scaling", bool, False):
        parameters = {}  # as its own code does
    elif kind == "minimind":
        parameters = {**MINIMIND_ROPE, **parameters}
    old_name = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or old_name or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise keys.refuse(key, f"of the kinds of rotary positions, {' '.join(ROPE_KEYS)} run here")
    if parameters.get("partial_rotary_factor") in (None, 1):
        parameters.pop("partial_rotary_factor", None)
    parameters = {name: value for name, value in parameters.items() if value is not None}
    if unknown := sorted(parameters.keys() - ROPE_KEYS[rope_type]):
        raise keys.refuse(key, f"{rope_type} has no {' '.join(unknown)} here")
    keys.values.pop("rope_scaling", None)
    keys.values.pop("rope_parameters", None)
    if rope_type == "default":
        return theta, None
    original = "original_max_position_embeddings"
    if original in ROPE_KEYS[rope_type]:  # written down: max_seq_len may become another one
        least = parameters.setdefault(original, max_seq_len)
        if type(least) not in (int, float) or least < 1:
            raise keys.refuse(key, f"{original} must be a number of tokens")
        parameters.setdefault("factor", max_seq_len / least)
    return theta, {"rope_type": rope_type, **parameters}


def config_to_hf(config: LMConfig, **more) -> dict:
    """config.json of a model: of a Qwen3, Qwen3-MoE, Qwen2, Llama, or MiniMind's own.

    RoPE stands there as transformers has read it since version 4: `rope_theta`, `rope_scaling`.

    Args:
        more: keys to add: dtype and the ids of special tokens.

    Raises:
        ValueError: no architecture computes this combination; says what is in the way.
    """
    kind = export_family(config)
    shape = {
        "architectures": [FAMILIES[kind][0]],
        "model_type": kind,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if kind.startswith("qwen"):
        shape["use_sliding_window"] = False
    if kind in ("qwen3", "qwen3_moe", "llama"):
        shape["attention_bias"] = False
    if kind == "llama":
        shape["mlp_bias"] = False
    if kind == "qwen3_moe":
        shape["num_experts"] = config.n_experts
        shape["moe_intermediate_size"] = config.moe_hidden_dim
        shape |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        shape["router_aux_loss_coef"] = config.aux_loss_alpha
    if kind == "minimind":
        shape |= {"use_moe": True, "intermediate_size": config.moe_hidden_dim}
        shape["n_routed_experts"] = config.n_experts
        shape["n_shared_experts"] = config.n_shared_experts
        shape["aux_loss_alpha"] = config.aux_loss_alpha
        shape |= {"scoring_func": "softmax", "dropout": config.dropout}
        shape["inference_rope_scaling"] = config.rope_scaling is not None
    if config.use_moe:
        shape["num_experts_per_tok"] = config.n_experts_per_tok
        shape["norm_topk_prob"] = config.norm_topk_prob
    return {**shape, **more}


def export_family(config: LMConfig) -> str:
    """The model_type that computes what this model does. ValueError: there is none."""
    if config.use_moe and config.qk_norm and not config.n_shared_experts and not config.qkv_bias:
        return "qwen3_moe"
    if config.use_moe:  # MiniMind2's: every expert is as wide as its dense MLP would be
        fits = not config.qk_norm and not config.qkv_bias
        if fits and config.dim == config.head_dim * config.n_heads:
            return "minimind"
        fault = "mixtures of experts with QK-norm and no shared experts become Qwen3-MoE, those"
        fault += " without QK-norm MiniMind; this one has"
        what = f"qk_norm {config.qk_norm}, n_shared_experts {config.n_shared_experts}"
        raise ValueError(f"{fault} {what}, qkv_bias {config.qkv_bias}, head_dim {config.head_dim}")
    if config.qk_norm and config.qkv_bias:
        raise ValueError("qk_norm and qkv_bias together: no architecture of transformers has both")
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    if config.dim % config.n_heads:
        fault = f"dim {config.dim} is not a multiple of n_heads {config.n_heads}"
        raise ValueError(f"{fault}: a Llama's must be, and without QK-norm it would be one")
    return "llama"
