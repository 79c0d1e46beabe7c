"""How much memory a process of a run needs, by part, and which strategy fits the device.

Weights, gradients and optimizer state are float32; autocast makes copies of 2 bytes for the time of
a step. With n parameters per process (tensor parallelism divides the matrices) and N = data_ranks x
context_parallel, in bytes:

| part       | ddp                       | zero1  | zero2               | zero3           |
|------------|---------------------------|--------|---------------------|-----------------|
| parameters | 4 n                       | 4 n    | 4 n / N             | 4 n / N         |
| gradients  | 4 n                       | 4 n    | 4 n / N (*)         | 4 n / N (*)     |
| optimizer  | 8 n                       | 8 n/N  | 8 n / N             | 8 n / N         |
| buffers    | casts of the matrices,    | as ddp | a working copy of   | a copy of two   |
|            | second gradient of a tied |        | all weights         | blocks,         |
|            | embedding                 |        |                     | embedding, head |

(*) 4 n with accumulation: gradients are exchanged once per step.
"/ N" is what the fullest rank holds: zero1 deals out whole tensors, the largest first, each to the
rank with the least (torch's ZeroRedundancyOptimizer); zero2 and zero3 split the rows of every
tensor (FSDP2), of stacked experts the rows of each expert where they can be divided. Working copies
have two bytes a weight under autocast, embedding and head four beside their cast; with them go the
gradient of one block (or of the embedding) and its float32 message. DDP's buckets cost nothing:
gradients are views of them. With tensor parallelism ddp has a working copy, too.

Source: Rajbhandari et al., ZeRO (2020), sections 3 and 5, for weights, gradients and optimizer
state; Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2022),
section 4, for counting what the backward pass keeps, here by the operations of `model/lm.py`.
"""

import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from model.lm import LMConfig, MiniMindLM, chunk_size
from model.meta_device import on_meta_device
from runtime.launcher import read_launch
from runtime.machine import CONTROL_GROUP, meminfo
from runtime.optimizers.muon import is_block_matrix
from runtime.ranks import SHARDED

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
FLOAT = 4  # bytes of a float32
SAFE_SHARE = (
    0.9  # of the device: the rest is for the allocator's gaps and the communication library
)
GIB = 2**30


