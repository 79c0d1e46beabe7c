"""LMConfig: the shape of a model."""

import json
import math
from dataclasses import asdict, dataclass

# Far beyond any model: a damaged file must not have us build it
SIZE, LENGTH = 2**20, 2**31 - 1
LIMITS = {"dim": SIZE, "n_layers": 10_000, "n_heads": SIZE, "n_kv_heads": SIZE, "head_dim": SIZE}
LIMITS |= {"vocab_size": LENGTH, "hidden_dim": SIZE, "moe_hidden_dim": SIZE, "max_seq_len": LENGTH}


def require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


@dataclass
class LMConfig:
    """Shape of the model, saved as JSON beside the weights. ValueError: sizes that do not fit."""

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int | None = None  # default: dim / n_heads
    vocab_size: int = 6400
    hidden_dim: int | None = None  # inner width of SwiGLU; default: 8/3 dim, a multiple of 64
    max_seq_len: int = 512  # longest context in tokens
    rope_theta: float = 1e6
    rope_scaling: dict | None = None  # for a longer context: {"rope_type", "factor", ...}, as HF's
    qk_norm: bool = True  # RMSNorm on queries and keys: Qwen3; Llama and Qwen2 have none
    qkv_bias: bool = False  # on queries, keys and values: Qwen2
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dropout: float = 0.0  # on the output of every attention and MLP, in training only
    use_moe: bool = False
    n_experts: int = 4  # routed experts per layer
    n_experts_per_tok: int = 2  # routed experts that a token visits
    n_shared_experts: int = 0  # experts that every token visits; with 0 the model is a Qwen3-MoE
    moe_hidden_dim: int | None = None  # of one expert; default: hidden_dim / n_experts_per_tok
    norm_topk_prob: bool = True  # rescale the weights of the chosen experts to sum 1
    aux_loss_alpha: float = 0.01  # weight of the load-balancing loss
    tokenizer: dict | None = None  # that it was trained with: {"folder", "sha256", "chat_template"}

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            size = getattr(self, name)
            if size is not None and not 1 <= size <= most:
                fault = f"at least 1, it is {size}" if size < 1 else f"{most} at most, it is {size}"
                raise ValueError(f"{name} must be {fault}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be a number above 0, it is {value}")
        dim, heads, kv_heads = self.dim, f"n_heads {self.n_heads}", f"n_kv_heads {self.n_kv_heads}"
        if self.head_dim is None:
            fault = f"dim {dim} is not a multiple of {heads}: change one of them"
            require(dim % self.n_heads == 0, fault)
            self.head_dim = dim // self.n_heads
        fault = f"head_dim {self.head_dim} is odd; rotary positions need an even number"
        require(self.head_dim % 2 == 0, fault)
        require(self.n_heads % self.n_kv_heads == 0, f"{heads} is not a multiple of {kv_heads}")
        require(0.0 <= self.dropout < 1.0, f"dropout {self.dropout} must lie in [0, 1)")
        if self.rope_scaling is not None:
            from model.rope import check_rope_scaling

            self.rope_scaling = check_rope_scaling(self.rope_scaling, self.max_seq_len)
        self.hidden_dim = self.hidden_dim or 64 * math.ceil(dim * 8 / 3 / 64)
        width = self.hidden_dim / max(1, self.n_experts_per_tok)
        self.moe_hidden_dim = self.moe_hidden_dim or 8 * math.ceil(width / 8)
        if self.use_moe:
            chosen = f"n_experts_per_tok {self.n_experts_per_tok}"
            fault = f"{chosen} must lie in 1..{self.n_experts} (n_experts)"
            require(1 <= self.n_experts_per_tok <= self.n_experts, fault)
            fault = f"dim {dim} and moe_hidden_dim {self.moe_hidden_dim} must be multiples of 8"
            require(dim % 8 == self.moe_hidden_dim % 8 == 0, f"{fault} with MoE")

    def to_json(self) -> str:
        """The text of NAME.json, which `weights.config_from_json` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"
