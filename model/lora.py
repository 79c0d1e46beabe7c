"""LoRA: low-rank updates of frozen linear layers, and the adapter files that hold them.

An adapter is NAME.pth, a plain state dict of the low-rank factors alone (`...q_proj.lora_A`,
`...q_proj.lora_B`), with NAME.json beside it: the LMConfig of the base model, and under "lora" the
settings with a hash of the base weights.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from model.lm import LMConfig, MiniMindLM, blocks
from model.moe import Router
from model.tensor_file import read_tensors
from model.weight_hash import hash_weights
from model.weights import open_weights

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """W x + b + alpha / rank * B A dropout(x), where W, and b if there is one, are frozen.

    B starts at zero, so the layer starts as the one that it replaces. Names of the base weights
    stay as they are.
    Source: Hu et al., LoRA (2021), eq. 3, and section 4.1 for the start and the factor alpha /
    rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias  # the Parameters themselves
        self.scale, self.dropout, self.training = alpha / rank, dropout, base.training
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(base.out_features, rank))
        if not self.lora_A.is_meta:  # of a model that gets its values later
            nn.init.normal_(self.lora_A, std=base.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., rank)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low, self.lora_B)


def add_lora(
    model: MiniMindLM,
    targets: list[str] | None,
    rank: int,
    alpha: float,
    dropout: float,
    base_sha256: str | None = None,
) -> dict:
    """Freeze the model and give the targets a low-rank update, the only thing that then trains.

    Targets are linear layers inside the blocks: attention, the MLP, a shared expert of a mixture of
    experts. Its routed experts are stacked tensors without a layer of their own: they, like
    embedding, head and router, cannot be targets.

    Args:
        targets: names of layers, `q_proj`; None: those of TARGETS that the model has.
        base_sha256: `hash_weights` of a model that has no values yet.

    Returns:
        The settings, as `adapter_json` and `identity` take them.

    Raises:
        ValueError: a name that matches no layer; a rank, alpha or dropout that makes no sense.
    """
    if rank < 1:
        raise ValueError(f"--lora_rank {rank}: must be at least 1")
    if not alpha > 0:
        raise ValueError(f"--lora_alpha {alpha}: must be positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"--lora_dropout {dropout}: must lie in [0, 1)")
    # name -> (what holds it, the layer) in every block
    layers: dict[str, list[tuple[nn.Module, nn.Linear]]] = {}
    for block in blocks(model):
        for parent in block.modules():
            for name, layer in parent.named_children():
                if isinstance(layer, nn.Linear) and not isinstance(layer, Router):
                    layers.setdefault(name, []).append((parent, layer))
    if targets is None:
        targets = [name for name in TARGETS if name in layers]
    chosen = list(dict.fromkeys(targets))
    if missing := [name for name in chosen if name not in layers]:
        fault = f"the blocks of this model have {' '.join(layers)}"
        if model.config.use_moe:
            fault += "; routed experts are stacked tensors, which LoRA does not reach"
        raise ValueError(f"--lora_targets {' '.join(missing)}: {fault}")
    settings = {"rank": rank, "alpha": float(alpha), "dropout": dropout, "targets": chosen}
    settings["base_sha256"] = base_sha256 or hash_weights(model.state_dict())
    model.requires_grad_(False)
    for name in chosen:
        for parent, layer in layers[name]:
            setattr(parent, name, LoRALinear(layer, rank, alpha, dropout))
    return settings


def adapter_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that an adapter file holds."""
    ends = (".lora_A", ".lora_B")
    return {name: value for name, value in state_dict.items() if name.endswith(ends)}


def adapter_json(config: LMConfig, settings: dict) -> str:
    return json.dumps({**asdict(config), "lora": settings}, indent=2) + "\n"


def read_adapter(path: str | Path) -> tuple[LMConfig, dict, dict[str, Tensor]]:
    """An adapter file: the shape of its base model, its settings, its tensors.

    Raises:
        ValueError: one of the two files is missing, damaged, or not an adapter's.
    """
    path = Path(path)
    config_path = path.with_suffix(".json")
    if not config_path.is_file():
        fault = f"missing; it holds the settings of the adapter {path.name}"
        raise ValueError(f"{config_path}: {fault}")
    try:
        shape = json.loads(config_path.read_text(encoding="utf-8"))
        settings = shape.pop("lora")
        config = LMConfig(**shape)
        keys = ("rank", "alpha", "dropout", "targets", "base_sha256")
        settings = {key: settings[key] for key in keys}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = "it has no LoRA settings" if isinstance(error, KeyError) else error
        raise ValueError(f"{config_path}: not the configuration of an adapter ({reason})") from None
    return config, settings, read_tensors(path)


def merge_adapter(model: MiniMindLM, path: str | Path) -> LMConfig:
    """Add an adapter to the weights of its base model: W + alpha / rank * B A.

    One that was trained on scaled rotary positions brings these with it.

    Returns:
        The configuration of the adapter's base, with the record of its tokenizer.

    Raises:
        ValueError: not an adapter; it was trained on other weights, or does not fit the model.
    """
    config, settings, tensors = read_adapter(path)
    own, theirs = asdict(model.config), asdict(config)
    of_the_run = {"dropout", "max_seq_len", "aux_loss_alpha", "tokenizer", "rope_scaling"}
    shape = own.keys() - of_the_run
    if differing := sorted(name for name in shape if own[name] != theirs[name]):
        what = ", ".join(f"{name} {theirs[name]}, here {own[name]}" for name in differing)
        fault = f"an adapter for a model of another shape: {what}"
        raise ValueError(f"{path}: {fault}; name its base with --weight")
    state = model.state_dict()
    if hash_weights(state) != settings["base_sha256"]:
        fault = "an adapter for another base: it was trained on other weights"
        raise ValueError(f"{path}: {fault}; name those")
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    weights = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    wanted = sorted(name for name in weights if name.rpartition(".")[2] in settings["targets"])
    if layers != wanted or len(tensors) != 2 * len(layers):
        named = " ".join(settings["targets"])
        raise ValueError(f"{path}: its tensors are not those of the layers {named}")
    for layer in layers:
        A, B = tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"]
        weight, rank = state[f"{layer}.weight"], settings["rank"]
        if (*B.shape, *A.shape) != (len(weight), rank, rank, weight.size(1)):
            shapes = f"rank {rank}, B {tuple(B.shape)} and A {tuple(A.shape)}"
            fault = f"{layer} is {tuple(weight.shape)}, which does not fit {shapes}"
            raise ValueError(f"{path}: {fault}")
        weight += settings["alpha"] / rank * (B @ A)  # in the model itself
    if config.rope_scaling != model.config.rope_scaling:
        model.config.rope_scaling = config.rope_scaling
        model.config.max_seq_len = max(config.max_seq_len, model.config.max_seq_len)
    return config


def write_peft(path: str | Path, folder: str | Path, base: str) -> None:
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained` loads onto its base.

    Args:
        path: of the adapter.
        folder: is made; gets adapter_config.json and adapter_model.safetensors.
        base: where the exported base model is, for peft's own record.

    Raises:
        ValueError: see `read_adapter`.
    """
    from safetensors.torch import save_file

    _, settings, tensors = read_adapter(path)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "target_modules": settings["targets"],
        "inference_mode": True,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")
    named = {
        f"base_model.model.{name}.weight": value.contiguous() for name, value in tensors.items()
    }
    save_file(named, Path(folder) / "adapter_model.safetensors")


def hash_file(model: MiniMindLM, path: str | Path) -> str:
    """`hash_weights` of the model with the weights of a file or folder, read in parts."""
    digest, tensors = hashlib.sha256(), open_weights(model, path, lazily=True)
    for name in model.state_dict():
        digest.update(name.encode())
        for part in tensors[name].chunks():
            digest.update(part.float().numpy().data)
    return digest.hexdigest()