def parameter_shapes(config: LMConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter, a tied one once, from a model on the meta device."""
    # A reward model's configuration has more
    shape = {field.name: getattr(config, field.name) for field in fields(LMConfig)}
    return shapes_of(LMConfig(**shape).to_json())


@functools.cache
def shapes_of(config: str) -> dict[str, torch.Size]:
    with on_meta_device():
        return {
            name: p.shape
            for name, p in MiniMindLM(LMConfig(**json.loads(config))).named_parameters()
        }


def parameter_count(config: LMConfig) -> int:
    """Parameters of the model, exactly; tied weights count once, all experts count."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def adapter_size(config: LMConfig, targets: Sequence[str], rank: int) -> int:
    """Numbers of a LoRA adapter for layers of these names, in all blocks."""
    return sum(
        rank * sum(shape)
        for name, shape in parameter_shapes(config).items()
        if ".layers." in name and name.endswith(".weight") and name.split(".")[-2] in targets
    )


def adapter_parts(
    trained: int, strategy: str, ranks: int, accumulation_steps: int
) -> dict[str, float]:
    """Bytes of an adapter's numbers, their gradients and AdamW's state, per process."""
    sharded, share = strategy in SHARDED, trained / (1 if strategy == "ddp" else ranks)
    return {
        "parameters": FLOAT * (share if sharded else trained),
        "gradients": FLOAT * (share if sharded and accumulation_steps == 1 else trained),
        "optimizer": 2 * FLOAT * share,
    }


def estimate(
    config: LMConfig,
    strategy: str,
    *,
    data_ranks: int,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    tokens: int,
    supervised: int,
    dtype: str = "float32",
    optimizer: str = "adamw",
    gradient_checkpointing: int = 0,
    offload: bool = False,
    accumulation_steps: int = 1,
    trained: int | None = None,
) -> dict[str, int]:
    """Bytes per process at the peak of a step, by part, as in the table above.

    Args:
        strategy: one of STRATEGIES.
        data_ranks: processes that train on different rows.
        tokens: of one micro-batch, before context_parallel splits them.
        supervised: those of them that need logits.
        gradient_checkpointing: the level, see model/recompute.py; 0: everything is kept.
        optimizer: 'adamw' and 'lamb' keep two numbers per parameter, 'muon' one for each matrix
            inside the blocks.
        offload: zero2 and zero3 keep parameters, gradients and optimizer state in CPU memory
            ('host'); gradients that accumulate stay.
        accumulation_steps: micro-batches between two exchanges of gradients.
        trained: numbers of a LoRA adapter, beside which the model is frozen; None: it is trained.

    Returns:
        parameters, gradients, optimizer, activations, buffers, and total, their sum, in bytes of
        the device; host: bytes of CPU memory beside it.
    """
    assert strategy in STRATEGIES, strategy
    sharded, ranks = strategy in SHARDED, data_ranks * context_parallel
    width = FLOAT if dtype == "float32" else 2
    local, own = parameter_shares(config, ranks if sharded else 1, tensor_parallel)
    state = optimizer_state(config, own, optimizer)
    load = (config, tokens, supervised, width, tensor_parallel, context_parallel)
    parts = {
        "parameters": FLOAT * sum(own.values()),
        "gradients": FLOAT * sum((local if accumulation_steps > 1 else own).values()),
        "optimizer": fullest(state.values(), ranks) if strategy == "zero1" else sum(state.values()),
        "activations": activations(*load, gradient_checkpointing),
    }
    if trained is not None:
        adapter = adapter_parts(trained, strategy, ranks, accumulation_steps)
        parts |= adapter | {"parameters": parts["parameters"] + adapter["parameters"]}
    gathers = sharded or tensor_parallel > 1
    parts["buffers"] = buffers(config, local, width, gathers, keeps_all=strategy != "zero3")
    host = 0
    if offload and sharded:
        host = FLOAT * 2 * sum(own.values()) + parts["optimizer"]
        parts.update(parameters=0, optimizer=0)
        if accumulation_steps == 1:
            parts["gradients"] = 0
    parts = {part: round(size) for part, size in parts.items()}
    return {**parts, "total": sum(parts.values()), "host": round(host)}


def parameter_shares(
    config: LMConfig, shards: int, tensor_parallel: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each parameter, the numbers in this process' layers, and those that it keeps.

    Args:
        shards: processes over which FSDP2 splits rows; 1: none.
    """
    local, own = {}, {}
    for name, shape in parameter_shapes(config).items():
        divisor = tensor_parallel if splits(name, shape) else 1
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        local[name] = shape.numel() // divisor
        rows = shape[0] // (1 if by_columns else divisor)
        if len(shape) == 3 and shape[1] % shards == 0:  # experts: each is split
            rows = shape[1]
        own[name] = -(-rows // shards) * local[name] / rows
    return local, own


def optimizer_state(config: LMConfig, own: dict[str, float], optimizer: str) -> dict[str, float]:
    """Bytes that an optimizer keeps for each of a process' own parameters."""
    shapes = parameter_shapes(config)
    return {
        name: FLOAT * n * (1 if optimizer == "muon" and is_block_matrix(name, shapes[name]) else 2)
        for name, n in own.items()
    }


def buffers(
    config: LMConfig, local: dict[str, float], width: int, gathers: bool, keeps_all: bool
) -> float:
    """Bytes beside parameters, gradients, optimizer and activations: the last part of the table."""
    if gathers:
        return gathered_weights(config, local, width, keeps_all)
    return casts(config, local, width)


def gathered_weights(
    config: LMConfig, local: dict[str, float], width: int, keeps_all: bool
) -> float:
    """Bytes of working copies under FSDP2: of all weights, or of two blocks and what is no block."""
    groups: dict[str, float] = defaultdict(float)  # what is gathered together
    for name, n in local.items():
        groups[name.split(".")[2] if ".layers." in name else "rest"] += n
    rest, block = groups.pop("rest"), max(groups.values())
    blocks = sum(groups.values()) if keeps_all else min(2, config.n_layers) * block
    copies = width * blocks + FLOAT * rest + (0 if width == FLOAT else width * rest)
    return copies + max((width + FLOAT) * block, 2 * FLOAT * rest)


def casts(config: LMConfig, local: dict[str, float], width: int) -> float:
    """Bytes of what autocast and autograd add to whole parameters."""
    shapes = parameter_shapes(config)
    embedding = local["model.embed_tokens.weight"]
    matrices = sum(n for name, n in local.items() if splits(name, shapes[name]))
    matrices -= 0 if config.tie_embeddings else embedding  # a lookup is no matrix product
    size = 0 if width == FLOAT else width * matrices
    # Autograd adds up both gradients of a tied embedding beside .grad
    return size + (FLOAT * embedding if config.tie_embeddings else 0)


def splits(name: str, shape: torch.Size) -> bool:
    """Whether tensor parallelism divides a parameter: matrices but the router, and biases."""
    is_matrix = len(shape) > 1 and not name.endswith("mlp.gate.weight")
    return is_matrix or name.endswith("_proj.bias")


def fullest(sizes, ranks: int) -> int:
    """The largest share when each size goes, the largest first, to the rank that has the least."""
    loads = [0] * ranks
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads)


def activations(
    config: LMConfig,
    tokens: int,
    supervised: int,
    width: int,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    gradient_checkpointing: int = 0,
) -> float:
    """Bytes that forward keeps for backward, at the peak, with the gradients in flight there.

    Per token and block, with `width` bytes of what matrix products read: both RMSNorms keep their
    input, in float32 the normalised input, too (a GPU's fused kernel does not: there this is an
    upper bound), and give one tensor to the projections; so do norms of q and k; attention
    reads rotated q, k and v and keeps its result twice (per document, and laid out for o_proj);
    SwiGLU keeps gate, up, silu(gate) and their product. The kernels for a CPU keep up to a third
    less: no normalised input, the result of attention once, no silu(gate).

    Args:
        width: 4 for float32, 2 for float16 and bfloat16; the others as in `estimate`.
    """
    dim, tp = config.dim, tensor_parallel
    q, kv = config.n_heads * config.head_dim / tp, config.n_kv_heads * config.head_dim / tp
    tokens, supervised = tokens / context_parallel, supervised / context_parallel
    kept = kept_by_norm(width)
    of_qk = kept if config.qk_norm else 0
    # All of a row's keys and values
    attention = q * (of_qk + 3 * width) + kv * (of_qk + 2 * width * context_parallel)
    # Sequence parallel between the products, gathered before them
    norms = 2 * (kept * dim / tp + width * dim)
    visits, inner, mlp = mlp_activations(config, tokens, width, tp)
    dropout = 2 * width * dim if config.dropout else 0  # the masks behind attention and MLP
    block = tokens * (norms + attention + mlp + dropout)
    in_flight = tokens * 3 * width * inner  # the gradients of SwiGLU's three inner tensors
    head = head_activations(config, supervised, width, tp)
    if not gradient_checkpointing:
        return config.n_layers * block + max(in_flight, head)
    # The input of every block and what is not computed anew; the rest of one block
    results = 0.0
    if gradient_checkpointing == 2:  # those of products and attention
        results = tokens * width * (2 * q + 2 * kv + dim + 2 * inner + dim * visits)
    inputs = config.n_layers * (tokens * FLOAT * dim + results)
    return inputs + max(block - results + in_flight, head)


def kept_by_norm(width: int) -> int:
    """Bytes a number: the input of an RMSNorm, in float32 the normalised input, too."""
    return 2 * FLOAT if width == FLOAT else FLOAT


def mlp_activations(
    config: LMConfig, tokens: float, width: int, tensor_parallel: int
) -> tuple[float, float, float]:
    """Of a block's MLP, per token: experts that it visits, inner numbers, bytes kept."""
    if not config.use_moe:
        inner = config.hidden_dim / tensor_parallel
        return 1, inner, 4 * width * inner
    # Rows of an expert are filled up to 16
    visits = config.n_experts_per_tok + 8 * config.n_experts / tokens
    inner = (visits + config.n_shared_experts) * config.moe_hidden_dim / tensor_parallel
    # The rows sorted by expert, the results in the order of the tokens, and the router's float32
    # input.
    rows = width * config.dim * (visits + config.n_experts_per_tok)
    router = 0 if width == FLOAT else FLOAT * config.dim
    return visits, inner, 4 * width * inner + rows + router


def head_activations(
    config: LMConfig, supervised: float, width: int, tensor_parallel: int
) -> float:
    """Bytes of the head and its gradients: of what it reads, and of its weights in float32.

    Logits exist for a chunk of tokens only, where tensor ranks do not share them: then
    cross-entropy has three tensors of their size when its backward begins.
    """
    head = supervised * (kept_by_norm(width) + width) * config.dim
    if tensor_parallel > 1:
        return head + supervised * 3 * FLOAT * config.vocab_size / tensor_parallel
    chunk = min(supervised, chunk_size(config.vocab_size)) * config.vocab_size
    gradients = supervised * width * config.dim + FLOAT * config.vocab_size * config.dim
    return head + gradients + chunk * (FLOAT if width == FLOAT else FLOAT + width)


def device_memory(device: torch.device) -> int | None:
    """Bytes that this process may use, on its GPU or of the machine's RAM; None: unreadable.

    RAM is shared by the processes of the machine, and limited by the control group (containers).
    """
    if device.type == "cuda":
        try:  # what this process holds already is its own to use
            return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        except RuntimeError:
            return None
    free = [meminfo("MemAvailable")]
    if free == [0]:
        return None
    for limit, used in CONTROL_GROUP:
        # Another version of control groups, or no limit ("max")
        with contextlib.suppress(OSError, ValueError):
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free)) // read_launch().local_world_size


