"""Split small models of other families over the ranks, and compare loss and gradients with those of
the whole model.

torchrun --nproc_per_node 2 tests/split_families.py
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from model.lm import LMConfig, MiniMindLM
from runtime.distributed.context_parallel import Context
from runtime.distributed.tensor_parallel import split_layers

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": {
        "qk_norm": False,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
        "tie_embeddings": False,
    },
    "qwen2": {"qk_norm": False, "qkv_bias": True},
}
LENS = [20, 9, 3]


def step(model: MiniMindLM, tokens: torch.Tensor, at: slice) -> dict[str, torch.Tensor]:
    """Loss on a part of the row's tokens, and the gradients of all parameters."""
    part = tokens[:, :-1][:, at] if model.context else tokens[:, :-1]
    positions = torch.arange(part.size(1))
    out = model(part, doc_lens=LENS, logits_at=positions, targets=tokens[0, 1:][at])
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return {"loss": out.loss.detach()} | whole


def compare(name: str, ours: dict, expected: dict) -> None:
    for key, value in ours.items():
        # the gradient of a bias on keys is 0 but for rounding
        scale = 1.0 if key.endswith("k_proj.bias") else expected[key].norm()
        assert (value - expected[key]).norm() <= 1e-5 * scale, (name, key)
    print(f"{name} equal", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    mesh, group = init_device_mesh("cpu", (2,)), dist.group.WORLD
    for name, shape in FAMILIES.items():
        torch.manual_seed(0)
        model = MiniMindLM(LMConfig(**TINY, **shape)).train()
        for key, p in model.named_parameters():
            torch.nn.init.normal_(p, mean=float(key.endswith("norm.weight")), std=0.1)
        tokens = torch.randint(96, (1, sum(LENS) + 1))
        tensor, context = copy.deepcopy(model), copy.deepcopy(model)
        expected = step(model, tokens, slice(None))
        split_layers(tensor, mesh)
        compare(f"{name} tensor parallel", step(tensor, tokens, slice(None)), expected)
        context.context = Context(group)
        parts = step(context, tokens, context.context.part(sum(LENS)))
        for value in parts.values():
            dist.all_reduce(value, group=group)
        compare(f"{name} context parallel", parts, expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
