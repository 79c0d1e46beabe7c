"""Rotary frequencies of a context that is longer than in pretraining: `LMConfig.rope_scaling`.

The dict has the keys of `rope_scaling` in a config.json of Hugging Face, and means the same.
MiniMind's own YaRN (`inference_rope_scaling`) is "yarn" with an attention_factor of 1.
"""

import math

import torch
from torch import Tensor

# Kind -> the keys that it needs, and those that it may have
KEYS = {
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def check_rope_scaling(scaling: dict, max_seq_len: int) -> dict | None:
    """The settings in full: the kind under "rope_type", the original context, no empty keys.

    Args:
        scaling: as a config.json has it; older ones name the kind "type".
        max_seq_len: the original context, where the settings do not name one.

    Returns:
        None: the kind "default", positions as they are.

    Raises:
        ValueError: a kind, a key or a number that we cannot compute with; names it.
    """
    scaling = {key: value for key, value in scaling.items() if value is not None}
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    if kind == "default" and not scaling:
        return None
    if kind not in KEYS:
        raise ValueError(
            f"rope_scaling of kind {kind!r} is not computed here, only {', '.join(KEYS)}"
        )
    needed, optional = KEYS[kind]
    if "original_max_position_embeddings" in needed:
        scaling.setdefault("original_max_position_embeddings", max_seq_len)
    if missing := sorted(needed - scaling.keys()):
        raise ValueError(f"rope_scaling {kind} lacks {', '.join(missing)}")
    if unknown := sorted(scaling.keys() - needed - optional):
        raise ValueError(f"rope_scaling {kind} has no key {', '.join(unknown)}: remove it")
    for key, value in scaling.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key != "truncate" and not (is_number and math.isfinite(value) and value >= 0):
            raise ValueError(f"rope_scaling {kind}: {key} must be a number, it is {value!r}")
    for key in sorted(needed):
        if scaling[key] < (1 if key == "factor" else 1e-9):
            raise ValueError(f"rope_scaling {kind}: {key} {scaling[key]} is too small")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        ends = f"low_freq_factor {scaling['low_freq_factor']}"
        fault = f"{ends} must be below high_freq_factor {scaling['high_freq_factor']}"
        raise ValueError(f"rope_scaling {kind}: {fault}")
    return {"rope_type": kind, **scaling}


def parse_rope_scaling(text: str, max_seq_len: int) -> dict:
    """The flag --rope_scaling, KIND:FACTOR or KIND:FACTOR:ORIGINAL_CONTEXT, as settings.

    The new max_seq_len is FACTOR x the original one.

    Args:
        max_seq_len: of the weights that a run starts from, the original context.

    Raises:
        ValueError: another form, an unknown kind, a factor below 1.
    """
    kind, _, rest = text.partition(":")
    factor, _, original = rest.partition(":")
    try:
        scaling: dict = {"rope_type": kind, "factor": float(factor)}
        context = int(original) if original else max_seq_len
    except ValueError:
        form = "KIND:FACTOR or KIND:FACTOR:ORIGINAL_CONTEXT, such as yarn:4"
        raise ValueError(f"--rope_scaling {text}: must be {form}") from None
    if kind != "linear":
        scaling["original_max_position_embeddings"] = context
    elif original:
        raise ValueError(f"--rope_scaling {text}: linear depends on no original context, drop it")
    if kind == "llama3":  # those of Llama 3.1
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    try:
        return check_rope_scaling(scaling, max_seq_len) or {}
    except ValueError as error:
        raise ValueError(f"--rope_scaling {text}: {error}") from None


def extend_context(config, text: str) -> None:
    """Give a config what the flag --rope_scaling says, with max_seq_len to match.

    Raises:
        ValueError: see `parse_rope_scaling`; positions are scaled already, and otherwise.
    """
    scaling, own = parse_rope_scaling(text, config.max_seq_len), config.rope_scaling
    if own is None:
        context = scaling.get("original_max_position_embeddings", config.max_seq_len)
        config.rope_scaling, config.max_seq_len = scaling, int(scaling["factor"] * context)
    elif any(own[key] != scaling[key] for key in ("rope_type", "factor")):
        have = f"{own['rope_type']}:{own['factor']:g}"
        fault = f"the weights have {have} already; leave the flag out"
        raise ValueError(f"--rope_scaling {text}: {fault}")


def scaled_frequencies(config, device: torch.device) -> tuple[Tensor, float]:
    """The rotary frequencies of a config with rope_scaling.

    The order of the operations is that of transformers: at position 32,768 the last bit of a
    frequency moves an angle by 0.002.

    Returns:
        (head_dim / 2,) float32, and the factor of all cosines and sines.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=device)
    periods = config.rope_theta ** (pairs / config.head_dim)
    scale = {"linear": linear, "llama3": llama3, "yarn": yarn}[config.rope_scaling["rope_type"]]
    return scale(periods, config, **config.rope_scaling)


def linear(periods: Tensor, config, factor: float, **_) -> tuple[Tensor, float]:
    """All positions divided by the factor.

    Source: Chen et al., Extending Context Window of Large Language Models via Positional
    Interpolation (2023), section 2.3.
    """
    return (1.0 / periods) / factor, 1.0


def llama3(
    periods: Tensor,
    config,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    **_,
) -> tuple[Tensor, float]:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between the two.

    Source: Llama 3.1's reference code, `apply_scaling`; the ramp is YaRN's (section 3.2), over the
    number of turns within the original context.
    """
    frequency = 1.0 / periods
    wavelength = 2 * math.pi / frequency
    turns = original_max_position_embeddings / wavelength
    ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - ramp) * frequency / factor + ramp * frequency
    slow = wavelength > original_max_position_embeddings / low_freq_factor
    fast = wavelength < original_max_position_embeddings / high_freq_factor
    return torch.where(slow, frequency / factor, torch.where(fast, frequency, between)), 1.0


def yarn(
    periods: Tensor,
    config,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float = 0,
    beta_slow: float = 0,
    mscale: float = 0,
    mscale_all_dim: float = 0,
    truncate: bool = True,
    **_,
) -> tuple[Tensor, float]:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between them; sharper attention.

    Slow are those with fewer than beta_slow turns in the original context, fast those with more
    than beta_fast; the ramp is one over the dimensions.

    Source: Peng et al., YaRN (2023), section 3.2 for the ramp, eq. 22 for the factor of attention;
    DeepSeek-V2 (2024), its reference code, for mscale.
    """
    dim, theta = config.head_dim, config.rope_theta

    def dimension(turns: float) -> float:  # the one that turns so often in the original context
        period = original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(theta))

    low, high = dimension(beta_fast or 32), dimension(beta_slow or 1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    steps = torch.arange(dim // 2, dtype=torch.float32, device=periods.device)
    kept = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    frequency = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = sharper(factor, mscale) / sharper(factor, mscale_all_dim)
    elif attention_factor is None:
        attention_factor = sharper(factor)
    return frequency, attention_factor


def sharper(factor: float, mscale: float = 1.0) -> float:
    """YaRN's sqrt(1 / t), eq. 22."""
    return 0.1 * mscale * math.log(factor) + 1.0