def choose_strategy(
    config: LMConfig, device: torch.device, *, memory: int | None = None, **run: object
) -> tuple[str, str]:
    """The first of ddp, zero1, zero2, zero3 that fits into SAFE_SHARE of the memory, and why.

    Each saves more and costs more than the one before. With tensor parallelism zero1 is left out:
    its optimizer knows nothing of sharded tensors. Where the memory cannot be read the number of
    parameters decides. Ranks may read different numbers: one of them has to choose for all, or
    `memory` be their minimum.

    Args:
        memory: bytes per process; None: read it here; 0: it cannot be read.
        run: the other arguments of `estimate`, except strategy and offload.
    """
    memory = device_memory(device) if memory is None else memory
    if run["data_ranks"] * run.get("context_parallel", 1) == 1:
        candidates = ["ddp"]  # nobody to share with
    else:
        candidates = [s for s in STRATEGIES if s != "zero1" or run.get("tensor_parallel", 1) == 1]
    if not memory:
        return choose_by_size(parameter_count(config), candidates)
    rejected = []
    for strategy in candidates:
        need = estimate(config, strategy, **run)
        fits = need["total"] <= SAFE_SHARE * memory
        if fits:
            break
        rejected.append(f"{strategy} {need['total'] / GIB:.3g}")
    parts = ", ".join(
        f"{part} {need[part] / GIB:.3g}" for part in need if part not in ("total", "host")
    )
    verdict = "needs" if fits else "nothing fits, not even this: it needs"
    sizes = f"{need['total'] / GIB:.3g} GiB of {memory / GIB:.3g} GiB per process ({parts})"
    others = ", ".join(rejected if fits else rejected[:-1])
    if others:
        others = f"; {others} GiB would not fit" if fits else f"; without it {others} GiB"
    return strategy, f"{strategy}: {verdict} {sizes}{others}"


def choose_by_size(parameters: int, candidates: list[str]) -> tuple[str, str]:
    """The strategy for a number of parameters, where memory cannot be read, and why."""
    strategy = "ddp"
    if parameters >= 1e9 and len(candidates) > 1:
        strategy = "zero2" if parameters <= 7e9 else "zero3"
    rule = "below 1 billion ddp, up to 7 zero2, above zero3"
    count = f"{parameters / 1e9:.3g} billion parameters"
    return strategy, f"{strategy}: {count} ({rule}); free memory cannot be read"
